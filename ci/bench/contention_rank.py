"""For contention.py: one rank, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ci.bench.contention_ways import WAYS, Way
from ci.checks.gpu_ranks import LIMIT_S, make_transport
from vllm_dwdp.copy_plan import LayerLayout, TensorSpec, build_plan
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.placement import place
from vllm_dwdp.prefetch.prefetcher import bind_plan
from vllm_dwdp.transport.base import CopyEngine, Handle, PeerSlab, Program, Transport
from vllm_dwdp.transport.cuda_copy import CopyOptions

if TYPE_CHECKING:
    import torch

_ROW = 256  # bytes of one value, in which slabs are filled


class Shape(NamedTuple):
    """A layer of Qwen3-30B-A3B in BF16, unless told otherwise."""

    ranks: int
    transport: str = "cupy_ipc"
    experts: int = 128
    row_bytes: int = 2 * 768 * 2048 * 2


class Order(NamedTuple):
    """Pull by a way, by its number, for so many seconds; or, in step with the others, so many times."""

    way: int
    seconds: float
    rounds: int | None = None


class Pulled(NamedTuple):
    """seconds: without those at barriers. rounds: pulls of a way."""

    nbytes: int
    seconds: float
    rounds: int

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.nbytes / self.seconds


class Barrier(Protocol):
    """A multiprocessing.Barrier."""

    def wait(self, timeout: float | None = None) -> int: ...


Parts = list[tuple[CopyEngine, Program]]


class Bound(NamedTuple):
    """A way of this rank. phases: of each what is under way at once. repeats: of a phase, between two waits for its end, so
    that all patterns wait about as seldom."""

    phases: list[Parts]
    repeats: int
    sources: tuple[int, ...]


class Rank:
    """Its slab is filled; `join` comes next."""

    def __init__(self, transport: Transport, rank: int, shape: Shape, barrier: Barrier) -> None:
        self._transport, self._rank, self._shape, self._barrier = transport, rank, shape, barrier
        tensors = (TensorSpec("w13", shape.row_bytes), TensorSpec("w2", shape.row_bytes // 2))
        self.layout = LayerLayout(place(shape.experts, shape.ranks), tensors)
        self.own = transport.allocate_slab(self.layout.slabs[rank].nbytes)
        self.own.tensor().copy_(self._contents(rank, self.own.tensor().device))
        self.slot = transport.allocate_slot(self.layout.slot(rank, True).nbytes)
        self._synchronize()

    def handle(self) -> Handle:
        """Of the slab."""
        return self._transport.export_handle(self.own)

    def join(self, handles: Sequence[Handle], ways: Sequence[Way]) -> None:
        """Map the others, bind all ways, and see that each brings the right bytes; raises DwdpError."""
        others = [peer for peer in range(len(handles)) if peer != self._rank]
        self._mapped: dict[int, PeerSlab] = {peer: self._transport.map_peer(handles[peer]) for peer in others}
        self._addresses = {peer: slab.address for peer, slab in self._mapped.items()}
        self._engines = [self._transport.copy_engine() for _ in others]  # the first one alone, or one for each source
        self._ways = [self._bind(way) for way in ways]
        for way, bound in zip(ways, self._ways, strict=True):
            self._check(way, bound)

    def pull(self, order: Order) -> Pulled:
        """Once, then as ordered; with `rounds` no phase begins before all ranks have ended the one before. Nothing
        where this rank has no source."""
        bound = self._ways[order.way]
        self._once(bound)
        rounds, nbytes, seconds = 0, 0, 0.0
        while bound.phases and (rounds < order.rounds if order.rounds else seconds < order.seconds):
            for parts in bound.phases:
                if order.rounds:
                    self._barrier.wait(LIMIT_S)
                begun = time.perf_counter()
                _run(parts, bound.repeats)
                seconds += time.perf_counter() - begun
                nbytes += bound.repeats * sum(program.pulled_bytes for _, program in parts)
            rounds += 1
        return Pulled(nbytes, seconds, rounds)

    def unmap(self) -> None:
        """Stop copying and let go of the others."""
        for engine in self._engines:
            engine.close(LIMIT_S)
        for slab in self._mapped.values():
            self._transport.unmap_peer(slab)

    def close(self) -> None:
        """After all have unmapped."""
        self._transport.close()

    def _bind(self, way: Way) -> Bound:
        plan = build_plan(self.layout, self._rank, way.slice_bytes, split=True)
        if way.order == "in order":
            plan = replace(plan, pulls=tuple(sorted(plan.pulls, key=lambda each: each.source)))
        engines = self._engines
        if way.programs is not None:
            from ci.bench.contention_kernel import KernelEngine

            engines = [KernelEngine(engines[0], self.slot.tensor().device, way.programs)]
        phases: list[Parts] = []
        for sources in way.pattern.phases(self._rank, self._shape.ranks):
            groups = [(source,) for source in sources] if way.order == "together" else [sources]
            parts = [replace(plan, pulls=tuple(p for p in plan.pulls if p.source in group)) for group in groups]
            bound = zip(engines, parts, strict=False)
            phases.append(
                [(engine, bind_plan(engine, part, self._addresses, self.slot.address)) for engine, part in bound]
            )
        at_once = max((len(sources) for sources in way.pattern.phases(self._rank, self._shape.ranks)), default=1)
        return Bound(phases, len(self._mapped) // at_once, way.pattern.sources(self._rank, self._shape.ranks))

    def _once(self, bound: Bound) -> None:
        for parts in bound.phases:
            _run(parts, 1)

    def _check(self, way: Way, bound: Bound) -> None:
        import torch

        slot = self.slot.tensor()
        right = torch.zeros_like(slot)
        contents = {source: self._contents(source, slot.device) for source in bound.sources}
        for item in build_plan(self.layout, self._rank, None, split=True).pulls:
            if item.source in contents:
                right[item.dst_offset :][: item.nbytes] = contents[item.source][item.src_offset :][: item.nbytes]
        slot.zero_()
        self._synchronize()
        self._once(bound)
        if not torch.equal(slot, right):
            wrong = int((slot != right).sum())
            raise DwdpError(
                f"{way.name}: {wrong} of {len(slot)} bytes of rank {self._rank} are wrong: do not use its rates"
            )

    def _contents(self, rank: int, device: torch.device) -> torch.Tensor:
        """uint8: what all know of the slab of `rank`; never 0, and different for neighbours, experts and ranks."""
        import torch

        rows = torch.arange(self.layout.slabs[rank].nbytes // _ROW, device=device)
        return (1 + (rows + 64 * rank) % 251).to(torch.uint8)[:, None].expand(-1, _ROW).reshape(-1)

    def _synchronize(self) -> None:
        import torch

        if self.slot.tensor().is_cuda:
            torch.cuda.synchronize()


def _run(parts: Parts, repeats: int) -> None:
    """All parts at once, so many times; returns when they are there."""
    for _ in range(repeats):
        ends = [engine.submit(program) for engine, program in parts]
    for (engine, _), end in zip(parts, ends, strict=True):
        engine.finish(end, LIMIT_S)


def run_rank(pipe: Connection, rank: int, shape: Shape, numbers: Sequence[int], barrier: Barrier) -> None:
    """Of WAYS, those of these numbers; answers each Order with Pulled until it is told to end."""
    if shape.transport == "shm":
        import torch

        torch.set_num_threads(1)  # threads of several ranks spin for each other's cores
    made = Rank(make_transport(shape.transport, rank, shape.ranks, CopyOptions()), rank, shape, barrier)
    pipe.send(made.handle())
    made.join(pipe.recv(), [WAYS[number] for number in numbers])
    pipe.send("joined")
    while (order := pipe.recv()) is not None:
        pipe.send(made.pull(order))
    made.unmap()
    pipe.send("unmapped")
    pipe.recv()
    made.close()
