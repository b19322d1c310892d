"""How much memory this process may still take, so that a start that cannot work is refused instead of killed."""

from pathlib import Path
from typing import NamedTuple

from vllm_dwdp.errors import DwdpError


class Available(NamedTuple):
    """Bytes that can still be allocated, and the limit that says so."""

    nbytes: int
    limit: str


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Available:
    """The least of MemAvailable and what the cgroups of this process (v2 or v1) leave; page cache counts as free."""
    found = [Available(_meminfo(proc), "the host's available memory")]
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += _chain(cgroup, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            found += _chain(
                cgroup / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            )
    return min(found)


def require_memory(nbytes: int, purpose: str) -> None:
    """Raise DwdpError unless `nbytes` more can be allocated for `purpose`."""
    left = available_memory()
    if nbytes > left.nbytes:
        raise DwdpError(
            f"{purpose} needs {_gib(nbytes)} but {left.limit} leaves {_gib(left.nbytes)}: raise that limit, "
            "free memory, use more ranks or fewer slots"
        )


def _chain(root: Path, path: str, limit: str, usage: str, cache: str) -> list[Available]:
    """Every cgroup from this one up to the root, as a limit of any of them holds. In a container the path may be the
    host's and not exist; then the root is the container's own cgroup."""
    here = root / path.lstrip("/")
    found = []
    for folder in (here, *here.parents):
        most, used = _number(folder / limit), _number(folder / usage)
        if most is not None and used is not None:
            stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat"))
            found.append(Available(max(0, most - used + int(stat.get(cache, 0))), f"the cgroup {folder} ({limit})"))
        if folder == root:
            break
    return found


def _meminfo(proc: Path) -> int:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise DwdpError(f"{proc}/meminfo has no MemAvailable: dwdp's shm transport needs Linux with /proc mounted")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
