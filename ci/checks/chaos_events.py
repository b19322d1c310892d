"""What happens to the servers of the chaos check, at random from a seed; and what has to follow from it."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import ci.checks.chaos_places  # noqa: F401 - where examples are found

import behind_router  # isort: skip
from servers import Server, Servers  # isort: skip

from ci.checks.chaos_places import END_LIMIT_S, Group, Place

#: Between two events.
PAUSE_S = (2.0, 6.0)
#: A server is stopped so long: shorter than what a request may take in the router, and longer.
STOPPED_S = (2.0, 40.0)
#: Lines of its log that tell what was wrong with a server.
LOG_LINES = 40
#: What a server had is lost, or answered, within so many seconds of the end of it.
GRACE_S = 10.0
#: How often each event is drawn where it may happen; starts take long, and most of them should not be killed.
WEIGHTS = {"start": 8, "stop": 6, "kill": 3, "end": 1, "leave": 1, "kill a start": 0.1, "nothing": 8}


class Blow(NamedTuple):
    """A server loses requests, or keeps them waiting: seconds of time.monotonic()."""

    begin: float
    end: float


@dataclass
class Chaos:
    """Draws and carries out events; `wrong` is what should not have come of them.

    One rank at least is up and seen by the router, whatever happens to the others: its experts are all in memory, and
    requests have a server.
    """

    servers: Servers
    group: Group
    router: Server
    places: Sequence[Place]
    seed: int
    say: Callable[[str], None]
    counted: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    blows: list[Blow] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)
    table: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._next = 0.0
        self._began = time.monotonic()
        self._routed = {place.url for place in self.places if place.rank < self.group.ranks}

    def run(self, seconds: float) -> None:
        """Until the time is over; then all that were stopped go on, and all that start are waited for."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.follow()
            if time.monotonic() >= self._next:
                self.draw()
                self._next = time.monotonic() + self._rng.uniform(*PAUSE_S)
            time.sleep(0.3)
        for place in self.places:
            if place.state == "stopped":
                self._go_on(place)
        while any(place.state in ("starting", "ending") for place in self.places):
            self.follow()
            time.sleep(0.3)

    def follow(self) -> None:
        """See what became of each server."""
        for place in self.places:
            if place.state == "stopped" and time.monotonic() >= place.until:
                self._go_on(place)
            elif place.state == "starting":
                self._see_start(place)
            elif place.state == "ending":
                self._see_end(place)
            elif place.state == "up":
                place.measure()
                if place.server is not None and place.server.process.poll() is not None:
                    self._fail(place, f"ended by itself: {place.server.last_error()}")

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
        place = self._rng.choice(may[what])
        if what == "start":
            self._tell(place, "is started")
            place.start(self.servers, self.group)
        elif what == "stop":
            part, seconds = self._rng.choice(place.parts()), self._rng.uniform(*STOPPED_S)
            self._tell(place, f"SIGSTOP to {part}, for {seconds:.0f} s")
            self._blow(place, "stop", seconds + GRACE_S)
            place.signal(part, signal.SIGSTOP)
            place.become("stopped", seconds)
        elif what in ("kill", "kill a start"):
            # Of a server that is stopped, no process could notice that another one is gone.
            part = "all" if place.state == "stopped" else self._rng.choice(place.parts())
            self._tell(place, f"SIGKILL to {part}" + (", while it starts" if place.state == "starting" else ""))
            self._blow(place, what, GRACE_S)
            self._kill(place, part)
        else:
            if what == "leave":
                behind_router.remove(self.router, self._server(place))
                self._routed.discard(place.url)
            self._tell(place, "leaves" if what == "leave" else "SIGTERM")
            self._blow(place, what, END_LIMIT_S)
            self._server(place).process.send_signal(signal.SIGTERM)
            place.become("ending", END_LIMIT_S)

    def _possible(self) -> dict[str, list[Place]]:
        """Event -> places at which it may happen."""
        of = {
            state: [place for place in self.places if place.state == state] for state in ("up", "stopped", "starting")
        }
        seen = behind_router.healthy(self.router)
        reliable = [place for place in of["up"] if place.url in seen]
        spare = [place for place in of["up"] if any(other is not place for other in reliable)]
        down = [place for place in self.places if place.state == "down" and time.monotonic() >= place.until]
        may = {
            "start": down if len(of["starting"]) < 2 else [],
            "stop": spare,
            "kill": spare + (of["stopped"] if reliable else []),
            "end": spare,
            "leave": [place for place in spare if place.rank >= self.group.ranks],
            "kill a start": of["starting"] if reliable else [],
        }
        return {event: places for event, places in may.items() if places}

    def _kill(self, place: Place, part: str) -> None:
        server = self._server(place)
        if part == "all":
            self.servers.kill(server)
            self._gone(place)
        else:
            place.signal(part, signal.SIGKILL)
            place.become("ending", END_LIMIT_S)

    def _see_start(self, place: Place) -> None:
        server = self._server(place)
        if server.process.poll() is not None:
            self._fail(place, f"failed to start: {server.last_error()}")
        elif server.is_up():
            took, way = time.monotonic() - place.since, place.way()
            place.become("up")
            self.starts_s.append(took)
            self.counted[way] += 1
            self._tell(place, f"is up after {took:.0f} s, experts {way}")
            if way != "adopted":
                self.wrong.append(f"rank {place.rank} (life {place.lives}): experts {way}, which others have in memory")
            if place.url not in self._routed:
                behind_router.add(self.router, server)
                self._routed.add(place.url)
        elif time.monotonic() > place.until:
            self._fail(place, f"did not answer in time: {server.last_error()}")

    def _see_end(self, place: Place) -> None:
        if place.has_ended():
            self._gone(place)
        elif time.monotonic() > place.until:
            self._fail(place, "did not end in time")

    def _go_on(self, place: Place) -> None:
        self._tell(place, "SIGCONT")
        place.signal("all", signal.SIGCONT)
        place.become("up")

    def _fail(self, place: Place, why: str) -> None:
        self.wrong.append(f"rank {place.rank} (life {place.lives}) {why}")
        self._tell(place, why)
        for line in self._server(place).log.read_text(errors="replace").splitlines()[-LOG_LINES:]:
            self.say(f"      {line}")
        self._blow(place, "fault", GRACE_S)
        self.servers.kill(self._server(place))
        self._gone(place)

    def _gone(self, place: Place) -> None:
        self.close_life(place)
        if (server := place.server) in self.servers.started:
            self.servers.started.remove(self._server(place))
        assert server is not None
        server.process.wait()
        place.server = None
        place.become("down", self._rng.uniform(0, 10))

    def close_life(self, place: Place) -> None:
        """Compare the figures of a life that is over."""
        self.wrong += place.grown()
        self.table += place.figures()
        place.seen = {}

    def _blow(self, place: Place, what: str, lasts_s: float) -> None:
        self.counted[what] += 1
        self.blows.append(Blow(time.monotonic(), time.monotonic() + lasts_s))
        if place.state == "up":
            place.measure()

    def _server(self, place: Place) -> Server:
        assert place.server is not None
        return place.server

    def _tell(self, place: Place, what: str) -> None:
        self.say(f"{time.monotonic() - self._began:5.0f} s: rank {place.rank}: {what}")
