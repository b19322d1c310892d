"""Wheel and sdist, installed into an environment that has nothing else; without network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import tomllib

from vllm_dwdp.compat.versions import TESTED

ROOT = Path(__file__).parents[2]
LIMIT_S = 120
BUILT_FROM = ("pyproject.toml", "setup.py", "README.md")
MODEL = "Qwen/Qwen3-30B-A3B"
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(*command: object, cwd: Path, status: int = 0) -> str:
    """What a command prints, which knows nothing of this folder."""
    env = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VLLM_PLUGINS")
    }
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=LIMIT_S, cwd=cwd, env=env)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done.stdout


def build(kind: str, source: Path, to: Path) -> Path:
    to.mkdir()
    return to / run(sys.executable, "-c", BUILD, f"build_{kind}", to, cwd=source).split()[-1]


class Built(NamedTuple):
    wheel: Path
    sdist: Path
    again: Path  # the wheel made of the sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """From a copy, since a build writes into its folder; with what must not get in beside it."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("vllm_dwdp", "kernels", "tests", "ci", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    wheel, sdist = build("wheel", source, folder / "wheel"), build("sdist", source, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return Built(wheel, sdist, build("wheel", unpacked, folder / "again"))


@pytest.fixture(scope="module")
def bare(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel and NumPy."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", built.wheel, cwd=folder)
    import numpy

    origin = Path(numpy.__file__).parents[1]
    (packages,) = folder.glob("lib/python*/site-packages")
    for found in (*origin.glob("numpy"), *origin.glob("numpy.libs")):
        (packages / found.name).symlink_to(found)
    return folder / "bin"


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_sdist_makes_the_same_wheel(built: Built) -> None:
    assert contents(built.wheel) == contents(built.again)


def test_the_wheel_holds_the_product_only(built: Built) -> None:
    names = set(contents(built.wheel))
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"vllm_dwdp"}
    wrong = [name for name in names if {"tests", "bench", "ci", "examples", "__pycache__"} & set(name.split("/"))]
    assert wrong == []
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_dwdp").rglob("*.py")}
    data = [*(ROOT / "vllm_dwdp/predict").rglob("*.toml"), *(ROOT / "vllm_dwdp/predict").rglob("*.json")]
    wanted |= {str(path.relative_to(ROOT)) for path in data}
    kernels = [*(ROOT / "kernels").glob("*.py"), *(ROOT / "kernels/configs").glob("*.json")]
    wanted |= {f"vllm_dwdp/{path.relative_to(ROOT)}" for path in kernels}
    assert sum(name.endswith(".toml") for name in wanted) >= 6 and sum("configs/" in name for name in wanted) >= 2
    assert {name for name in names if ".dist-info/" not in name} == wanted


def test_the_installed_copy_works(bare: Path, tmp_path: Path) -> None:
    script = (
        "import importlib.metadata as m, importlib.util as u, vllm_dwdp\n"
        "print(vllm_dwdp.__file__)\n"
        "print(*sorted(f'{e.group}={e.value}' for e in m.distribution('vllm-dwdp').entry_points))\n"
        "print(u.find_spec('vllm_dwdp.kernels.split_gemm') is not None, u.find_spec('vllm_dwdp.kernels.bench'))"
    )
    where, entries, kernels = run(bare / "python", "-c", script, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(bare.parent)
    assert entries.split() == [
        "console_scripts=vllm_dwdp.cli:main",
        "vllm.general_plugins=vllm_dwdp:register",
        "vllm.platform_plugins=vllm_dwdp:early",
    ]
    assert kernels == "True None"
    assert "h200" in run(bare / "vllm-dwdp", "hardware", cwd=tmp_path)
    planned = json.loads(run(bare / "vllm-dwdp", "plan", MODEL, "--json", cwd=tmp_path))
    assert planned["hardware"] == "H200" and planned["ranks"] == 4


def test_the_image_is_made_of_what_a_build_needs() -> None:
    """The image itself is not built here."""
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    assert ["FROM", f"vllm/vllm-openai:v{TESTED[-1]}"] in lines
    copied = {name for line in lines if line[0] == "COPY" for name in line[1:-1]}
    assert copied == {*BUILT_FROM, "vllm_dwdp", "kernels"}
    assert copied == set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    (extra,) = re.findall(r"\[(\w+)\]", " ".join(lines[-1]))
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_the_doctor_works_where_nothing_is_installed(bare: Path, tmp_path: Path) -> None:
    found = json.loads(run(bare / "vllm-dwdp", "doctor", MODEL, "--json", cwd=tmp_path, status=1))
    lines = {line["name"]: line for line in found["lines"]}
    for name in ("vLLM", "torch"):
        assert (lines[name]["state"], lines[name]["text"]) == ("failure", "not installed")
    assert lines["plugin"]["state"] == "ok" and lines["/proc"]["state"] == "ok"
    assert lines["vLLM's seams"]["state"] == "warning" and "plan" in lines
    assert found["failure"] == sum(line["state"] == "failure" for line in lines.values())
    assert list(tmp_path.iterdir()) == []
