"""Streams, events, captures and graphs of simulated CUDA: what is given to a stream, and one piece of it at a time."""

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_dwdp.transport.cuda_device import CudaDevice, CudaError

Piece = Callable[[], None]


@dataclass(eq=False)
class Point:
    done: bool = False
    time: float = 0.0


@dataclass(eq=False)
class Node:
    pieces: list[Piece]
    seconds: float
    after: frozenset["Node"] = frozenset()


@dataclass(eq=False)
class Capture:
    restricted: bool  # a capture in global mode, as torch makes them
    nodes: list[Node] = field(default_factory=list)
    ended: bool = False


@dataclass(eq=False)
class Event:
    timing: bool
    point: Point | None = None
    capture: Capture | None = None
    nodes: frozenset[Node] = frozenset()


class Run:
    """A graph, or a single copy or kernel as a graph of one node, under way."""

    def __init__(self, nodes: list[Node], issued: float) -> None:
        self.left = {node: 0 for node in nodes}
        self.ended: dict[Node, float] = {}
        self.issued = issued

    def step(self, stream: "Stream", rng: random.Random) -> bool:
        begin = max(stream.time, self.issued)
        if not self.left:  # a graph without nodes
            return True
        node = rng.choice([node for node in self.left if all(before in self.ended for before in node.after)])
        if self.left[node] < len(node.pieces):
            node.pieces[self.left[node]]()
            self.left[node] += 1
        if self.left[node] == len(node.pieces):
            del self.left[node]
            self.ended[node] = max([begin, *(self.ended[before] for before in node.after)]) + node.seconds
        if self.left:
            return False
        stream.time = max(self.ended.values())
        return True


class Wait(NamedTuple):
    point: Point


class Record(NamedTuple):
    point: Point
    issued: float


class Stream:
    def __init__(self) -> None:
        self.work: deque[Run | Wait | Record] = deque()
        self.time = 0.0
        self.capture: Capture | None = None
        self.tail: frozenset[Node] = frozenset()

    def can_go(self) -> bool:
        return bool(self.work) and not (isinstance(self.work[0], Wait) and not self.work[0].point.done)

    def step(self, rng: random.Random) -> None:
        head = self.work[0]
        if isinstance(head, Run):
            if not head.step(self, rng):
                return
        elif isinstance(head, Wait):
            self.time = max(self.time, head.point.time)
        else:
            self.time = max(self.time, head.issued)
            head.point.done, head.point.time = True, self.time
        self.work.popleft()


