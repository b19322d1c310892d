"""Forwards of a rank over the simulated CUDA: eager, captured, replayed, aborted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tests.unit.cuda_rank import Rank
from tests.unit.rank import flat
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.prefetch.replays import ReplayCounts


class Graph(NamedTuple):
    number: int
    order: tuple[int, ...]
    counts: ReplayCounts


def capture(rank: Rank, order: Sequence[int]) -> Graph:
    """The graph of a forward that computes the layers in this order."""
    rank.prefetcher.align()
    rank.device.begin_torch_capture()
    for layer in order:
        rank.prefetcher.acquire(layer)
        rank.use(layer)
        rank.prefetcher.release(layer)
    counts = rank.prefetcher.end_capture()
    return Graph(rank.device.end_torch_capture(), tuple(order), counts)


def abort_capture(rank: Rank, order: Sequence[int], released: bool) -> None:
    """A capture of these layers that is ended by an error, as torch ends it."""
    device = rank.device
    rank.prefetcher.align()
    device.begin_torch_capture()
    stream = device.current
    for layer in order:
        rank.prefetcher.acquire(layer)
        rank.use(layer)
        if released or layer != order[-1]:
            rank.prefetcher.release(layer)
    try:
        device.destroy_graph(device.end_torch_capture())
    except DwdpError as error:
        assert "cudaErrorStreamCaptureUnjoined" in str(error)
        device.current = 0
        device.destroy_stream(stream)


def replay(rank: Rank, graph: Graph) -> None:
    rank.prefetcher.align()
    rank.device.launch(graph.number, 0)
    rank.prefetcher.count_replay(graph.counts)


def eager(rank: Rank, order: Sequence[int], aborted: bool = False) -> None:
    for place, layer in enumerate(order):
        rank.play(layer, aborted and place == len(order) - 1)


def counted(rank: Rank) -> ReplayCounts:
    return ReplayCounts.of(rank.page.fields)


def at_home(rank: Rank) -> bool:
    """Whether every slot holds its first layer, as the prefetcher says and by its bytes."""
    return all(
        slot.holds == slot.number and bool((flat(memory) == rank.expected[slot.number]).all())
        for slot, memory in zip(rank.prefetcher._slots, rank.slots, strict=True)
    )


def run_copies(rank: Rank) -> None:
    """Whatever the copy stream can do before compute goes on."""
    stream = rank.device.streams[rank.engine.stream]
    while stream.can_go():
        stream.step(rank.rng)
