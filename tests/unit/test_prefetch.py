"""The prefetcher against forced races: whatever the order of events, what is read is what was asked for."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fake_engine import LAYER_BYTES, World, make_prefetcher
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.base import Event

COMBINATIONS = list(itertools.product(range(1, 10), range(2, 6)))  # layers, slots


class Subject(Protocol):
    def start(self) -> None: ...
    def acquire(self, layer: int) -> None: ...
    def release(self, layer: int) -> None: ...
    def slot_of(self, layer: int) -> int: ...


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
        play(world, ring, make_prefetcher(world, ring), uses, 100)
        assert world.wrong == 0, f"{num_layers} layers, {num_slots} slots, seed {seed}"
        rounds += 100
        assert world.compared >= 100 * LAYER_BYTES
    assert rounds >= 10_000


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 2**32), st.booleans(), st.booleans())
def test_every_byte_is_right_for_any_seed(layers: int, slots: int, seed: int, queued: bool, order: bool) -> None:
    ring = Ring(layers, slots)
    world = World(layers, ring.used_slots, seed, queued)
    play(world, ring, make_prefetcher(world, ring), in_order if order else disorderly, 60)
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
    play(world, ring, make_prefetcher(world, ring), in_order, 100)
    assert world.wrong > 0


def test_the_harness_catches_compute_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(6, 2)
    world = World(6, 2, 0)
    monkeypatch.setattr(world.engine, "wait", lambda event, timeout_s: None)
    play(world, ring, make_prefetcher(world, ring), in_order, 100)
    assert world.wrong > 0
