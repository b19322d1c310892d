"""The part of returns.py with --extra: an extra rank joins a group under load, serves a load of its own, and leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import ci.checks.chaos_positions as positions  # also where examples are found
from ci.bench.load import Request
from ci.bench.returns_servers import device_mib, more_in_use, say, told, wait_up
from ci.bench.servers import Target
from ci.bench.steady import Steady, part

from servers import Server, Servers, series  # isort: skip

STARTS, THERE, LEFT = "an extra rank starts", "an extra rank is there", "it has left"
#: A rank looks at its peers every few seconds at most.
_NOTICE_LIMIT_S: Final = 20.0


class Load(NamedTuple):
    """What the extra rank is asked, as Steady takes it."""

    pool: Sequence[Request]
    clients: int
    limit_s: float


class Visit(NamedTuple):
    """When the parts began, of time.monotonic(), what was found, and what must not be."""

    starts: float
    there: float
    left: float
    found: dict[str, Any]
    wrong: list[str]


def visit(
    servers: Servers,
    start: Callable[[], Server],
    ranks: Sequence[Server],
    digests: Callable[[Sequence[Server]], list[str]],
    load: Load,
    start_s: float,
    part_s: float,
) -> Visit:
    """Start an extra rank, have it serve for `part_s` seconds, end it in order; returns `part_s` seconds after that.

    start: of its server. ranks: servers of the group's own ranks, which are under load. digests: of what kernels see.
    Raises NotUp where it is not up within `start_s` seconds.
    """
    number, wrong = len(ranks), list[str]()
    before, began = device_mib(), time.monotonic()
    say(f"rank {number}, an extra one: started")
    server = start()
    wait_up(server, began + start_s)
    there = time.monotonic()
    way = ([line for line in told(server) if "of loading" in line] or ["its log says not how"])[-1]
    say(f"rank {number} answers after {there - began:.0f} s: {way}")
    wrong += _await_peers(ranks, number, f"there is an extra rank, number {number}")
    asked_from = time.monotonic()
    with Steady(Target(server.url, {}), load.pool, load.clients, load.limit_s) as steady:
        time.sleep(part_s)
        asked_until = time.monotonic()
    own = part(steady.asked, asked_from, asked_until)
    wrong += [f"a request failed at rank {number}: {trouble}" for trouble in steady.troubles()]
    if not own.answers:
        wrong.append(f"rank {number} answered nothing")
    digest = digests([server])[0]
    left = time.monotonic()
    servers.stop(server)
    stopped_s = time.monotonic() - left
    say(f"rank {number} left, in {stopped_s:.1f} s")
    wrong += _await_peers(ranks, number - 1, f"rank {number} has left")
    time.sleep(part_s)
    wrong += [f"rank {number} left process {pid}" for pid in positions.members(server.process.pid)]
    after = device_mib()
    wrong += [f"{line} are in use more than before rank {number} came" for line in more_in_use(before, after)]
    found = {"rank": number, "start_s": round(there - began, 1), "way": way, "digest": digest, "part": own._asdict()}
    found |= {"stop_s": round(stopped_s, 1), "exit": server.process.returncode}
    found["device_mib"] = {"before": [round(each) for each in before], "after": [round(each) for each in after]}
    return Visit(began, there, left, found, wrong)


def _await_peers(ranks: Sequence[Server], peers: int, why: str) -> list[str]:
    """What is wrong with how many peers the ranks see, once they had time to look."""
    deadline = time.monotonic() + _NOTICE_LIMIT_S
    while True:
        seen = [series(server, "dwdp:peers_alive") for server in ranks]
        if all(alive == peers for alive in seen):
            return []
        if time.monotonic() > deadline:
            lines = enumerate(seen)
            return [
                f"{why}, but rank {rank} sees {alive:.0f} peers, not {peers}" for rank, alive in lines if alive != peers
            ]
        time.sleep(0.1)


def table(found: dict[str, Any]) -> list[str]:
    """Lines: what the extra rank did, which the others' parts do not tell."""
    own = found["part"]
    return [
        f"rank {found['rank']}, an extra one, answered {found['start_s']} s after its start: {found['way']}",
        f"  {own['answers']} answers in {own['seconds']} s, {own['tokens_per_s']:.0f} tokens/s, {own['failed']} failed, "
        f"slowest {own['slowest_s']:.2f} s; it left in {found['stop_s']} s",
    ]
