"""What happens to the servers of the chaos check, at random from a seed; and what has to follow from it."""

from __future__ import annotations

import math
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import ci.checks.chaos_positions  # noqa: F401 - where examples are found

import behind_router  # isort: skip
from servers import Server, Servers  # isort: skip

from ci.checks.chaos_positions import END_LIMIT_S, Group, Position

#: Between two events.
PAUSE_S = (2.0, 6.0)
#: A server is stopped so long: shorter than what a request may take in the router, and longer.
STOPPED_S = (2.0, 40.0)
#: Lines of its log that tell what was wrong with a server.
LOG_LINES = 40
#: A client knows that its stream is lost within so many seconds of the end of a server.
GRACE_S = 5.0
#: How often each event is drawn where it may happen; starts take long, and most of them should not be killed.
WEIGHTS = {"start": 8, "stop": 6, "kill": 3, "end": 1, "leave": 1, "kill a start": 0.1, "nothing": 8}


@dataclass
class Disturbance:
    """A server that ends or is stopped, at the position `rank`; seconds of time.monotonic().

    Attributes:
        begin: when it got the signal.
        end: when it had ended, or went on; infinite until then.
        stopped: it is only stopped, by SIGSTOP.
    """

    begin: float
    rank: int
    stopped: bool = False
    end: float = math.inf


