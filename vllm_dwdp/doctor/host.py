"""The host: memory files between processes, limits, memory, cores (pure)."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Final

from vllm_dwdp.doctor.line import Line, failure, ok, warning
from vllm_dwdp.transport.limits import Available

#: Descriptors below which a launch may run out: a slab is one, and vLLM's sockets and files come on top.
_FEW_DESCRIPTORS: Final = 4096
#: Bytes of /dev/shm that vLLM's message queues of two ranks may come to take.
_SHM_BYTES: Final = 512 << 20
#: Bytes below which not even vLLM and a small model start.
_LITTLE_MEMORY: Final = 8 << 30


@dataclass(frozen=True)
class Space:
    """Bytes of a file system."""

    free: int
    total: int


def proc(trouble: str | None) -> Line:
    """trouble: what came of a memory file that a child opened under /proc; None where it read the right bytes."""
    if trouble is None:
        return ok("/proc", "a process reads another one's memory file")
    remedy = (
        "mount /proc (without hidepid for this user) and run all ranks as one user, not setuid, in one container "
        "or one PID namespace"
    )
    return failure("/proc", f"a process cannot read another one's memory file: {trouble}", remedy)


def descriptors(soft: int, hard: int) -> Line:
    """The soft limit is raised where it is needed; the hard one stands."""
    if hard != resource.RLIM_INFINITY and hard < _FEW_DESCRIPTORS:
        remedy = "raise the hard limit: ulimit -Hn 65536, or --ulimit nofile=65536 of a container"
        return warning("descriptors", f"at most {hard}", remedy)
    return ok("descriptors", f"{_limit(soft)}, raised to at most {_limit(hard)} where needed")


def locked_memory(limit: int, gpus: bool) -> Line:
    """Bytes that may be pinned; only the transport cuda_pinned does."""
    if limit == resource.RLIM_INFINITY or not gpus:
        text = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / 2**20:.1f} MiB, none needed on CPU"
        return ok("locked memory", text)
    remedy = "ulimit -l unlimited, or --ulimit memlock=-1 of a container; transport cupy_ipc, the default, needs none"
    return warning("locked memory", f"{limit / 2**20:.1f} MiB: transport cuda_pinned may be refused", remedy)


def shm(space: Space | None) -> Line:
    """/dev/shm, where vLLM keeps its message queues (slabs lie elsewhere)."""
    if space is None:
        return failure("/dev/shm", "not there", "mount a tmpfs on it: vLLM's processes talk through it")
    text = f"{space.free / 2**30:.2f} of {space.total / 2**30:.2f} GiB free"
    if space.free < _SHM_BYTES:
        remedy = "--shm-size=2g or --ipc=host of a container, or remove what is left there: vLLM's queues need room"
        return warning("/dev/shm", text, remedy)
    return ok("/dev/shm", text)


def memory(left: Available) -> Line:
    """What the host and the cgroups of this process leave."""
    text = f"{left.nbytes / 2**30:.1f} GiB left by {left.limit}"
    if left.nbytes < _LITTLE_MEMORY:
        return warning("memory", text, "free memory, or raise that limit, before a launch reads its weights")
    return ok("memory", text)


def cores(number: int, gpus: bool) -> Line:
    """Cores that this process may use."""
    if number < 2:
        what = "ranks and their copies take turns on it" if not gpus else "engines take turns on it"
        return warning("cores", f"1: {what}", "allow more (taskset, --cpus of a container)")
    return ok("cores", f"{number}")


def _limit(value: int) -> str:
    return "any number" if value == resource.RLIM_INFINITY else str(value)
