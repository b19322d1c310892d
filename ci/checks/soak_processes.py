"""What the processes of a server hold: memory, descriptors, threads, by name; and what it keeps outside of them."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import NamedTuple

import psutil

#: Columns of a process, in the order of tables. Memory in MiB.
COLUMNS = ("rss", "private", "shared", "pss", "descriptors", "threads")
_KIB = {"VmRSS": "rss", "RssAnon": "private", "RssShmem": "shared"}
_TITLES = (
    (re.compile(r"VLLM::APIServer(?:_(\d+))?"), "API server"),
    (re.compile(r"VLLM::EngineCore(?:_DP(\d+))?"), "engine"),
    (re.compile(r"VLLM::\S*Coordinator"), "coordinator"),
)


class Sample(NamedTuple):
    """processes: by name, its figures by the names of COLUMNS. segments: names in /dev/shm. files: in the temporary
    folder of the server, folders and sockets too. Both are those that came since before the server. devices: MiB in use
    on the GPU of each rank."""

    requests: int
    processes: dict[str, dict[str, float]]
    segments: int
    files: int
    devices: dict[str, float]


def names_of(tree: list[psutil.Process]) -> dict[str, int]:
    """Name -> process id of a server's processes, the front end first; a worker has the number of its engine."""
    named: dict[str, int] = {}
    of_pid: dict[int, str] = {}
    for place, process in enumerate(tree):
        try:
            title, parent = " ".join(process.cmdline()), of_pid.get(process.ppid(), "")
        except psutil.NoSuchProcess:
            continue
        name = "front end" if place == 0 else _name(title, parent)
        while name in named:
            name += "'"
        named[name] = process.pid
        of_pid[process.pid] = name
    return named


def _name(title: str, parent: str) -> str:
    for pattern, role in _TITLES:
        if found := pattern.search(title):
            return f"{role} {found[1] or 0}" if pattern.groups else role
    if "VLLM::Worker" in title:
        return parent.replace("engine", "worker")
    helper = "resource tracker" if "resource_tracker" in title else title.split(" ")[0].rsplit("/", 1)[-1]
    return f"{helper} of {parent}"


def role(name: str) -> str:
    """The name without its number: what two servers have in common."""
    return re.sub(r" \d+'*", "", name)


def measure(pid: int) -> dict[str, float]:
    """The figures of one process; raises OSError where it is gone."""
    folder = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    found = {column: int(status[key].split()[0]) / 1024 for key, column in _KIB.items()}
    rollup = dict(line.split(":", 1) for line in (folder / "smaps_rollup").read_text().splitlines()[1:])
    found["pss"] = int(rollup["Pss"].split()[0]) / 1024
    found["descriptors"] = len(os.listdir(folder / "fd"))
    found["threads"] = int(status["Threads"])
    return found


def segments() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir("/dev/shm"))


def unused(names: set[str]) -> list[str]:
    """Those of `names` under /dev/shm that no process maps: a name in use belongs to somebody else's engine."""
    if not names:
        return []
    # By inode: glibc makes semaphores under another name and renames them.
    mapped: set[int] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            text = maps.read_text(errors="replace")  # files may have names of any bytes
            mapped.update(int(line.split()[4]) for line in text.splitlines() if "/dev/shm/" in line)
    free = []
    for name in sorted(names):
        with contextlib.suppress(FileNotFoundError):
            if os.stat(f"/dev/shm/{name}").st_ino not in mapped:
                free.append(name)
    return free


def sample(pid: int, requests: int, shm_before: set[str], temporary: Path, devices: dict[str, float]) -> Sample:
    """Everything that the server of process `pid` holds after `requests` requests."""
    front_end = psutil.Process(pid)
    names = names_of([front_end, *front_end.children(recursive=True)])
    files = sum(len(folders) + len(files) for _, folders, files in os.walk(temporary))
    figures = {name: measure(each) for name, each in names.items()}
    return Sample(requests, figures, len(segments() - shm_before), files, devices)
