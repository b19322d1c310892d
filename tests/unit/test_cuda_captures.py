"""Captures of CUDA graphs on simulated CUDA: what they leave where they only end, are aborted or are refused."""

from __future__ import annotations

import pytest

from tests.unit.cuda_forwards import abort_capture, capture, counted, eager, replay
from tests.unit.cuda_rank import close_ranks, start_ranks
from tests.unit.fake_cuda import Machine
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.prefetch.replays import ReplayCounts
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.cuda_copy import CopyOptions


def test_a_capture_alone_changes_nothing() -> None:
    """It has not run: slots, counters and what eager forwards then see are as before it."""
    machine = Machine(8)
    ranks = start_ranks(machine, 2, 5, Ring(5, 2), CopyOptions())
    rank = ranks[0]
    rank.prefetcher.start()
    machine.frozen = True  # the pulls that `align` waits for are still under way when the capture ends
    rank.prefetcher.align()
    copied = [id(slot.copied) for slot in rank.prefetcher._slots]
    before = counted(rank)
    graphs = [capture(rank, order) for order in ((0, 1, 2), (4, 3), (0, 1, 2, 3, 4))]
    assert counted(rank) == before
    assert [(slot.holds, slot.used_by) for slot in rank.prefetcher._slots] == [(0, None), (1, None)]
    assert [id(slot.copied) for slot in rank.prefetcher._slots] == copied
    waits = rank.device.calls["wait_event"]
    rank.prefetcher.acquire(0)
    assert rank.device.calls["wait_event"] > waits, "compute does not wait for a copy that is under way"
    rank.use(0)
    rank.prefetcher.release(0)
    machine.frozen = False
    eager(rank, (1, 2, 3, 4))
    machine.drain()
    assert rank.wrong == 0 and counted(rank).forwards == before.forwards + 1
    for graph in graphs:
        rank.device.destroy_graph(graph.number)
    close_ranks(ranks)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("order", [(0,), (0, 1, 2), (3, 2), (1, 1)])
def test_an_aborted_capture_leaves_nothing(order: tuple[int, ...], released: bool) -> None:
    machine = Machine(4)
    ranks = start_ranks(machine, 2, 5, Ring(4, 2), CopyOptions())
    rank = ranks[0]
    rank.prefetcher.start()
    rank.prefetcher.align()
    before = counted(rank)
    abort_capture(rank, order, released)
    assert counted(rank) == before  # readers of the page never see it go back
    eager(rank, range(4))
    after = counted(rank).since(before)
    assert after == ReplayCounts(1, 4, 4, 4 * rank.plan.pulled_bytes, 4 * rank.plan.local_bytes)
    abort_capture(rank, order, released)
    graph = capture(rank, order)
    replay(rank, graph)
    machine.drain()
    assert rank.compared and rank.wrong == 0
    abort_capture(rank, order, released)
    rank.device.destroy_graph(graph.number)
    close_ranks(ranks)


def test_an_aborted_capture_hides_no_copy_under_way_from_close() -> None:
    machine = Machine(5)
    ranks = start_ranks(machine, 2, 5, Ring(4, 2), CopyOptions())
    rank = ranks[0]
    rank.prefetcher.start()
    machine.frozen = True
    abort_capture(rank, (0, 1, 2, 3), released=True)
    with pytest.raises(DwdpError, match="not done after"):
        rank.prefetcher.close(0.01)
    machine.frozen = False
    close_ranks(ranks)


def test_a_capture_that_slots_were_not_aligned_for_is_refused() -> None:
    machine = Machine(6)
    ranks = start_ranks(machine, 2, 5, Ring(4, 2), CopyOptions())
    rank = ranks[0]
    rank.prefetcher.start()
    rank.prefetcher.align()
    eager(rank, (0, 1))
    rank.device.begin_torch_capture()
    stream = rank.device.current
    with pytest.raises(DwdpError, match="not aligned for") as caught:
        rank.prefetcher.acquire(2)
    assert "\n" not in str(caught.value)
    del caught  # its frames hold an event
    rank.device.destroy_graph(rank.device.end_torch_capture())
    assert stream not in rank.device.streams
    eager(rank, (2, 3))
    machine.drain()
    assert rank.wrong == 0
    close_ranks(ranks)