class Scheduler:
    """Steps the streams of several processes, in an order that a seed chooses."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = 0.0  # of the host
        self.frozen = False
        self.processes: list[FakeStreams] = []
        self.orphans: list[Stream] = []  # destroyed with work on them

    def wander(self, most: int) -> None:
        for _ in range(self.rng.randrange(most + 1)):
            self._step()

    def drain(self) -> None:
        while self._step():
            pass
        assert not any(stream.work for stream in self._streams()), "deadlock"

    def _streams(self) -> list[Stream]:
        return [stream for process in self.processes for stream in process.streams.values()] + self.orphans

    def _step(self) -> bool:
        able = [stream for stream in self._streams() if stream.can_go()]
        if self.frozen or not able:
            return False
        self.rng.choice(able).step(self.rng)
        return True


class FakeStreams(CudaDevice):
    """One process's streams, events and graphs. `current` is torch's current stream."""

    def __init__(self, machine: Scheduler) -> None:
        self.machine = machine
        self.calls: Counter[str] = Counter()
        self.fail: dict[str, str] = {}  # call -> code, for its next use
        self.streams: dict[int, Stream] = {0: Stream()}
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, list[Node]] = {}
        self.current = 0
        self._ids = iter(range(1, 1 << 40))

    def kernel(self, pieces: list[Piece], seconds: float = 0.0) -> None:
        """Compute: one kernel on the current stream."""
        self._give(self.current, pieces, seconds)

    def delay(self, stream: int, seconds: float) -> None:
        self._give(stream, [lambda: None], seconds)

    def begin_torch_capture(self) -> None:
        """Compute is captured from now on, as torch.cuda.graph does it."""
        self.current = self.make_stream()
        self.streams[self.current].capture = Capture(restricted=True)

    def end_torch_capture(self) -> int:
        stream, self.current = self.current, 0
        graph = self.end_capture(stream)
        self.destroy_stream(stream)
        return graph

    # CudaDevice

    def make_stream(self) -> int:
        self._call("make_stream")
        made = next(self._ids)
        self.streams[made] = Stream()
        return made

    def destroy_stream(self, stream: int) -> None:
        self._call("destroy_stream")
        gone = self.streams.pop(stream)
        if gone.work:  # it still ends
            self.machine.orphans.append(gone)

    def compute_stream(self) -> int:
        return self.current

    def make_event(self, timing: bool) -> int:
        self._call("make_event")
        made = next(self._ids)
        self.events[made] = Event(timing)
        return made

    def destroy_event(self, event: int) -> None:
        self._call("destroy_event")
        del self.events[event]

    def record(self, event: int, stream: int) -> None:
        self._call("record")
        mine, on = self.events[event], self.streams[stream]
        mine.capture, mine.nodes, mine.point = on.capture, on.tail, None
        if on.capture is None:
            mine.point = Point()
            on.work.append(Record(mine.point, self.machine.clock))

    def wait_event(self, stream: int, event: int) -> None:
        self._call("wait_event")
        mine, on = self.events[event], self.streams[stream]
        if mine.capture is None:
            self._refuse(on.capture is not None, "wait_event", "cudaErrorStreamCaptureIsolation")
            if mine.point is not None:
                on.work.append(Wait(mine.point))
            return
        self._refuse(mine.capture.ended, "wait_event", "cudaErrorCapturedEvent")
        self._refuse(on.capture not in (None, mine.capture), "wait_event", "cudaErrorStreamCaptureMerge")
        on.capture, on.tail = mine.capture, on.tail | mine.nodes

    def query(self, event: int) -> bool:
        self._call("query", forbidden_in_capture=True)
        mine = self.events[event]
        self._refuse(mine.capture is not None, "query", "cudaErrorCapturedEvent")
        self.machine.wander(2)
        return mine.point is None or mine.point.done

    def elapsed_s(self, begin: int, end: int) -> float:
        first, last = self.events[begin], self.events[end]
        assert first.timing and last.timing and first.point and last.point and first.point.done and last.point.done
        return last.point.time - first.point.time

    def capturing(self, stream: int) -> bool:
        return self.streams[stream].capture is not None

    def begin_capture(self, stream: int) -> None:
        self._call("begin_capture")
        self._refuse(self.streams[stream].capture is not None, "begin_capture", "cudaErrorIllegalState")
        self.streams[stream].capture = Capture(restricted=False)

    def end_capture(self, stream: int) -> int:
        self._call("end_capture")
        capture = self.streams[stream].capture
        assert capture is not None
        reached, queue = set(self.streams[stream].tail), list(self.streams[stream].tail)
        while queue:
            new = queue.pop().after - reached
            reached |= new
            queue += new
        capture.ended = True
        tails: set[Node] = set()
        for other in self.streams.values():
            if other.capture is capture:
                tails |= other.tail
                other.capture, other.tail = None, frozenset()
        self._refuse(not tails <= reached, "end_capture", "cudaErrorStreamCaptureUnjoined")
        made = next(self._ids)
        self.graphs[made] = capture.nodes
        return made

    def instantiate(self, template: int, stream: int) -> int:
        return template

    def launch(self, graph: int, stream: int) -> None:
        self._call("launch")
        assert self.streams[stream].capture is None, "a graph was launched into a capture"
        self.streams[stream].work.append(Run(self.graphs[graph], self.machine.clock))

    def destroy_graph(self, graph: int) -> None:
        self._call("destroy_graph")
        del self.graphs[graph]

    def _give(self, stream: int, pieces: list[Piece], seconds: float) -> None:
        on = self.streams[stream]
        if on.capture is None:
            on.work.append(Run([Node(pieces, seconds)], self.machine.clock))
            return
        node = Node(pieces, seconds, on.tail)
        on.capture.nodes.append(node)
        on.tail = frozenset([node])

    def _call(self, name: str, forbidden_in_capture: bool = False) -> None:
        self.calls[name] += 1
        if name in self.fail:
            raise CudaError(name, self.fail.pop(name), "made to fail")
        restricted = any(s.capture is not None and s.capture.restricted for s in self.streams.values())
        self._refuse(forbidden_in_capture and restricted, name, "cudaErrorStreamCaptureUnsafe")

    def _refuse(self, wrong: bool, call: str, code: str) -> None:
        if wrong:
            raise CudaError(call, code, "made up")
