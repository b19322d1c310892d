"""A copy engine without threads or clocks: a scheduler decides, step by step, which of two streams goes on.

The compute stream reads slots, the copy stream runs programs; each step moves or reads a few bytes of one simulated
memory, so that every interleaving of the two can be forced, and repeated from a seed.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.prefetcher import Prefetcher
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.prefetch.trace import TracedPrefetcher, TraceEvent
from vllm_dwdp.transport.base import Copy, CopyEngine, Event, Exposed, InCapture, Program, Span

Step = Callable[[], bool]  # one step of a stream; False where it has to wait for the other stream

LAYER_BYTES = 8
COPY_BYTES = 2  # so that a layer takes four steps to copy
CLOCK_S = 1e-9  # one step of copying, when time is simulated


class FakeEvent(Event):
    def __init__(self, done: bool = False) -> None:
        self.done = done
        self.failed: str | None = None
        self.begin: int | None = None
        self.end: int | None = None

    def span(self) -> Span | None:
        return None if self.begin is None or self.end is None else Span(self.begin, self.end)


@dataclass(frozen=True)
class FakeProgram(Program):
    moves: tuple[Copy, ...]


class FakeEngine(CopyEngine):
    """queued: compute runs behind the host, as on a GPU, and `wait` and `record` are entries of its stream. Otherwise
    compute is what the caller does, as on a CPU, and `wait` lets the copy stream run until the event is complete."""

    def __init__(self, memory: bytearray, rng: random.Random, queued: bool) -> None:
        self.memory = memory
        self.rng = rng
        self.queued = queued
        self.copy_bias = rng.choice([0.05, 0.5, 0.95])  # of the steps taken: slow copies ... slow readers
        self.ignore_after = False
        self.fail_next = False
        self.stuck = False
        self.clock = 0
        self.exposed = Exposed(0, 0.0)
        self.compute: deque[Step] = deque()
        self.copies: deque[Step] = deque()

    def bind(self, pulls: Sequence[Copy], local: Sequence[Copy] = ()) -> FakeProgram:
        moves = (*pulls, *local)
        return FakeProgram(sum(c.nbytes for c in pulls), sum(c.nbytes for c in local), len(moves), moves)

    def submit(self, program: Program, after: Event | None = None) -> FakeEvent:
        assert isinstance(program, FakeProgram) and (after is None or isinstance(after, FakeEvent))
        event = FakeEvent()
        if after is not None and not self.ignore_after:
            self.copies.append(lambda: after.done)
        if self.fail_next:
            self.fail_next = False
            event.failed = "made to fail"
        else:
            self.copies.extend(partial(self._move, event, move) for move in program.moves)
        self.copies.append(partial(self._end, event))
        return event

    def record(self) -> FakeEvent:
        event = FakeEvent(done=not self.queued)
        if self.queued:
            self.compute.append(partial(self._end, event))
        return event

    def wait(self, event: Event, timeout_s: float) -> None:
        assert isinstance(event, FakeEvent)
        if self.capturing():
            raise InCapture("made to be")
        if self.queued:
            self.compute.append(lambda: event.done)
            return
        begin = self.clock
        self.finish(event, timeout_s)
        if ticks := self.clock - begin:
            self.exposed = Exposed(self.exposed.waits + 1, self.exposed.seconds + ticks * CLOCK_S)

    def take_exposed(self) -> Exposed:
        taken, self.exposed = self.exposed, Exposed(0, 0.0)
        return taken

    def finish(self, event: Event, timeout_s: float) -> None:
        assert isinstance(event, FakeEvent)
        if self.queued:
            self.compute.append(lambda: event.done)
            return
        while not event.done:
            if self.stuck or not self.step_copies():
                raise DwdpTimeout("the copy stream stands still")
        if event.failed:
            raise DwdpError(event.failed)

    def ready(self, event: Event) -> bool:
        assert isinstance(event, FakeEvent)
        return event.done

    def close(self, timeout_s: float) -> None:
        self.drain()

    def step_copies(self) -> bool:
        """One tick of the copy stream."""
        self.clock += 1
        return self._step(self.copies)

    def step_compute(self) -> bool:
        """One step of compute."""
        return self._step(self.compute)

    def wander(self, most: int) -> None:
        """Up to `most` steps of either stream, as the seed has it."""
        for _ in range(self.rng.randrange(most + 1)):
            if self.rng.random() < self.copy_bias:
                self.step_copies()
            else:
                self.step_compute()

    def drain(self) -> None:
        """Run both streams to their ends; a deadlock is an AssertionError."""
        while self.compute or self.copies:
            first, second = self.rng.sample([self.compute, self.copies], 2)
            assert self._step(first) or self._step(second), "deadlock"

    def _step(self, stream: deque[Step]) -> bool:
        if not stream or not stream[0]():
            return False
        stream.popleft()
        return True

    def _move(self, event: FakeEvent, move: Copy) -> bool:
        if event.begin is None:
            event.begin = self.clock - 1
        self.memory[move.dst : move.dst + move.nbytes] = self.memory[move.src : move.src + move.nbytes]
        return True

    def _end(self, event: FakeEvent) -> bool:
        event.done, event.end = True, self.clock
        return True


class World:
    """The simulated memory of one rank: its slots first, then every layer's experts, as peers keep them."""

    def __init__(self, num_layers: int, used_slots: int, seed: int, queued: bool = False) -> None:
        self.slots = used_slots
        self.layers = [bytes((37 * layer + i) % 251 + 1 for i in range(LAYER_BYTES)) for layer in range(num_layers)]
        self.memory = bytearray(used_slots * LAYER_BYTES) + b"".join(self.layers)
        self.rng = random.Random(seed)
        self.engine = FakeEngine(self.memory, self.rng, queued)
        self.wrong = 0
        self.compared = 0

    def program(self, layer: int, slot: int) -> FakeProgram:
        src, dst = (self.slots + layer) * LAYER_BYTES, slot * LAYER_BYTES
        steps = range(0, LAYER_BYTES, COPY_BYTES)
        return self.engine.bind([Copy(dst + at, src + at, COPY_BYTES) for at in steps])

    def use(self, layer: int, slot: int) -> None:
        """The expert compute of `layer`: reads its slot twice, in pieces, and compares every byte."""
        for at in (*range(0, LAYER_BYTES, COPY_BYTES), *range(0, LAYER_BYTES, COPY_BYTES)):
            read = partial(self._compare, layer, slot, at)
            if self.engine.queued:
                self.engine.compute.append(read)
            else:
                read()
                self.engine.wander(2)

    def _compare(self, layer: int, slot: int, at: int) -> bool:
        begin = slot * LAYER_BYTES + at
        self.compared += 1
        self.wrong += self.memory[begin : begin + COPY_BYTES] != self.layers[layer][at : at + COPY_BYTES]
        return True


def make_prefetcher(world: World, ring: Ring, trace: list[TraceEvent] | None = None) -> Prefetcher:
    """The prefetcher of a world; with a trace, one that writes it in simulated time."""
    programs = [world.program(layer, ring.slot_of(layer)) for layer in range(ring.num_layers)]
    if trace is None:
        return Prefetcher(ring, world.engine, programs, CounterPage.create(), 1.0)
    return TracedPrefetcher(
        ring, world.engine, programs, CounterPage.create(), 1.0, trace=trace, clock=lambda: world.engine.clock
    )
