"""What processes of this machine take, and which cores a comparison gets."""

from __future__ import annotations

import os
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def memory(folder: Path) -> float:
    """Bytes of a process, pages that it shares with others in parts."""
    return int((folder / "smaps_rollup").read_text().partition("\nPss:")[2].split()[0]) * 1024.0


def cpu_s(folder: Path) -> float:
    """Seconds that a process has computed."""
    return sum(map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:13])) / TICKS


def busy_s(cores: list[int]) -> float:
    """Seconds that `cores` were not idle."""
    names = [f"cpu{core}" for core in cores]
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are counted as users
    return sum(sum(map(int, line[1:9])) - int(line[4]) - int(line[5]) for line in lines if line[0] in names) / TICKS


def two_cores() -> list[int]:
    """Two allowed CPUs on different physical cores, where there are two."""
    by_core: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        by_core.setdefault(
            "/".join((topology / name).read_text().strip() for name in ("physical_package_id", "core_id")), cpu
        )
    cores = list(by_core.values())[:2]
    if len(cores) < 2:
        raise SystemExit("bench: two cores are needed; name two CPUs with --cores")
    return cores
