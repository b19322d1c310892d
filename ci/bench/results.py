"""What loads.py found: medians, ratios turn by turn, and the table."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Final

from ci.bench.counted import middle

#: A base this much slower than in an earlier run has to be explained before its ratios mean anything.
EARLIER: Final = 0.9
#: Load -> system -> its turns, each a Window as a dict, the n-th of all systems being the same turn; those of kind dwdp have
#: `dwdp` (counted.grown) where their server told it.
Turns = dict[str, dict[str, list[dict[str, Any]]]]


def as_text(found: Any) -> str:
    """As JSON, with a list of numbers on one line."""
    text = json.dumps(found, indent=1)
    return re.sub(r"\[[\d\s.,eE+-]+\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"


def order(names: Sequence[str], turn: int) -> list[str]:
    """In which order systems are measured in a turn: each is first, and before each other, about equally often."""
    start = turn // 2 % len(names) if len(names) > 2 else 0
    forward = [*names[start:], *names[:start]]
    return forward[::-1] if turn % 2 else forward


def settled(rates: Sequence[float], within: float = 0.1) -> bool:
    """Whether the last two warm-ups of a system differ by less than `within`."""
    return len(rates) > 1 and abs(rates[-1] - rates[-2]) < within * max(rates[-2:])


def turn_length(
    left_s: float, loads: int, systems: int, turns: int, most_s: float, least_s: float, more_s: float
) -> float:
    """Seconds to measure in a turn, so that the loads left can have all their turns in the time left.

    more_s: that a turn takes besides.
    """
    fits = left_s / (loads * systems * turns) - more_s
    return min(most_s, max(least_s, fits))


def ratios(mine: Sequence[float], base: Sequence[float]) -> list[float]:
    """Turn by turn."""
    return [one / other for one, other in zip(mine, base, strict=False) if other]


def summary(turns: Turns, base: str | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Load -> system -> medians and ranges over turns, and of the ratio to `base`, where that was measured."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for load, systems in turns.items():
        bases = [turn["tokens_per_s"] for turn in systems.get(base or "", [])]
        found[load] = {}
        for name, mine in systems.items():
            if not mine:
                continue
            rates = [turn["tokens_per_s"] for turn in mine]
            row = {
                "turns": len(mine),
                **_spread("tokens_per_s", rates),
                "output_per_s": statistics.median(turn["output_per_s"] for turn in mine),
                **_ttft(mine),
                "itl_p50_s": percentile((value for turn in mine for value in turn["itl_s"]), 50),
            }
            if counted := middle(mine):
                row["dwdp"] = counted
            if by_turn := ratios(rates, bases):
                row |= _spread("ratio", by_turn)
                row |= _ttft_ratios(row, _ttft(systems[base or ""]))
            found[load][name] = row
    return found


def slower_bases(now: dict[str, Any], earlier: dict[str, Any], base: str) -> list[str]:
    """A line per load in which the base is slower than it was in an earlier run's summary by more than allowed."""
    lines = []
    for load in now:
        old, new = (side.get(load, {}).get(base, {}).get("tokens_per_s") for side in (earlier, now))
        if old and new and new < EARLIER * old:
            lines.append(f"{load}: {base} made {new:.0f} tokens/s, {old:.0f} earlier: explain that first")
    return lines


def table(found: dict[str, dict[str, dict[str, Any]]], base: str | None) -> str:
    """A line per load and system, and per place of an uneven load. Ranges are those of the turns."""
    lines = [
        f"{'load':<11} {'system':<14} {'turns':>5} {'tokens/s (range)':>28} {'output/s':>9} {'ITL ms':>7} "
        f"{'TTFT ms p50, p99':>18} {'TTFT / base':>12}  ratio to {base or 'nothing'} (range)"
    ]
    for load, systems in found.items():
        for name, row in systems.items():
            rate = f"{row['tokens_per_s']:.0f} ({row['tokens_per_s_low']:.0f} to {row['tokens_per_s_high']:.0f})"
            ratio = ""
            if "ratio" in row and name != base:
                ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
            head = f"{load:<11} {name:<14} {row['turns']:>5} {rate:>28} {row['output_per_s']:>9.0f}"
            lines.append(f"{head} {_ms(row['itl_p50_s']):>7} {_first(row, name != base)}  {ratio}".rstrip())
            for where, part in row.get("ttft_by", {}).items():
                lines.append(f"{'':<12}{'':<14}{where:>53} {_first(part, name != base)}".rstrip())
    return "\n".join(lines)


def _first(row: dict[str, Any], by_base: bool) -> str:
    """Columns of a table: percentiles of TTFT, and their ratios."""
    ttft = f"{_ms(row['ttft_p50_s'])}, {_ms(row['ttft_p99_s'])}"
    keys = [key for key in ("ttft_p50_ratio", "ttft_p99_ratio") if by_base and key in row]
    return f"{ttft:>18} {', '.join(f'{row[key]:.2f}' for key in keys):>12}"


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def percentile(values: Iterable[float], percent: int) -> float | None:
    """None of no values."""
    values = sorted(values)
    return values[min(len(values) - 1, len(values) * percent // 100)] if values else None


def first_tokens(turns: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """Seconds to the first token of all turns together: '' for all requests, and by place where a load is uneven."""
    found: dict[str, list[float]] = {"": []}
    for turn in turns:
        found[""] += turn["ttft_s"]
        for where, values in turn.get("ttft_by", {}).items():
            found.setdefault(where, []).extend(values)
    return found


def _ttft(turns: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Percentiles of all turns together; ttft_by: of an uneven load, by place."""
    both = {
        where: {f"ttft_p{percent}_s": percentile(values, percent) for percent in (50, 99)}
        for where, values in first_tokens(turns).items()
    }
    whole = both.pop("")
    return {**whole, "ttft_by": both} if both else whole


def _ttft_ratios(mine: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Of percentiles, to those of the base; `mine` as `_ttft` gives it."""
    found: dict[str, Any] = {
        key.replace("_s", "_ratio"): mine[key] / base[key]
        for key in ("ttft_p50_s", "ttft_p99_s")
        if mine.get(key) and base.get(key)
    }
    by = {
        where: mine["ttft_by"][where] | _ttft_ratios(mine["ttft_by"][where], base.get("ttft_by", {}).get(where, {}))
        for where in mine.get("ttft_by", {})
    }
    return {**found, "ttft_by": by} if by else found


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"
