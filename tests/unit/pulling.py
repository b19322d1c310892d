"""For tests of ci/bench/contention.py: its ranks in one process, and what a pull has to bring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ci.bench.contention_rank import Barrier, Order, Rank, Shape
from ci.bench.contention_ways import Way
from tests.unit.cuda_rank import process_id, transport_of
from tests.unit.fake_cuda import Machine
from tests.unit.helpers import LIMIT_S
from vllm_dwdp.transport.base import Transport
from vllm_dwdp.transport.shm import ShmTransport


class NoBarrier:
    """A rank alone waits for nobody."""

    def wait(self, timeout: float | None = None) -> int:
        raise AssertionError("a rank alone waited for others")


class Group(NamedTuple):
    """Ranks that have joined."""

    ranks: list[Rank]
    ways: Sequence[Way]

    def wrong(self, way: int) -> list[int]:
        """By rank: wrong bytes after a pull of fresh bytes, of which those of no source have to stay 0."""
        for rank in self.ranks:
            rank.own.tensor().random_(1, 256)
        return [self._wrong(number, way) for number in range(len(self.ranks))]

    def _wrong(self, number: int, way: int) -> int:
        rank = self.ranks[number]
        slot, found = rank.slot.tensor(), rank.layout.slot(number, split=True)
        slot.zero_()
        rank.pull(Order(way, 1e-9))
        sources, wrong = self.ways[way].pattern.sources(number, len(self.ranks)), 0
        for expert in found.experts:
            owner = next(peer for peer, slab in enumerate(rank.layout.slabs) if expert in slab.experts)
            slab = self.ranks[owner].own.tensor()
            for name, nbytes, _ in found.tensors:
                right = slab[rank.layout.slabs[owner].offset(name, expert) :][:nbytes]
                seen = slot[found.offset(name, expert) :][:nbytes]
                wrong += int((seen != (right if owner in sources else torch.zeros_like(right))).sum())
        return wrong

    def close(self) -> None:
        """Unmap all, then free all."""
        for rank in self.ranks:
            rank.unmap()
        for rank in self.ranks:
            rank.close()


def group(kind: str, num_ranks: int, ways: Sequence[Way], barrier: Barrier | None = None) -> Group:
    """Over shared memory, or over a transport of simulated CUDA, a device for each rank."""
    shape = Shape(num_ranks, kind, experts=2 * num_ranks, row_bytes=128 << 10)
    machine = Machine(num_devices=num_ranks)
    ranks = []
    for number in range(num_ranks):
        transport: Transport = ShmTransport(LIMIT_S)
        if kind != "shm":
            device = machine.process(number)
            transport = transport_of(kind, device, process=process_id(device.number))
        ranks.append(Rank(transport, number, shape, barrier or NoBarrier()))
    handles = [rank.handle() for rank in ranks]
    for rank in ranks:
        rank.join(handles, ways)
    return Group(ranks, ways)
