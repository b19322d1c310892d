"""What this process may still take of memory, descriptors and maps, so that a start that cannot work is refused with the
limit that stands in its way."""

import errno
import mmap
import os
import resource
from pathlib import Path
from typing import Final, NamedTuple

from vllm_dwdp.errors import DOCTOR, DwdpError

#: What the kernel gives back before a cgroup is out of memory, as fields of its memory.stat. Pages of memory files are in
#: none of them: they are charged as anonymous ones are, since nothing could be written back.
_RECLAIMABLE: Final = ("inactive_file", "active_file", "slab_reclaimable")
_RECLAIMABLE_V1: Final = ("total_inactive_file", "total_active_file")  # v1 does not tell what slabs would give


class Available(NamedTuple):
    """Bytes that can still be allocated, and the limit that says so."""

    nbytes: int
    limit: str


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Available:
    """The least of MemAvailable and what the cgroups of this process (v2 or v1) leave; what can be
    reclaimed counts as free."""
    found = [Available(_meminfo(proc), "the host's available memory")]
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += _chain(cgroup, path, "memory.max", "memory.current", _RECLAIMABLE)
        elif "memory" in controllers.split(","):
            found += _chain(cgroup / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", _RECLAIMABLE_V1)
    return min(found)


def require_memory(nbytes: int, purpose: str) -> None:
    """Raise DwdpError unless `nbytes` more can be allocated for `purpose`."""
    left = available_memory()
    if nbytes > left.nbytes:
        raise DwdpError(
            f"{purpose} needs {_gib(nbytes)} but {left.limit} leaves {_gib(left.nbytes)}: raise that limit, "
            "free memory, use more ranks or fewer slots"
        )


def require_descriptors(count: int, purpose: str) -> None:
    """See that `count` more descriptors can be opened for `purpose`: the soft limit is raised where that takes it.

    Raises DwdpError where the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    try:
        in_use = len(os.listdir("/proc/self/fd")) - 1  # without the one that lists them
    except OSError as error:
        if error.errno != errno.EMFILE:
            return  # without /proc this is not the trouble
        in_use = soft
    needed = in_use + count
    if needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise DwdpError(
            f"{purpose} needs {count} more file descriptors, but {in_use} of {hard} are open: raise the hard limit "
            "(ulimit -n, --ulimit nofile of a container)"
        )
    # What was left before stays for others, as far as the hard limit goes.
    more = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))


def why_no_map(nbytes: int, proc: Path = Path("/proc")) -> str:
    """What to do about a mapping of `nbytes` that the kernel has just refused for want of memory."""
    most, maps = _number(proc / "sys/vm/max_map_count"), len(_lines(proc / "self/maps"))
    if most is not None and maps >= most - 1:
        return f"this process has {maps} mappings: raise vm.max_map_count, which is {most}"
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    statm = _lines(proc / "self/statm")
    taken = int(statm[0].split()[0]) * mmap.PAGESIZE if statm else 0
    if limit != resource.RLIM_INFINITY and taken + nbytes > limit:
        return f"{_gib(taken)} of addresses are in use: raise ulimit -v, which is {_gib(limit)}"
    return "free memory, or relax vm.overcommit_memory"


def _chain(root: Path, path: str, limit: str, usage: str, reclaimable: tuple[str, ...]) -> list[Available]:
    """Every cgroup from this one up to the root, as a limit of any of them holds. In a container the path may be the
    host's and not exist; then the root is the container's own cgroup."""
    here = root / path.lstrip("/")
    found = []
    for folder in (here, *here.parents):
        most, used = _number(folder / limit), _number(folder / usage)
        if most is not None and used is not None:
            stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat"))
            used = max(0, used - sum(int(stat.get(field, 0)) for field in reclaimable))
            found.append(Available(max(0, most - used), f"the cgroup {folder} ({limit})"))
        if folder == root:
            break
    return found


def _meminfo(proc: Path) -> int:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise DwdpError(f"{proc}/meminfo has no MemAvailable: dwdp's shm transport needs Linux with /proc mounted{DOCTOR}")


def _lines(path: Path) -> list[str]:
    try:
        # Names in them, of cgroups and of mapped files, may be of any bytes.
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise DwdpError(f"{path} cannot be read ({error.strerror}): raise that limit") from error
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