@dataclass
class Chaos:
    """Draws and carries out events; `wrong` is what should not have come of them.

    One rank at least is up and seen by the router, whatever happens to the others: its experts are all in memory, and
    requests have a server.
    """

    servers: Servers
    group: Group
    router: Server
    positions: Sequence[Position]
    seed: int
    say: Callable[[str], None]
    counted: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    disturbances: list[Disturbance] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)
    table: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._next = 0.0
        self._began = time.monotonic()
        self._routed = {position.url for position in self.positions if position.rank < self.group.ranks}

    def run(self, seconds: float) -> None:
        """Until the time is over; then all that were stopped go on, and all that start are waited for."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.follow()
            if time.monotonic() >= self._next:
                self.draw()
                self._next = time.monotonic() + self._rng.uniform(*PAUSE_S)
            time.sleep(0.3)
        for position in self.positions:
            if position.state == "stopped":
                self._go_on(position)
        while any(position.state in ("starting", "ending") for position in self.positions):
            self.follow()
            time.sleep(0.3)

    def follow(self) -> None:
        """See what became of each server."""
        for position in self.positions:
            if position.state == "stopped" and time.monotonic() >= position.until:
                self._go_on(position)
            elif position.state == "starting":
                self._see_start(position)
            elif position.state == "ending":
                self._see_end(position)
            elif position.state == "up":
                position.measure()
                if position.server is not None and position.server.process.poll() is not None:
                    self._fail(position, f"ended by itself: {position.server.last_error()}")

    def draw(self) -> None:
        """One event that may happen now."""
        try:
            may = self._possible()
        except OSError as error:
            self.say(f"      the router does not answer: {error}")
            return
        what = self._rng.choices(["nothing", *may], [WEIGHTS[event] for event in ("nothing", *may)])[0]
        if what == "nothing":
            return
        position = self._rng.choice(may[what])
        if what == "start":
            self._tell(position, "is started")
            position.start(self.servers, self.group)
        elif what == "stop":
            part, seconds = self._rng.choice(position.parts()), self._rng.uniform(*STOPPED_S)
            self._tell(position, f"SIGSTOP to {part}, for {seconds:.0f} s")
            self._disturb(position, "stop")
            position.signal(part, signal.SIGSTOP)
            position.become("stopped", seconds)
        elif what in ("kill", "kill a start"):
            # Of a server that is stopped, no process could notice that another one is gone.
            part = "all" if position.state == "stopped" else self._rng.choice(position.parts())
            self._tell(position, f"SIGKILL to {part}" + (", while it starts" if position.state == "starting" else ""))
            self._disturb(position, what)
            self._kill(position, part)
        else:
            if what == "leave" and self._by_router(behind_router.remove, position):
                self._routed.discard(position.url)
            self._tell(position, "leaves" if what == "leave" else "SIGTERM")
            self._disturb(position, what)
            self._server(position).process.send_signal(signal.SIGTERM)
            position.become("ending", END_LIMIT_S)

    def _possible(self) -> dict[str, list[Position]]:
        """Event -> positions at which it may happen."""
        of = {
            state: [position for position in self.positions if position.state == state]
            for state in ("up", "stopped", "starting")
        }
        seen = behind_router.healthy(self.router)
        reliable = [position for position in of["up"] if position.url in seen]
        spare = [position for position in of["up"] if any(other is not position for other in reliable)]
        down = [
            position for position in self.positions if position.state == "down" and time.monotonic() >= position.until
        ]
        may = {
            "start": down if len(of["starting"]) < 2 else [],
            "stop": spare,
            "kill": spare + (of["stopped"] if reliable else []),
            "end": spare,
            "leave": [position for position in spare if position.rank >= self.group.ranks],
            "kill a start": of["starting"] if reliable else [],
        }
        return {event: positions for event, positions in may.items() if positions}

    def _kill(self, position: Position, part: str) -> None:
        server = self._server(position)
        if part == "all":
            self.servers.kill(server)
            self._gone(position)
        else:
            position.signal(part, signal.SIGKILL)
            position.become("ending", END_LIMIT_S)

    def _see_start(self, position: Position) -> None:
        server = self._server(position)
        if server.process.poll() is not None:
            self._fail(position, f"failed to start: {server.last_error()}")
        elif server.is_up():
            took, way = time.monotonic() - position.since, position.way()
            position.become("up")
            self.starts_s.append(took)
            self.counted[way] += 1
            self._tell(position, f"is up after {took:.0f} s, experts {way}")
            if way != "adopted":
                self.wrong.append(
                    f"rank {position.rank} (life {position.lives}): experts {way}, which others have in memory"
                )
            if position.url not in self._routed and self._by_router(behind_router.add, position):
                self._routed.add(position.url)
        elif time.monotonic() > position.until:
            self._fail(position, f"did not answer in time: {server.last_error()}")

    def _see_end(self, position: Position) -> None:
        if position.has_ended():
            self._gone(position)
        elif time.monotonic() > position.until:
            self._fail(position, "did not end in time")

    def _go_on(self, position: Position) -> None:
        self._tell(position, "SIGCONT")
        position.signal("all", signal.SIGCONT)
        position.become("up")
        self._is_over(position)

    def _fail(self, position: Position, why: str) -> None:
        self.wrong.append(f"rank {position.rank} (life {position.lives}) {why}")
        self._tell(position, why)
        for line in self._server(position).log.read_text(errors="replace").splitlines()[-LOG_LINES:]:
            self.say(f"      {line}")
        self._disturb(position, "fault")
        self.servers.kill(self._server(position))
        self._gone(position)

    def _gone(self, position: Position) -> None:
        self._is_over(position)
        self.close_life(position)
        if (server := position.server) in self.servers.started:
            self.servers.started.remove(self._server(position))
        assert server is not None
        server.process.wait()
        position.server = None
        position.become("down", self._rng.uniform(0, 10))

    def close_life(self, position: Position) -> None:
        """Compare the figures of a life that is over."""
        self.wrong += position.grown()
        self.table += position.figures()
        position.seen = {}

    def _by_router(self, change: Callable[[Server, Server], None], position: Position) -> bool:
        """Whether the router added or removed a server; where not, that is wrong."""
        try:
            change(self.router, self._server(position))
        except OSError as error:
            self.wrong.append(f"the router did not {change.__name__} rank {position.rank}: {error}")
            return False
        return True

    def _disturb(self, position: Position, what: str) -> None:
        self.counted[what] += 1
        self.disturbances.append(Disturbance(time.monotonic(), position.rank, stopped=what == "stop"))
        if position.state == "up":
            position.measure()

    def _is_over(self, position: Position) -> None:
        for each in self.disturbances:
            if each.rank == position.rank:
                each.end = min(each.end, time.monotonic())

    def _server(self, position: Position) -> Server:
        assert position.server is not None
        return position.server

    def _tell(self, position: Position, what: str) -> None:
        self.say(f"{time.monotonic() - self._began:5.0f} s: rank {position.rank}: {what}")
