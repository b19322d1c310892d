"""Who a process is, so that a handle can say whether its owner is this process, another one, or gone."""

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple


class ProcessId(NamedTuple):
    """pid: within `namespace`, which is one of one boot of one machine: a folder may be shared with others. started: clock
    ticks since boot, since a pid can be reused."""

    pid: int
    started: int
    namespace: str


def this_process() -> ProcessId:
    """The calling process; started and namespace are 0 and '' without /proc."""
    return _this_process(os.getpid())


@cache
def _this_process(pid: int) -> ProcessId:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return ProcessId(pid, _started(pid) or 0, f"{os.readlink('/proc/self/ns/pid')} of boot {boot}")
    except OSError:
        return ProcessId(pid, 0, "")


def process_with(pid: int) -> ProcessId:
    """The process that has this id now; started is 0 where there is none. Raises OSError where that is unknown."""
    return this_process()._replace(pid=pid, started=_started(pid) or 0)


def is_gone(process: ProcessId) -> bool:
    """Whether `process` has certainly ended; False where it cannot be known, as from another PID namespace or
    machine."""
    here = this_process()
    if not here.namespace or process.namespace != here.namespace:
        return False
    try:
        return _started(process.pid) != process.started
    except OSError:
        return False


def _started(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None where the process is gone or a zombie. Raises OSError where that is unknown."""
    try:
        # The name is what the process, or its file, is called, cut off after 15 bytes: within a character too.
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # behind the name, which may hold spaces
    return None if fields[0] in "ZX" else int(fields[19])
