"""The tables of profiled.py: milliseconds and parts of the span, by kind, of systems side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ci.bench.profiled import KINDS, PULLS

#: Names of kernels that are told of each system.
_TOLD: Final = 5
_NAME: Final = 100
Ranks = Sequence[Mapping[str, Any]]


def table(profile: Mapping[str, Mapping[str, Ranks]]) -> str:
    """profile: load -> system -> what profiled.summarise says of its ranks; empty where there is none."""
    return "".join(_one(load, systems) for load, systems in profile.items() if systems)


def mean(ranks: Ranks, *path: str) -> float:
    """Over ranks, of what is at this path in each."""
    values = []
    for rank in ranks:
        value: Any = rank
        for key in path:
            value = value[key]
        values.append(float(value))
    return statistics.fmean(values)


def _one(load: str, systems: Mapping[str, Ranks]) -> str:
    device = all(rank["device"] for ranks in systems.values() for rank in ranks)
    what = "device time" if device else "no device: operators on CPU, which have spans, not kernels"
    rows = [["", *(f"{name}, {len(ranks)} ranks" for name, ranks in systems.items())]]
    rows.append(["span", *(f"{mean(ranks, 'span_ms'):.1f}" for ranks in systems.values())])
    rows.append(["steps", *map(_steps, systems.values())])
    for kind in KINDS:
        if any(mean(ranks, "kinds", kind) for ranks in systems.values()):
            title = "pulls (beside kernels)" if kind == PULLS else kind
            rows.append([title, *(_part(ranks, "kinds", kind) for ranks in systems.values())])
    for key, title in (("busy_ms", "busy"), ("idle_ms", "idle"), ("idle_pulling_ms", "idle, a pull under way")):
        rows.append([title, *(_part(ranks, key) for ranks in systems.values())])
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{load}: {what}, ms and part of the span, means of ranks; kinds overlap"]
    lines += ["  ".join([row[0].ljust(wide[0]), *map(str.rjust, row[1:], wide[1:])]).rstrip() for row in rows]
    for name, ranks in systems.items():
        lines.append(f"  longest of {name}:")
        lines += [f"    {ms:8.2f} ms  {kind}: {kernel[:_NAME]}" for kernel, ms, kind in longest(ranks)]
    return "\n".join(lines) + "\n\n"


def _part(ranks: Ranks, *path: str) -> str:
    ms = mean(ranks, *path)
    return f"{ms:.2f} ({ms / mean(ranks, 'span_ms'):6.1%})"


def _steps(ranks: Ranks) -> str:
    """How many, and the time of one; "-" where traces do not tell of any."""
    steps = mean(ranks, "steps")
    return f"{steps:.1f} of {mean(ranks, 'span_ms') / steps:.2f} ms" if steps else "-"


def longest(ranks: Ranks) -> list[tuple[str, float, str]]:
    """(name, ms, kind) of kernels, the longest first: sums of a rank, means over ranks."""
    found: dict[str, tuple[float, str]] = {}
    for rank in ranks:
        for name, mine in rank["longest"].items():
            before = found.get(name, (0.0, ""))[0]
            found[name] = before + mine["ms"] / len(ranks), mine["kind"]
    return [(name, *found[name]) for name in sorted(found, key=lambda name: -found[name][0])[:_TOLD]]
