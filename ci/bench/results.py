"""What loads.py found: medians, ratios turn by turn, and the table."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Final

#: A base this much slower than in an earlier run has to be explained before its ratios mean anything.
EARLIER: Final = 0.9
#: Load -> system -> its turns, each a Window as a dict, the n-th of all systems being the same turn.
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
                "ttft_p50_s": _of(mine, "ttft_s", 50),
                "ttft_p99_s": _of(mine, "ttft_s", 99),
                "itl_p50_s": _of(mine, "itl_s", 50),
            }
            if by_turn := ratios(rates, bases):
                row |= _spread("ratio", by_turn)
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
    """A line per load and system. Ranges are those of the turns."""
    lines = [
        f"{'load':<11} {'system':<14} {'turns':>5} {'tokens/s (range)':>28} {'output/s':>9} "
        f"{'TTFT ms p50, p99':>18} {'ITL ms':>7}  ratio to {base or 'nothing'} (range)"
    ]
    for load, systems in found.items():
        for name, row in systems.items():
            rate = f"{row['tokens_per_s']:.0f} ({row['tokens_per_s_low']:.0f} to {row['tokens_per_s_high']:.0f})"
            ratio = ""
            if "ratio" in row and name != base:
                ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
            ttft = f"{_ms(row['ttft_p50_s'])}, {_ms(row['ttft_p99_s'])}"
            lines.append(
                f"{load:<11} {name:<14} {row['turns']:>5} {rate:>28} {row['output_per_s']:>9.0f} "
                f"{ttft:>18} {_ms(row['itl_p50_s']):>7}  {ratio}".rstrip()
            )
    return "\n".join(lines)


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def _of(turns: Iterable[dict[str, Any]], key: str, percent: int) -> float | None:
    """A percentile of what all turns saw."""
    values = sorted(value for turn in turns for value in turn[key])
    return values[min(len(values) - 1, len(values) * percent // 100)] if values else None


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"
