"""The prefetcher against forced races: whatever the order of events, what is read is what was asked for."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fake_engine import LAYER_BYTES, World
from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.prefetcher import Prefetcher
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.prefetch.trace import TracedPrefetcher, TraceEvent
from vllm_dwdp.transport.base import Event

COMBINATIONS = list(itertools.product(range(1, 10), range(2, 6)))  # layers, slots
COPY_TICKS = LAYER_BYTES // 2 + 1  # of a layer, with the step that ends the program


class Subject(Protocol):
    def start(self) -> None: ...
    def acquire(self, layer: int) -> None: ...
    def release(self, layer: int) -> None: ...
    def slot_of(self, layer: int) -> int: ...


Make = Callable[[World, Ring], Subject]


def make(world: World, ring: Ring, trace: list[TraceEvent] | None = None) -> Prefetcher:
    programs = [world.program(layer, ring.slot_of(layer)) for layer in range(ring.num_layers)]
    if trace is None:
        return Prefetcher(ring, world.engine, programs, CounterPage.create(), 1.0)
    return TracedPrefetcher(
        ring, world.engine, programs, CounterPage.create(), 1.0, trace=trace, clock=lambda: world.engine.clock
    )


class NaivePrefetcher:
    """What not to do: slot i % n, and release(i) starts layer (i + n) % L."""

    def __init__(self, world: World, ring: Ring) -> None:
        self.ring, self.engine = ring, world.engine
        self.programs = [world.program(layer, ring.slot_of(layer)) for layer in range(ring.num_layers)]
        self.copied: dict[int, Event] = {}

    def start(self) -> None:
        for layer in range(self.ring.used_slots):
            self.copied[layer] = self.engine.submit(self.programs[layer])

    def acquire(self, layer: int) -> None:
        self.engine.wait(self.copied[layer], 1.0)

    def release(self, layer: int) -> None:
        following = (layer + self.ring.used_slots) % self.ring.num_layers
        self.copied[following] = self.engine.submit(self.programs[following], self.engine.record())

    def slot_of(self, layer: int) -> int:
        return self.ring.slot_of(layer)


def in_order(rng: random.Random, num_layers: int) -> Iterator[tuple[int, bool]]:
    """(layer, released) for ever: whole forwards."""
    while True:
        for layer in range(num_layers):
            yield layer, True


def disorderly(rng: random.Random, num_layers: int) -> Iterator[tuple[int, bool]]:
    """Forwards, some of them aborted in a layer's compute or between layers, stray layers in any order, and
    forwards that skip and repeat layers."""
    while True:
        kind = rng.choice(["forward", "abort", "stray", "skips and repeats"])
        if kind == "skips and repeats":
            for layer in range(num_layers):
                for _ in range(rng.choice((0, 1, 1, 2))):
                    yield layer, True
            continue
        if kind == "stray":
            yield rng.randrange(num_layers), rng.random() < 0.8
            continue
        last = num_layers if kind == "forward" else rng.randrange(num_layers)
        for layer in range(last):
            yield layer, True
        if kind == "abort":
            yield last, rng.random() < 0.5


Uses = Callable[[random.Random, int], Iterator[tuple[int, bool]]]


def play(world: World, ring: Ring, subject: Subject, uses: Uses, rounds: int) -> None:
    """`rounds` acquires, with the streams stepped at random in between; then everything runs to its end."""
    subject.start()
    for layer, released in itertools.islice(uses(world.rng, ring.num_layers), rounds):
        world.engine.wander(6)
        subject.acquire(layer)
        if world.rng.random() < 0.1:
            subject.acquire(layer)
        world.use(layer, subject.slot_of(layer))
        world.engine.wander(6)
        if released:
            subject.release(layer)
    world.engine.drain()


@pytest.mark.parametrize("queued", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("uses", [in_order, disorderly])
def test_every_byte_is_right_in_every_combination(uses: Uses, queued: bool) -> None:
    rounds = 0
    for seed, (num_layers, num_slots) in enumerate(COMBINATIONS * 3):
        ring = Ring(num_layers, num_slots)
        world = World(num_layers, ring.used_slots, seed, queued)
        play(world, ring, make(world, ring), uses, 100)
        assert world.wrong == 0, f"{num_layers} layers, {num_slots} slots, seed {seed}"
        rounds += 100
        assert world.compared >= 100 * LAYER_BYTES
    assert rounds >= 10_000


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 2**32), st.booleans(), st.booleans())
def test_every_byte_is_right_for_any_seed(layers: int, slots: int, seed: int, queued: bool, order: bool) -> None:
    ring = Ring(layers, slots)
    world = World(layers, ring.used_slots, seed, queued)
    play(world, ring, make(world, ring), in_order if order else disorderly, 60)
    assert world.wrong == 0


@pytest.mark.parametrize("queued", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("num_layers", "num_slots"), COMBINATIONS)
def test_the_harness_catches_the_naive_ring(num_layers: int, num_slots: int, queued: bool) -> None:
    ring = Ring(num_layers, num_slots)
    world = World(num_layers, ring.used_slots, 0, queued)
    play(world, ring, NaivePrefetcher(world, ring), in_order, 100)
    assert (world.wrong > 0) == (num_layers > num_slots and num_layers % num_slots != 0)


def test_the_harness_catches_copies_that_do_not_wait_for_the_release() -> None:
    # Known mistake of others: the copy into a slot waits on another slot's event, or on none.
    ring = Ring(6, 2)
    world = World(6, 2, 0, queued=True)
    world.engine.ignore_after = True
    play(world, ring, make(world, ring), in_order, 100)
    assert world.wrong > 0


def test_the_harness_catches_compute_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(6, 2)
    world = World(6, 2, 0)
    monkeypatch.setattr(world.engine, "wait", lambda event, timeout_s: None)
    play(world, ring, make(world, ring), in_order, 100)
    assert world.wrong > 0


def forward(world: World, prefetcher: Prefetcher, num_layers: int, window: int) -> None:
    """One forward in simulated time: `window` ticks of compute per layer, in which copies go on."""
    for layer in range(num_layers):
        prefetcher.acquire(layer)
        assert world.memory[prefetcher.slot_of(layer) * LAYER_BYTES :][:LAYER_BYTES] == world.layers[layer]
        for _ in range(window):
            world.engine.step_copies()
        prefetcher.release(layer)


@pytest.mark.parametrize(("num_layers", "num_slots"), [(6, 2), (58, 2), (9, 3), (2, 2), (3, 4)])
def test_a_window_as_long_as_a_copy_hides_it(num_layers: int, num_slots: int) -> None:
    ring = Ring(num_layers, num_slots)
    world = World(num_layers, ring.used_slots, 0)
    prefetcher = make(world, ring)
    prefetcher.start()
    forward(world, prefetcher, num_layers, COPY_TICKS + 1)
    cold = prefetcher._page.exposed_wait_ns
    assert 0 < cold <= ring.used_slots * (COPY_TICKS + 1)
    for _ in range(3):
        forward(world, prefetcher, num_layers, COPY_TICKS + 1)
    assert prefetcher._page.exposed_wait_ns == cold
    assert prefetcher._page.layers == 4 * num_layers
    assert prefetcher._page.on_demand_fetches == 0


def test_only_the_seam_is_exposed_where_two_neighbours_share_a_slot() -> None:
    trace: list[TraceEvent] = []
    ring, world = Ring(5, 2), World(5, 2, 0)
    prefetcher = make(world, ring, trace)
    prefetcher.start()
    forward(world, prefetcher, 5, 20)
    before = prefetcher._page.slot_waits
    forward(world, prefetcher, 5, 20)
    assert prefetcher._page.slot_waits - before == 1  # layer 0, which follows layer 4 in slot 0
    assert prefetcher._page.on_demand_fetches == 0


def test_the_trace_proves_the_overlap() -> None:
    trace: list[TraceEvent] = []
    ring, world = Ring(4, 2), World(4, 2, 0)
    prefetcher = make(world, ring, trace)
    prefetcher.start()
    for _ in range(3):
        forward(world, prefetcher, 4, 10)
    prefetcher.close(1.0)
    trace.sort(key=lambda event: event.time_ns)
    busy = [event for event in trace if event.kind == "copy_begin"]
    windows = list(
        zip(
            [event for event in trace if event.kind == "ready"],
            [event for event in trace if event.kind == "release"],
            strict=True,
        )
    )
    hidden = [
        (copy.layer, ready.layer)
        for copy in busy
        for ready, release in windows
        if ready.time_ns <= copy.time_ns and copy.time_ns + COPY_TICKS <= release.time_ns
    ]
    # Every pull but the first slot's and those still queued at the end ran within the compute of the layer before.
    assert len(hidden) >= 3 * 4 - 2
    assert all((layer - during) % 4 == 1 for layer, during in hidden)
    for event in trace:
        assert event.slot == ring.slot_of(event.layer)
    # Never a copy into a slot between ready and release of that slot.
    for ready, release in windows:
        for begin in busy:
            if begin.slot == ready.slot:
                assert not ready.time_ns < begin.time_ns < release.time_ns


def test_exposed_time_is_counted() -> None:
    ring, world = Ring(4, 2), World(4, 2, 0)
    prefetcher = make(world, ring)
    prefetcher.start()
    for _ in range(3):
        forward(world, prefetcher, 4, 1)
    # Copies come one at a time and compute hides one tick of each.
    found = prefetcher._page
    assert found.exposed_wait_ns == world.engine.clock - 12
    assert found.pulls == 2 + 12 and found.pulled_bytes == 14 * LAYER_BYTES


def test_a_layer_out_of_order_is_fetched_and_the_ring_goes_on_from_there() -> None:
    ring, world = Ring(8, 2), World(8, 2, 0)
    prefetcher = make(world, ring)
    prefetcher.start()
    prefetcher.acquire(4)
    assert prefetcher._page.on_demand_fetches == 1
    assert world.memory[:LAYER_BYTES] == world.layers[4]
    prefetcher.release(4)
    prefetcher.acquire(6)
    assert prefetcher._page.on_demand_fetches == 1
    prefetcher.release(6)
    prefetcher.acquire(1)
    assert prefetcher._page.on_demand_fetches == 1


def test_an_aborted_use_is_over_once_another_layer_wants_the_slot() -> None:
    ring, world = Ring(4, 2), World(4, 2, 0)
    prefetcher = make(world, ring)
    prefetcher.start()
    prefetcher.acquire(0)
    prefetcher.release(0)
    prefetcher.acquire(1)
    prefetcher.release(1)
    prefetcher.acquire(2)  # aborted here
    pulls = prefetcher._page.pulls
    prefetcher.acquire(0)
    assert prefetcher._page.on_demand_fetches == 1 and prefetcher._page.pulls == pulls + 1
    assert world.memory[:LAYER_BYTES] == world.layers[0]
    with pytest.raises(DwdpError, match="layer 2 is released but slot 0 is acquired by 0"):
        prefetcher.release(2)
    assert prefetcher._page.pulls == pulls + 1
    prefetcher.release(0)


def test_an_aborted_use_stays_over_when_the_next_one_times_out() -> None:
    ring, world = Ring(4, 2), World(4, 2, 0)
    prefetcher = make(world, ring)
    prefetcher.start()
    prefetcher.acquire(0)  # aborted here
    world.engine.stuck = True
    with pytest.raises(DwdpTimeout):
        prefetcher.acquire(2)
    world.engine.stuck = False
    while world.memory[:LAYER_BYTES] == world.layers[0]:  # until layer 2 begins to overwrite the slot
        world.engine.step_copies()
    prefetcher.acquire(0)
    assert world.memory[:LAYER_BYTES] == world.layers[0]


def test_a_slot_of_one_layer_is_pulled_once() -> None:
    ring, world = Ring(2, 3), World(2, 2, 0)
    prefetcher = make(world, ring)
    prefetcher.start()
    prefetcher.start()
    for _ in range(5):
        forward(world, prefetcher, 2, 1)
    assert prefetcher._page.pulls == 2


def test_a_failed_copy_is_reported_and_fetched_again() -> None:
    ring, world = Ring(4, 2), World(4, 2, 0)
    prefetcher = make(world, ring)
    world.engine.fail_next = True
    prefetcher.start()
    with pytest.raises(DwdpError, match="made to fail"):
        prefetcher.acquire(0)
    prefetcher.acquire(0)
    assert prefetcher._page.on_demand_fetches == 1
    assert world.memory[:LAYER_BYTES] == world.layers[0]


def test_a_timeout_is_reported_and_can_be_tried_again() -> None:
    ring, world = Ring(4, 2), World(4, 2, 0)
    prefetcher = make(world, ring)
    prefetcher.start()
    world.engine.stuck = True
    with pytest.raises(DwdpTimeout):
        prefetcher.acquire(0)
    with pytest.raises(DwdpTimeout):
        prefetcher.close(1.0)
    world.engine.stuck = False
    prefetcher.close(1.0)
    prefetcher.close(1.0)
    assert world.memory[:LAYER_BYTES] == world.layers[0]


def test_closed_means_closed() -> None:
    ring, world = Ring(4, 2), World(4, 2, 0)
    prefetcher = make(world, ring)
    prefetcher.start()
    prefetcher.acquire(0)
    prefetcher.close(1.0)
    calls: list[Callable[[], None]] = [lambda: prefetcher.acquire(1), lambda: prefetcher.release(0), prefetcher.start]
    for call in calls:
        with pytest.raises(DwdpError, match="closed"):
            call()
    with pytest.raises(DwdpError, match="3 programs for a ring of 4 layers"):
        Prefetcher(ring, world.engine, [world.program(0, 0)] * 3, CounterPage.create(), 1.0)
