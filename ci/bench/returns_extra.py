"""The part of returns.py with --extra: an extra rank joins a group under load, serves a load of its own, and leaves."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
#: After SIGTERM, for the server; then for its children, some of which only tidy up.
_END_LIMIT_S: Final = 30.0
_TIDY_LIMIT_S: Final = 5.0


class Load(NamedTuple):
    """What the extra rank is asked, as Steady takes it."""

    pool: Sequence[Request]
    clients: int
    limit_s: float


@dataclass
class Visit:
    """An extra rank comes and goes.

    start: of its server. ranks: servers of the group's own ranks, which are under load. digests: of what kernels see.
    start_s: for its start; part_s: of being there, and of having left. marks: when parts began, of time.monotonic(), and
    their names. found: figures. wrong: what must not be. Those three have what there is, however far `run` comes.
    """

    servers: Servers
    start: Callable[[], Server]
    ranks: Sequence[Server]
    digests: Callable[[Sequence[Server]], list[str]]
    load: Load
    start_s: float
    part_s: float
    marks: list[tuple[float, str]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Start it, have it serve for `part_s` seconds, end it in order; returns `part_s` seconds after that.

        Raises NotUp where it is not up within `start_s` seconds, and OSError where a server does not say what it counts.
        """
        number, before = len(self.ranks), device_mib()
        began = self._mark(STARTS)
        self.found["rank"] = number
        say(f"rank {number}, an extra one: started")
        server = self.start()
        wait_up(server, began + self.start_s)
        there = self._mark(THERE)
        way = ([line for line in told(server) if "of loading" in line] or ["its log says not how"])[-1]
        self.found |= {"start_s": round(there - began, 1), "way": way}
        say(f"rank {number} answers after {there - began:.0f} s: {way}")
        self._await_peers(number, f"there is an extra rank, number {number}")
        self._ask(server)
        self.found["digest"] = self.digests([server])[0]
        left = self._mark(LEFT)
        self._leave(server)
        self.found |= {"stop_s": round(time.monotonic() - left, 1), "exit": server.process.returncode}
        say(f"rank {number} left, in {self.found['stop_s']:.1f} s")
        self._await_peers(number - 1, f"rank {number} has left")
        time.sleep(self.part_s)
        after = device_mib()
        used = more_in_use(before, after)
        self.wrong += [f"{line} are in use more than before rank {number} came" for line in used]
        self.found["device_mib"] = {
            "before": [round(each) for each in before],
            "after": [round(each) for each in after],
        }

    def _mark(self, name: str) -> float:
        self.marks.append((time.monotonic(), name))
        return self.marks[-1][0]

    def _ask(self, server: Server) -> None:
        asked_from = time.monotonic()
        with Steady(Target(server.url, {}), self.load.pool, self.load.clients, self.load.limit_s) as steady:
            time.sleep(self.part_s)
            asked_until = time.monotonic()
        own = part(steady.asked, asked_from, asked_until)
        self.found["part"] = own._asdict()
        self.wrong += [f"a request failed at rank {len(self.ranks)}: {trouble}" for trouble in steady.troubles()]
        if not own.answers:
            self.wrong.append(f"rank {len(self.ranks)} answered nothing")

    def _leave(self, server: Server) -> None:
        """SIGTERM; what is still there after its time is told before it is killed."""
        group = server.process.pid
        server.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(_END_LIMIT_S)
        if server.process.poll() is None:
            self.wrong.append(f"rank {len(self.ranks)} did not end within {_END_LIMIT_S:.0f} s after SIGTERM")
        else:
            deadline = time.monotonic() + _TIDY_LIMIT_S
            while (stay := positions.members(group)) and time.monotonic() < deadline:
                time.sleep(0.05)
            self.wrong += [f"rank {len(self.ranks)} left process {pid}" for pid in stay]
            if code := server.process.returncode:
                self.wrong.append(f"rank {len(self.ranks)} ended with {code} after SIGTERM, not with 0")
        self.servers.stop(server)

    def _await_peers(self, peers: int, why: str) -> None:
        """Return once all ranks see so many, or had time to look."""
        deadline = time.monotonic() + _NOTICE_LIMIT_S
        while True:
            seen = [series(server, "dwdp:peers_alive") for server in self.ranks]
            if all(alive == peers for alive in seen):
                return
            if time.monotonic() > deadline:
                blind = [(rank, alive) for rank, alive in enumerate(seen) if alive != peers]
                self.wrong += [f"{why}, but rank {rank} sees {alive:.0f} peers, not {peers}" for rank, alive in blind]
                return
            time.sleep(0.1)


def table(found: dict[str, Any]) -> list[str]:
    """Lines: what the extra rank did, which the others' parts do not tell; as far as it came."""
    if "part" not in found or "stop_s" not in found:
        return [f"rank {found['rank']}, an extra one, did not come and go"]
    own = found["part"]
    return [
        f"rank {found['rank']}, an extra one, answered {found['start_s']} s after its start: {found['way']}",
        f"  {own['answers']} answers in {own['seconds']} s, {own['tokens_per_s']:.0f} tokens/s, {own['failed']} failed, "
        f"slowest {own['slowest_s']:.2f} s; it left in {found['stop_s']} s",
    ]
