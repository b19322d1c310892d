"""Which build of vLLM the set-up installs: for CUDA on a machine with NVIDIA GPUs, for CPU on any other.

DWDP_SETUP=cpu, cuda12 or cuda13 says it instead. cuda12 is for environments that have a vLLM for CUDA 12 already: vLLM's
own wheel is for CUDA 13.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ci.root import ROOT
from ci.setup.quiet_pip import pip_install
from vllm_dwdp.doctor.smi import parse
from vllm_dwdp.doctor.software import CUPY

CPU_LOCK = ROOT / "requirements" / "cpu.lock"
CPU_031_LOCK = ROOT / "requirements" / "cpu-0.31.lock"
CUDA_LOCK = ROOT / "requirements" / "cuda.lock"
VARIABLE = "DWDP_SETUP"
BUILDS = ("cpu", "cuda12", "cuda13")
#: CUDA of vLLM's own wheel.
CUDA = 13
SMI_LIMIT_S = 60


class SetupFailed(Exception):
    """One line that says what is wrong and what to do."""


class Choice(NamedTuple):
    """build: one of BUILDS. why: what says so. asked: whether DWDP_SETUP does."""

    build: str
    why: str
    asked: bool = False


def _smi(*args: str) -> str | None:
    """What `nvidia-smi` prints; None where there is none, or where it fails."""
    try:
        result = subprocess.run(["nvidia-smi", *args], capture_output=True, text=True, timeout=SMI_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver can run; None where nvidia-smi does not tell."""
    return parse("", _smi() or "").cuda


def choose(environ: Mapping[str, str]) -> Choice:
    """The build for this machine; raises SetupFailed for a DWDP_SETUP that is none."""
    asked = environ.get(VARIABLE, "")
    if asked and asked not in BUILDS:
        raise SetupFailed(f"{VARIABLE} is {asked!r}: set it to {', '.join(BUILDS)}, or leave it out")
    if asked:
        return Choice(asked, f"{VARIABLE} is {asked}", True)
    found = _smi("-L")
    # Lines of MIG instances are indented.
    gpus = sum(line.startswith("GPU ") for line in (found or "").splitlines())
    if not gpus:
        return Choice("cpu", "nvidia-smi is not there, or fails" if found is None else "nvidia-smi lists no GPU here")
    if "microsoft" in platform.release().lower():
        return Choice("cpu", "ranks cannot share GPUs under WSL, which has no CUDA IPC")
    listed, version = f"nvidia-smi lists {gpus} GPU{'s' if gpus > 1 else ''}", driver_cuda()
    if version is None:
        return Choice(f"cuda{CUDA}", f"{listed}, and not the driver's CUDA version")
    shown = f"{listed}, with a driver for CUDA {version[0]}.{version[1]}"
    return Choice(f"cuda{CUDA}" if version[0] >= CUDA else "cuda12", shown)


def refuse_old_cuda(choice: Choice) -> None:
    """Raises SetupFailed where vLLM's own wheel is not for this CUDA."""
    if choice.build != "cuda12":
        return
    cure = f"leave {VARIABLE} out" if choice.asked else f"install a driver for CUDA {CUDA}"
    raise SetupFailed(
        f"{choice.why}, but vLLM 0.32.0's own wheel is built for CUDA {CUDA}: {cure}; or make an environment of your own "
        f"with a build of vLLM for CUDA 12, name it with `make setup VENV=FOLDER`, which adds CuPy; "
        f"or set {VARIABLE}=cpu"
    )


def refuse_other_build(venv: Path, holds: str | None, choice: Choice) -> None:
    """Raises SetupFailed where the environment `holds` another build: the two overwrite each other's files."""
    if holds is not None and holds != choice.build:
        raise SetupFailed(
            f"{venv} holds vLLM's build for {holds}, but {choice.why}: remove that folder and run again, "
            f"or set {VARIABLE}={holds}"
        )


def installed_version(python: Path, name: str) -> str | None:
    """The version of a distribution in the environment of `python`."""
    code = f"import importlib.metadata as m\ntry: print(m.version({name!r}))\nexcept m.PackageNotFoundError: pass"
    result = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip() or None


def locked(lock: Path, name: str) -> str:
    """The version that a lock pins; raises SetupFailed if it has none."""
    for line in lock.read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.split("==")[1].strip()
    raise SetupFailed(f"{lock} has no line {name}==VERSION")


def torch_cuda(python: Path) -> str | None:
    """The CUDA that the environment's torch is built for, such as 13.0."""
    code = "import torch; print(torch.version.cuda or '')"
    result = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return result.stdout.strip() or None


def install_cupy(python: Path, choice: Choice, say: Callable[[str], None]) -> None:
    """Add CuPy to an environment whose vLLM is the user's own, for the CUDA of its torch; raises SetupFailed."""
    if choice.build == "cpu":
        return
    cuda = torch_cuda(python)
    if cuda is None:
        say(f"its torch is not built for CUDA: no CuPy, though {choice.why}")
        return
    major = cuda.split(".")[0]
    if choice.asked and choice.build != f"cuda{major}":
        raise SetupFailed(f"{choice.why}, but the torch of {python} is built for CUDA {cuda}: leave {VARIABLE} out")
    wheel = f"cupy-cuda{major}x"
    present = [name for name in CUPY if installed_version(python, name) is not None]
    if not present:
        say(f"installing CuPy for CUDA {major}")
        pip_install(python, [f"{wheel}=={locked(CUDA_LOCK, 'cupy-cuda13x')}"], say)
    elif not {"cupy", wheel} & set(present):
        raise SetupFailed(
            f"{present[0]} is installed, but the torch of {python} is built for CUDA {cuda}: "
            f"`pip uninstall {present[0]}` there and run again"
        )
