"""Layers out of order, aborted uses, failed copies and the end: what is fetched again and what is refused."""

from collections.abc import Callable

import pytest

from tests.unit.fake_engine import LAYER_BYTES, World, make_prefetcher
from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.prefetcher import Prefetcher
from vllm_dwdp.prefetch.ring import Ring


def test_a_layer_out_of_order_is_fetched_and_the_ring_goes_on_from_there() -> None:
    ring, world = Ring(8, 2), World(8, 2, 0)
    prefetcher = make_prefetcher(world, ring)
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
    prefetcher = make_prefetcher(world, ring)
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
    prefetcher = make_prefetcher(world, ring)
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


def test_a_failed_copy_is_reported_and_fetched_again() -> None:
    ring, world = Ring(4, 2), World(4, 2, 0)
    prefetcher = make_prefetcher(world, ring)
    world.engine.fail_next = True
    prefetcher.start()
    with pytest.raises(DwdpError, match="made to fail"):
        prefetcher.acquire(0)
    prefetcher.acquire(0)
    assert prefetcher._page.on_demand_fetches == 1
    assert world.memory[:LAYER_BYTES] == world.layers[0]


def test_a_timeout_is_reported_and_can_be_tried_again() -> None:
    ring, world = Ring(4, 2), World(4, 2, 0)
    prefetcher = make_prefetcher(world, ring)
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
    prefetcher = make_prefetcher(world, ring)
    prefetcher.start()
    prefetcher.acquire(0)
    prefetcher.close(1.0)
    calls: list[Callable[[], None]] = [lambda: prefetcher.acquire(1), lambda: prefetcher.release(0), prefetcher.start]
    for call in calls:
        with pytest.raises(DwdpError, match="closed"):
            call()
    with pytest.raises(DwdpError, match="3 programs for a ring of 4 layers"):
        Prefetcher(ring, world.engine, [world.program(0, 0)] * 3, CounterPage.create(), 1.0)
