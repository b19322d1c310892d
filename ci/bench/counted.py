"""What DWDP's own counters say of a turn of loads.py: waits that were exposed, bytes pulled, requests that came late.

Read from the server's /metrics between turns, when it is idle, never within one.
"""

from __future__ import annotations

import http.client
import math
import re
import statistics
import time
import urllib.request
from collections.abc import Iterable, Mapping
from typing import Any, Final

#: Series without `dwdp:` and `_total` (vllm_dwdp/engine/metrics.py), each with a line for every rank.
SERIES: Final = (
    "exposed_wait_seconds", "forwards", "direct_forwards", "travel_forwards", "layers", "slot_waits", "pulled_bytes",
    "direct_bytes", "travel_requests", "travel_late",
)  # fmt: skip
_LINE: Final = re.compile(r'^dwdp:(\w+)_total\{engine="(\d+)"\} (\S+)$', re.MULTILINE)
#: Of one GET; a server that is idle answers in some milliseconds.
GET_S: Final = 2.0
#: A server publishes once a second what its ranks have counted.
PUBLISHED_S: Final = 1.2
#: Series -> rank -> value.
Counts = dict[str, dict[int, float]]


def read(url: str) -> Counts | None:
    """The counters of all ranks of a server; None where it does not tell all of SERIES, which is no reason to fail."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=GET_S) as answer:
            return parse(answer.read().decode())
    except (OSError, ValueError, http.client.HTTPException):
        return None


def parse(text: str) -> Counts:
    """Of a page of metrics; raises ValueError where a series is not there for each rank."""
    found: Counts = {name: {} for name in SERIES}
    for name, rank, value in _LINE.findall(text):
        if name in found:
            found[name][int(rank)] = float(value)
    ranks = set(found["forwards"])
    for name, values in found.items():
        if not ranks or set(values) != ranks:
            raise ValueError(f"dwdp:{name}_total is there for ranks {sorted(values)}, forwards for {sorted(ranks)}")
    return found


def grown(before: Counts, after: Counts, seconds: float) -> dict[str, Any] | None:
    """A turn's `dwdp`: shares and rates over `seconds`, means of all ranks; by_rank: how much each series grew on each.

    None where there are not the same ranks before and after, or one of them began to count anew.
    """
    ranks = sorted(after["forwards"])
    if ranks != sorted(before["forwards"]):
        return None
    by_rank = {name: [round(after[name][rank] - before[name][rank], 6) for rank in ranks] for name in SERIES}
    if any(each < 0 for values in by_rank.values() for each in values):
        return None
    waits = by_rank["exposed_wait_seconds"]
    return {
        "seconds": seconds,
        "ranks": len(ranks),
        "exposed_wait_share": statistics.fmean(waits) / seconds,
        "exposed_wait_share_worst": max(waits) / seconds,
        "pulled_bytes_per_s": statistics.fmean(by_rank["pulled_bytes"]) / seconds,
        "direct_bytes_per_s": statistics.fmean(by_rank["direct_bytes"]) / seconds,
        "by_rank": by_rank,
    }


def middle(turns: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a system's turns that have `dwdp`: medians of shares and rates, sums of what is counted; empty without any."""
    told = [turn["dwdp"] for turn in turns if turn.get("dwdp")]
    if not told:
        return {}
    names = [name for name in told[0] if name not in ("seconds", "ranks", "by_rank")]
    found = {name: statistics.median(each[name] for each in told) for name in names}
    counts = [name for name in SERIES if not name.endswith(("seconds", "bytes"))]
    sums = {name: round(sum(sum(each["by_rank"][name]) for each in told)) for name in counts}
    return {"turns": len(told), "ranks": min(each["ranks"] for each in told), **found, **sums}


def lines(summary: Mapping[str, Mapping[str, Mapping[str, Any]]], engines: Mapping[str, int]) -> list[str]:
    """One for each load and system of `summary` whose rows have `dwdp`; engines: of each system, how many it has."""
    return [
        f"{load}: {name}: {_line(row['dwdp'], engines.get(name))}"
        for load, systems in summary.items()
        for name, row in systems.items()
        if "dwdp" in row
    ]


def _line(mine: Mapping[str, Any], engines: int | None) -> str:
    # Not every engine's log tells of a KV cache: fewer than ranks say nothing.
    ranks = f"{mine['ranks']}{f' of {engines}' if (engines or 0) > mine['ranks'] else ''} ranks"
    parts = [
        f"exposed wait {_percent(mine['exposed_wait_share'])} of the time, mean of {ranks}, "
        f"{_percent(mine['exposed_wait_share_worst'])} on the worst",
        f"{mine['pulled_bytes_per_s'] / 1e9:.1f} GB/s pulled by a rank",
    ]
    if mine["direct_forwards"]:
        parts.append(f"{mine['direct_bytes_per_s'] / 1e9:.1f} GB/s read directly")
    if mine["travel_requests"]:
        parts.append(f"{mine['travel_late']} of {mine['travel_requests']} requests to owners late")
    ways = f"{mine['direct_forwards']} direct, {mine['travel_forwards']} travelled"
    return "; ".join([*parts, f"of {mine['forwards']} forwards {ways}"])


def _percent(share: float) -> str:
    """With two digits that mean something."""
    digits = 2 if share < 1e-5 else max(0, 1 - math.floor(math.log10(100 * share)))
    return f"{100 * share:.{digits}f} %"


class Counted:
    """Counters of one server around its turns.

    What a turn did is read before the server's next one, so that the second until it is published passes while other
    systems are measured.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._before: Counts | None = None
        self._open: tuple[dict[str, Any], float] | None = None
        self._idle_from = -math.inf
        self._seconds = 0.0

    def worked(self, seconds: float) -> None:
        """The server was under load for so long, until now."""
        self._idle_from, self._seconds = time.monotonic(), seconds

    def next(self) -> None:
        """Between turns: fill in the last one, and be ready for another."""
        time.sleep(max(0.0, self._idle_from + PUBLISHED_S - time.monotonic()))
        now = read(self._url)
        if self._open and self._before and now and (found := grown(self._before, now, self._open[1])):
            self._open[0]["dwdp"] = found
        self._before, self._open = now, None

    def keep(self, turn: dict[str, Any]) -> None:
        """This turn, the last that `worked` was told of, gets `dwdp` with the next call of `next`."""
        self._open = turn, self._seconds
