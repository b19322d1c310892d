"""What follows a forward that did not end as it should: slots are brought home, and nothing of it is taken for there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.fake_engine import LAYER_BYTES, FakeEvent, World
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.prefetcher import Prefetcher
from vllm_dwdp.prefetch.ring import Ring


def start(queued: bool = False) -> tuple[World, Prefetcher]:
    """4 layers on 2 slots, filled."""
    ring, world = Ring(4, 2), World(4, 2, 0, queued)
    programs = [world.program(layer, ring.slot_of(layer)) for layer in range(4)]
    prefetcher = Prefetcher(ring, world.engine, programs, CounterPage.create(), 1.0)
    prefetcher.start()
    world.engine.drain()
    return world, prefetcher


def slot(world: World, number: int) -> bytes:
    return bytes(world.memory[number * LAYER_BYTES :][:LAYER_BYTES])


def test_slots_are_brought_home_behind_the_compute_that_reads_them() -> None:
    """Every copy goes as far as it can before compute takes a step."""
    world, prefetcher = start(queued=True)
    prefetcher.acquire(0)
    world.use(0, 0)
    prefetcher.release(0)
    prefetcher.acquire(2)
    world.engine.drain()
    world.use(2, 0)  # aborted here, not computed yet
    prefetcher.align()
    while world.engine.step_copies():
        pass
    assert slot(world, 0) == world.layers[2]
    world.use(0, 0)
    world.engine.drain()
    assert (world.compared, world.wrong) == (24, 0)
    assert [slot(world, number) for number in range(2)] == world.layers[:2]


def test_what_follows_waits_until_slots_are_home() -> None:
    """Compute goes as far as it can before a copy takes a step."""
    world, prefetcher = start(queued=True)
    prefetcher.acquire(0)
    world.use(0, 0)
    prefetcher.release(0)
    world.engine.drain()
    assert slot(world, 0) == world.layers[2]
    prefetcher.align()
    world.use(0, 0)
    while world.engine.step_compute():
        pass
    world.engine.drain()
    assert (world.compared, world.wrong) == (16, 0)


def test_a_layer_in_use_before_slots_are_brought_home_is_not_there_after() -> None:
    world, prefetcher = start()
    for layer in (0, 1):
        prefetcher.acquire(layer)
        prefetcher.release(layer)
    prefetcher.acquire(2)  # aborted here
    prefetcher.align()
    assert slot(world, 0) == world.layers[0]
    with pytest.raises(DwdpError, match="slot 0 is acquired by None"):
        prefetcher.release(2)
    prefetcher.acquire(2)
    assert slot(world, 0) == world.layers[2]


def test_a_copy_that_began_before_submit_failed_leaves_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    world, prefetcher = start()
    submit = world.engine.submit

    def fail(*arguments: Any) -> FakeEvent:
        submit(*arguments)
        raise DwdpError("the device failed after it took the copy")

    prefetcher.acquire(0)
    monkeypatch.setattr(world.engine, "submit", fail)
    with pytest.raises(DwdpError, match="after it took the copy"):
        prefetcher.release(0)
    monkeypatch.undo()
    world.engine.drain()
    assert slot(world, 0) == world.layers[2]
    prefetcher.acquire(0)
    assert slot(world, 0) == world.layers[0] and prefetcher._page.on_demand == 1
