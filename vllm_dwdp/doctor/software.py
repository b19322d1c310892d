"""Python, vLLM, torch, CuPy and the driver: whether they are there and go together (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from vllm_dwdp.compat.versions import NOT_ON_GPUS, TESTED
from vllm_dwdp.doctor.line import Line, failure, ok, warning
from vllm_dwdp.doctor.readings import Cupy, Torch, Unread, Vllm
from vllm_dwdp.doctor.smi import Smi, version_in
from vllm_dwdp.errors import install

#: vLLM's wheels ask for 3.11 or newer; the lock was tried with 3.11, and its compiled packages stop at 3.13.
OLDEST, NEWEST = (3, 11), (3, 13)
#: Names under which CuPy may be installed; they overwrite each other.
CUPY: Final = ("cupy", "cupy-cuda12x", "cupy-cuda13x")


def python(version: tuple[int, int, int]) -> Line:
    text = ".".join(map(str, version))
    if OLDEST <= version[:2] <= NEWEST:
        return ok("Python", text)
    return warning("Python", f"{text}, tried with 3.11 to 3.13", "make an environment with one of these")


def plugin(loaded: Iterable[str], allowed: str | None) -> Line:
    """loaded: names of vLLM's general plugins that are installed. allowed: VLLM_PLUGINS."""
    if "dwdp" not in loaded:
        remedy = "install vllm-dwdp into this environment: pip install . in its folder"
        return failure("plugin", "vLLM finds no plugin `dwdp` in this environment", remedy)
    if allowed is not None and "dwdp" not in [name.strip() for name in allowed.split(",")]:
        return failure("plugin", f"VLLM_PLUGINS is {allowed!r}, without dwdp", "add dwdp to it, or unset it")
    return ok("plugin", "vLLM finds `dwdp`")


def vllm(found: Vllm | Unread, of: Torch | Unread) -> Line:
    """of: the torch that it goes with."""
    on_gpus = isinstance(of, Torch) and of.cuda is not None
    known = [version for version in TESTED if not (on_gpus and version in NOT_ON_GPUS)]
    wanted = f"vLLM {' or '.join(known)}"
    if isinstance(found, Unread):
        text = "not installed" if found.absent else f"cannot be imported: {found.why}"
        return failure("vLLM", text, f"install {wanted} (docs/install.md)")
    if found.refused:
        return failure("vLLM", found.refused, f"install {wanted}; without dwdp the other version works as it is")
    if found.version not in known:
        return failure("vLLM", f"{found.version}, tested on CPU only", f"install {wanted} for GPUs (docs/install.md)")
    return ok("vLLM", f"{found.version}, tested")


def seams(changed: Sequence[str] | None) -> Line:
    """changed: what of vLLM is not as expected, a line each; None without a vLLM."""
    if changed is None:
        return warning("vLLM's seams", "not looked at: there is no vLLM", "install vLLM first")
    if not changed:
        return ok("vLLM's seams", "all as expected")
    text = f"{len(changed)} are not as expected: {changed[0]}"
    return failure("vLLM's seams", text, "install an unmodified vLLM of a tested version (docs/versions.md)")


def torch(found: Torch | Unread, gpus: int) -> Line:
    """gpus: that nvidia-smi lists."""
    if isinstance(found, Unread):
        text = "not installed" if found.absent else f"cannot be imported: {found.why}"
        return failure("torch", text, "install vLLM with the torch that it asks for (docs/install.md)")
    if found.cuda is None:
        if gpus:
            remedy = "for GPUs, make an environment with vLLM's build for CUDA (docs/install.md)"
            return warning("torch", f"{found.version}, built for CPU, on a machine with {gpus} GPUs", remedy)
        return ok("torch", f"{found.version}, built for CPU")
    text = f"{found.version}, built for CUDA {found.cuda}"
    if found.gpus:
        return ok("torch", f"{text}, sees {len(found.gpus)} of {gpus} GPUs" if gpus else text)
    why = f" ({found.trouble})" if found.trouble else ""
    if gpus:
        remedy = "check CUDA_VISIBLE_DEVICES, and that the driver is new enough (below)"
        return failure("torch", f"{text}, sees none of {gpus} GPUs{why}", remedy)
    remedy = "run on a machine with GPUs (a container needs --gpus all), or install vLLM for CPU (docs/install.md)"
    return failure("torch", f"{text}, and there is no GPU{why}", remedy)


def cupy(found: Cupy | Unread, packages: Sequence[str], of: Torch | Unread) -> Line:
    """packages: of CUPY, those installed. of: the torch that it goes with."""
    built = of.cuda if isinstance(of, Torch) else None
    extra = f"cuda{built.split('.')[0] if built else '13'}"
    package = f"cupy-{extra}x"
    how = install(extra)
    if len(packages) > 1:
        remedy = f"pip uninstall {' '.join(packages)}, then {how}"
        return failure("CuPy", f"{' and '.join(packages)} overwrite each other", remedy)
    if isinstance(found, Unread):
        if built is None:
            return ok("CuPy", "not there, and not needed on CPU")
        return failure("CuPy", "not installed" if found.absent else f"cannot be imported: {found.why}", how)
    cuda = (found.cuda // 1000, found.cuda % 1000 // 10)
    text = f"{found.version}, with CUDA {cuda[0]}.{cuda[1]}"
    if built is not None and cuda[0] != int(built.split(".")[0]):
        remedy = f"pip uninstall {' '.join(packages) or 'cupy'}, then {how} ({package})"
        return failure("CuPy", f"{text}, beside a torch for CUDA {built}", remedy)
    return ok("CuPy", text)


def driver(smi: Smi | None, of: Torch | Unread, with_cupy: Cupy | Unread) -> Line:
    """Whether the driver can run the CUDA of torch and CuPy; a minor version above the driver's is CUDA's own business."""
    built = of.cuda if isinstance(of, Torch) else None
    if smi is None or (not smi.gpus and not smi.trouble):
        found = "nvidia-smi is not there" if smi is None else "nvidia-smi lists no GPU"
        if built is None:
            return ok("driver", f"none: {found}; ranks run on the CPU")
        remedy = "install NVIDIA's driver; in a container, start it with --gpus all"
        return failure("driver", f"{found}, but torch is built for CUDA {built}", remedy)
    if smi.trouble:
        return failure("driver", f"nvidia-smi: {smi.trouble}", "run nvidia-smi: the driver has to be mended first")
    if smi.cuda is None:
        return warning("driver", f"{smi.driver}, for an unknown CUDA", "compare its CUDA with torch's yourself")
    text = f"{smi.driver}, for CUDA up to {smi.cuda[0]}.{smi.cuda[1]}"
    needs = {"torch": version_in(built)}
    if isinstance(with_cupy, Cupy):
        needs["CuPy"] = (with_cupy.cuda // 1000, with_cupy.cuda % 1000 // 10)
    newer = [f"{name}'s {need[0]}.{need[1]}" for name, need in needs.items() if need and need[0] > smi.cuda[0]]
    if newer:
        remedy = "install a newer driver, or builds of vLLM and CuPy for the driver's CUDA"
        return failure("driver", f"{text}, too old for {' and '.join(newer)}", remedy)
    return ok("driver", text)
