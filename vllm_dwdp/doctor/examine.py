"""Takes the readings, each within a limit of time, and has every check made of them."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path
from typing import Any, Final, NamedTuple

from vllm_dwdp.compat.seams import misfits
from vllm_dwdp.doctor import gpus, host, software
from vllm_dwdp.doctor.child import Child, ChildFailed
from vllm_dwdp.doctor.fits import planned
from vllm_dwdp.doctor.line import Line, failure, guarded
from vllm_dwdp.doctor.readings import Cupy, Offer, Read, Torch, Unread, Vllm, decode
from vllm_dwdp.doctor.smi import ask_smi
from vllm_dwdp.errors import DOCTOR, DwdpError
from vllm_dwdp.transport.limits import available_memory
from vllm_dwdp.transport.memfd import create_file

#: Imports take 10 s on a cold disk; a GPU's first context as long.
IMPORT_S: Final = 120.0
GPU_S: Final = 120.0
_TRIAL: Final = b"vllm-dwdp doctor"
#: Parts of parts.py that import a package, and what they read.
_IMPORTED: Final[dict[str, type[Any]]] = {"torch": Torch, "vllm": Vllm, "cupy": Cupy}


class Links(NamedTuple):
    """What GPUs offered and read; trouble: one line, '' where all of them answered."""

    offers: list[Offer]
    reads: list[Read]
    trouble: str = ""


def examine(model: str | None = None, ranks: int | None = None) -> list[Line]:
    """All lines, of the software, the GPUs, the host and, where a model is named, the plan."""
    with ExitStack() as stack:
        # All at once, as most of the time is imports.
        children = {kind: _started(stack, name) for name, kind in _IMPORTED.items()}
        smi = ask_smi()
        torch, vllm, cupy = (_imported(children[kind], kind) for kind in (Torch, Vllm, Cupy))
    found = gpus.visible(smi, torch)
    lines = guarded("Python", lambda: software.python(sys.version_info[:3]))
    lines += guarded("plugin", lambda: software.plugin(_plugins(), os.environ.get("VLLM_PLUGINS")))
    lines += guarded("vLLM", lambda: software.vllm(vllm, torch))
    lines += guarded("vLLM's seams", lambda: software.seams(_changed()))
    listed = 0 if smi is None else len(smi.gpus)
    lines += guarded("torch", lambda: software.torch(torch, listed))
    lines += guarded("CuPy", lambda: software.cupy(cupy, _installed(software.CUPY), torch))
    lines += guarded("driver", lambda: software.driver(smi, torch, cupy))
    lines += guarded("GPUs", lambda: [*gpus.number(found), *map(gpus.one, found), *gpus.wsl(platform.release(), found)])
    if isinstance(torch, Torch) and torch.gpus and isinstance(cupy, Cupy):
        lines += guarded("CUDA IPC", lambda: link_lines(measure(len(torch.gpus))))
    lines += guarded("/proc", lambda: host.proc(memory_file_trouble()))
    lines += guarded("descriptors", lambda: host.descriptors(*resource.getrlimit(resource.RLIMIT_NOFILE)))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    lines += guarded("locked memory", lambda: host.locked_memory(locked, bool(found)))
    lines += guarded("/dev/shm", lambda: host.shm(_space("/dev/shm")))
    lines += guarded("memory", lambda: host.memory(available_memory()))
    lines += guarded("cores", lambda: host.cores(len(os.sched_getaffinity(0)), bool(found)))
    if model is not None:
        device = found[0].name if found else None
        lines += guarded("plan", lambda: planned(model, ranks or max(2, len(found)), device))
    return lines


def measure(count: int) -> Links:
    """`count` GPUs, a process each, read each other in turn; a single one is read by a second process on it."""
    offers: list[Offer] = []
    reads: list[Read] = []
    with ExitStack() as stack:
        try:
            indices = list(range(count)) if count > 1 else [0, 0]
            children = [stack.enter_context(Child.part("gpu", str(index))) for index in indices]
            for child in children:
                offer = decode(Offer, child.ask(GPU_S))
                if isinstance(offer, Unread):
                    return Links(offers, reads, offer.why)
                offers.append(offer)
            for reader, child in enumerate(children):
                order = [
                    {"index": offer.index, "handle": offer.handle}
                    for owner, offer in enumerate(offers)
                    if owner != reader and offer.handle is not None
                ]
                answer = child.ask(GPU_S, order)
                if "error" in answer:
                    return Links(offers, reads, answer["error"])
                reads += [Read(**read) for read in answer["reads"]]
        except ChildFailed as error:
            return Links(offers, reads, str(error))
    return Links(offers, reads)


def link_lines(links: Links) -> list[Line]:
    """All lines about what GPUs may do with each other."""
    offers = list({offer.index: offer for offer in links.offers}.values())
    lines = gpus.peer_access(links.reads)
    if links.trouble:
        remedy = f"see that nothing else holds the GPUs, and nvidia-smi; {gpus.CONTAINER}"
        lines.append(failure("CUDA IPC", links.trouble, remedy))
    else:
        lines.append(gpus.ipc(links.offers, links.reads))
    return [*lines, *gpus.vmm(offers), *gpus.links(offers, links.reads)]


def _started(stack: ExitStack, part: str) -> Child | Unread:
    try:
        return stack.enter_context(Child.part(part))
    except ChildFailed as error:
        return Unread(str(error))


def _imported(child: Child | Unread, kind: type[Any]) -> Any:
    """A reading of `kind`, or Unread."""
    if isinstance(child, Unread):
        return child
    try:
        return decode(kind, child.ask(IMPORT_S))
    except ChildFailed as error:
        return Unread(str(error))


def _plugins() -> list[str]:
    return [entry.name for entry in entry_points(group="vllm.general_plugins")]


def _changed() -> list[str] | None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    return list(misfits(Path(spec.origin).parents[1]))


def _installed(names: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        try:
            distribution(name)
        except PackageNotFoundError:
            continue
        found.append(name)
    return found


def memory_file_trouble() -> str | None:
    """A memory file of this process, read by another one as peers do."""
    import ctypes

    try:
        file = create_file(len(_TRIAL), "the doctor's trial")
    except DwdpError as error:
        return str(error).removesuffix(DOCTOR)
    try:
        ctypes.memmove(file.mapping.address, _TRIAL, len(_TRIAL))
        with Child.part("memfd") as child:
            answer = child.ask(IMPORT_S, file.handle.to_dict())
    except ChildFailed as error:
        return str(error)
    finally:
        file.close()
    if "error" in answer:
        return str(answer["error"])
    return None if bytes.fromhex(answer["bytes"]) == _TRIAL else "it read other bytes"


def _space(path: str) -> host.Space | None:
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return host.Space(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)
