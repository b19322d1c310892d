"""What a soak found: what its server's processes and GPUs grew by, and what of that is too much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ci.checks.soak_processes import COLUMNS, Sample, role
from ci.checks.soak_requests import Outcome

#: What a GPU may hold more after the first part: code of kernels is loaded when a shape first asks for it.
DEVICE_MIB = 16.0
#: Private memory a process may grow by per 1,000 requests. Heaps, and caches of requests that vLLM keeps, grow slowly.
MEMORY_MIB = 2.0


def write(file: Path, samples: list[Sample], took: float, digests: list[str], outcome: Outcome, **more: Any) -> None:
    """The results, so far or in the end."""
    data = {"samples": [part._asdict() for part in samples], "growth": growth(samples), "seconds": took}
    told = json.dumps({**data, "digests": digests, "done": outcome.done, "wrong": outcome.wrong, **more}, indent=1)
    scratch = file.with_suffix(".tmp")
    scratch.write_text(told)
    scratch.rename(file)


def table(samples: list[Sample]) -> str:
    """Per process and figure: at the start, after the first part, at the end, growth after the first part."""
    start, first, last = samples[0], samples[min(1, len(samples) - 1)], samples[-1]
    columns = (f"{start.requests}", f"{first.requests}", f"{last.requests}", "growth")
    lines = [f"{'process':<34}{'':<14}" + "".join(f"{head:>10}" for head in columns)]
    for name, end in last.processes.items():
        for column in COLUMNS:
            begin, middle = (part.processes.get(name, {}).get(column, 0.0) for part in (start, first))
            digits = 0 if column in ("descriptors", "threads") else 1
            values = (begin, middle, end[column], end[column] - middle)
            unit = "" if digits == 0 else " MiB"
            lines.append(f"{name:<34}{column + unit:<14}" + "".join(f"{value:>10.{digits}f}" for value in values))
    for name, end in last.devices.items():
        values = (start.devices[name], first.devices[name], end, end - first.devices[name])
        lines.append(f"{name:<34}{'MiB':<14}" + "".join(f"{value:>10.1f}" for value in values))
    for what in ("segments", "files"):
        counts = [getattr(part, what) for part in (start, first, last)]
        lines.append(f"{what:<48}" + "".join(f"{count:>10}" for count in (*counts, counts[2] - counts[1])))
    return "\n".join(lines)


def growth(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """By process, what its private memory (MiB per 1,000 requests), descriptors and threads grew by after the first part."""
    first, last = samples[min(1, len(samples) - 1)], samples[-1]
    parts = max(1.0, (last.requests - first.requests) / 1000)
    found = {}
    for name, end in last.processes.items():
        before = first.processes.get(name, dict.fromkeys(COLUMNS, 0.0))
        per = {"private": parts, "descriptors": 1, "threads": 1}
        found[name] = {column: (end[column] - before[column]) / over for column, over in per.items()}
    return found


def too_much(
    mine: dict[str, dict[str, float]], plain: dict[str, dict[str, float]], memory_mib: float = MEMORY_MIB
) -> list[str]:
    """One line per figure that grew beyond its bound; `plain`: `growth` of plain vLLM, empty where it was not run.

    What plain vLLM has no process for (it needs no coordinator) is compared with nothing.
    """
    bounds = {"private": memory_mib, "descriptors": 0.0, "threads": 0.0}
    lines = []
    for name, grown in mine.items():
        like = [grew for other, grew in plain.items() if role(other) == role(name)]
        for column, bound in bounds.items():
            allowed = bound + max([0.0, *(grew[column] for grew in like)])
            if grown[column] > allowed:
                lines.append(f"{name}: {column} grew by {grown[column]:.1f}, more than {allowed:.1f}")
    return lines


def more_on_devices(samples: list[Sample]) -> list[str]:
    """One line per GPU that holds more at the end than after the first part."""
    first, last = samples[min(1, len(samples) - 1)], samples[-1]
    grown = {name: end - first.devices[name] for name, end in last.devices.items()}
    return [f"{name}: grew by {mib:.1f} MiB, more than {DEVICE_MIB}" for name, mib in grown.items() if mib > DEVICE_MIB]
