"""What follows a pull that did not begin as it should: nothing of it is taken for there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.fake_engine import LAYER_BYTES, FakeEvent, World
from vllm_dwdp.errors import DwdpError, DwdpTimeout
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


def state(prefetcher: Prefetcher) -> list[tuple[int | None, int | None, object]]:
    return [(slot.holds, slot.used_by, slot.copied) for slot in prefetcher._slots]


@pytest.mark.parametrize("in_use", [False, True])
def test_a_pull_in_a_capture_is_refused_and_changes_nothing(in_use: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a layer that is there: the next replay would read whatever is in the slot by then."""
    world, prefetcher = start()
    if in_use:
        prefetcher.acquire(0)
    before, counted = state(prefetcher), prefetcher._page.pulls
    with monkeypatch.context() as captured:
        captured.setattr(world.engine, "capturing", lambda: True)
        for layer in range(4):
            with pytest.raises(DwdpError, match=rf"layer {layer} would be pulled inside of a CUDA graph") as caught:
                prefetcher.acquire(layer)
            assert "\n" not in str(caught.value) and "dwdp.direct_tokens" in str(caught.value)
    assert state(prefetcher) == before and prefetcher._page.pulls == counted
    for layer in range(4):
        prefetcher.acquire(layer)
        world.use(layer, prefetcher.slot_of(layer))
        prefetcher.release(layer)
    world.engine.drain()
    assert world.wrong == 0 and prefetcher._page.on_demand_fetches == 0


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
    assert slot(world, 0) == world.layers[0] and prefetcher._page.on_demand_fetches == 1


def test_a_device_that_failed_keeps_nothing_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    world, prefetcher = start()

    def fail() -> FakeEvent:
        raise DwdpError("record failed (cudaErrorIllegalAddress)")

    monkeypatch.setattr(world.engine, "record", fail)
    prefetcher.close(1.0)
    with pytest.raises(DwdpError, match="the prefetcher is closed"):
        prefetcher.acquire(0)

    def overdue() -> FakeEvent:
        raise DwdpTimeout("a copy is not done after 1 s")

    world, prefetcher = start()
    monkeypatch.setattr(world.engine, "record", overdue)
    with pytest.raises(DwdpTimeout):
        prefetcher.close(1.0)
    monkeypatch.undo()
    prefetcher.close(1.0)
