"""What the prefetcher hides and what it counts, in simulated time."""

import pytest

from tests.unit.fake_engine import LAYER_BYTES, World, make_prefetcher
from vllm_dwdp.prefetch.prefetcher import Prefetcher
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.prefetch.trace import TraceEvent

COPY_TICKS = LAYER_BYTES // 2 + 1  # of a layer, with the step that ends the program


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
    prefetcher = make_prefetcher(world, ring)
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
    prefetcher = make_prefetcher(world, ring, trace)
    prefetcher.start()
    forward(world, prefetcher, 5, 20)
    before = prefetcher._page.slot_waits
    forward(world, prefetcher, 5, 20)
    assert prefetcher._page.slot_waits - before == 1  # layer 0, which follows layer 4 in slot 0
    assert prefetcher._page.on_demand_fetches == 0


def test_the_trace_proves_the_overlap() -> None:
    trace: list[TraceEvent] = []
    ring, world = Ring(4, 2), World(4, 2, 0)
    prefetcher = make_prefetcher(world, ring, trace)
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
    prefetcher = make_prefetcher(world, ring)
    prefetcher.start()
    for _ in range(3):
        forward(world, prefetcher, 4, 1)
    # Copies come one at a time and compute hides one tick of each.
    found = prefetcher._page
    assert found.exposed_wait_ns == world.engine.clock - 12
    assert found.pulls == 2 + 12 and found.pulled_bytes == 14 * LAYER_BYTES


def test_a_slot_of_one_layer_is_pulled_once() -> None:
    ring, world = Ring(2, 3), World(2, 2, 0)
    prefetcher = make_prefetcher(world, ring)
    prefetcher.start()
    prefetcher.start()
    for _ in range(5):
        forward(world, prefetcher, 2, 1)
    assert prefetcher._page.pulls == 2
