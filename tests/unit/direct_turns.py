"""Ranks of a view that goes both ways, on simulated CUDA, and turns of forwards that they take."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from tests.unit import fake_vmm
from tests.unit.fake_cuda import Machine
from tests.unit.gpu_layers import LAYERS
from tests.unit.gpu_sharing import MANY, GpuRank, share_on_gpus
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers import gates

FEW = 16  # tokens of the largest direct forward
#: Of the composite view: rows of the layers' tensors end on none of these pages, and shares on few.
PAGE = 3 * 4096


def group(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int = 2, seed: int = 0, view: str = "split", **more: Any
) -> tuple[Machine, list[GpuRank]]:
    """Ranks of a view that goes both ways, which have begun to prefetch."""
    monkeypatch.setattr(fake_vmm, "PAGE", PAGE)
    machine, ranks = share_on_gpus(monkeypatch, view, num_ranks, seed, **{"direct_tokens": FEW, **more})
    for rank in ranks:
        assert rank.sharing.direct_tokens == FEW
        rank.sharing.start()
    return machine, ranks


def ring_of(rank: GpuRank) -> tuple[object, ...]:
    """All that a direct forward must leave alone."""
    prefetcher: Any = rank.sharing.prefetcher
    slots = [(slot.holds, slot.used_by, slot.copied) for slot in prefetcher._slots]
    page = prefetcher._page
    return (*slots, page.pulls, page.layers, page.on_demand_fetches, page.pulled_bytes)


def some_order(rng: random.Random) -> list[int]:
    """A whole forward, one that skips layers, one that repeats some, or any."""
    kind, whole = rng.randrange(4), list(range(LAYERS))
    if kind == 1:
        return [layer for layer in whole if rng.random() < 0.6]
    if kind == 2:
        return [layer for layer in whole for _ in range(rng.choice((1, 1, 2)))]
    return whole if kind == 0 else [rng.choice(whole) for _ in range(rng.randrange(5))]


def direct_turn(rank: GpuRank, graphs: list[int], rng: random.Random) -> None:
    """An eager direct forward, a replay of one, or the capture of another graph."""
    before, tokens = ring_of(rank), rng.randrange(1, FEW + 1)
    kind = rng.randrange(8)
    if kind < 4 and graphs:
        rank.device.launch(rng.choice(graphs), rank.device.current)
    elif kind == 4:
        graphs.append(rank.capture(tokens, some_order(rng)))
        if len(graphs) > 6:
            rank.device.destroy_graph(graphs.pop(0))
    else:
        rank.forward(tokens, some_order(rng), aborted=rng.random() < 0.3)
    assert ring_of(rank) == before


def pulled_turn(rank: GpuRank, rng: random.Random) -> None:
    """An eager forward that pulls, or a try to capture one, which is refused and leaves the ring as it is."""
    tokens = rng.choice((FEW + 1, MANY))
    if rng.random() < 0.15:
        before = ring_of(rank)
        with pytest.raises(DwdpError, match="would be pulled inside of a CUDA graph"):
            rank.capture(tokens, some_order(rng) or [0])
        assert ring_of(rank) == before
    else:
        rank.forward(tokens, some_order(rng), aborted=rng.random() < 0.3)


def play(machine: Machine, ranks: Sequence[GpuRank], rounds: int, direct: float) -> None:
    """`rounds` forwards of any rank, this part of them direct, with the device going on at random in between."""
    rng = machine.rng
    graphs: dict[int, list[int]] = {id(rank): [] for rank in ranks}
    for number in range(rounds):
        rank = rng.choice(ranks)
        if rng.random() < direct:
            direct_turn(rank, graphs[id(rank)], rng)
        else:
            pulled_turn(rank, rng)
        machine.wander(40)
        if number % 25 == 24:
            machine.drain()  # or the host would run away from the device
    machine.drain()
    for rank in ranks:
        rank.forward(MANY)
        rank.forward(FEW)
        machine.drain()
        for graph in graphs[id(rank)]:
            rank.device.destroy_graph(graph)


def close(ranks: Sequence[GpuRank]) -> None:
    for rank in ranks:
        rank.sharing.close()
        assert len(rank.device.streams) == 1, "a stream is left"
    # They keep layers, and these their ranges.
    gates._gates.clear()
