"""For direct.py: a layer of which some experts lie over a link, and how long batches of it take."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from vllm_dwdp.kernels.bench.precompile import compile_all, gemms
from vllm_dwdp.kernels.bench.shapes import BLOCK, Batch, Problem
from vllm_dwdp.kernels.bench.timing import captured, seconds
from vllm_dwdp.kernels.configs import layer_shape
from vllm_dwdp.kernels.split_gemm import INTERPRETED
from vllm_dwdp.kernels.split_moe import Workspace, split_experts
from vllm_dwdp.kernels.tiles import Tiles
from vllm_dwdp.kernels.weight_table import WeightTable

Tabled = tuple[WeightTable, WeightTable]


class Link(NamedTuple):
    """Where missing experts are, and bytes per second of a large copy from there."""

    device: torch.device
    pinned: bool
    rate: float


def open_peer(own: torch.device, nbytes: int) -> Link:
    """Let kernels of `own` read the other GPU's memory, and time a copy of `nbytes` from there."""
    if own.type != "cuda":
        return Link(own, False, 1e9)
    pinned = torch.cuda.device_count() < 2
    peer = torch.device("cpu") if pinned else torch.device("cuda", 1)
    if not pinned:
        torch.zeros(1, device=peer)
        torch.zeros(1, device=own)
        driver, contexts = ctypes.CDLL("libcuda.so.1"), (ctypes.c_void_p(), ctypes.c_void_p())
        codes = [driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), at) for at, context in enumerate(contexts)]
        codes += [driver.cuCtxSetCurrent(contexts[0]), driver.cuCtxEnablePeerAccess(contexts[1], 0)]
        if any(code not in (0, 704) for code in codes):  # 704: already enabled
            raise RuntimeError(f"{own} cannot read the memory of {peer}: CUDA driver errors {codes}")
    source = torch.empty(nbytes, dtype=torch.uint8, device=peer, pin_memory=pinned)
    target = torch.empty(nbytes, dtype=torch.uint8, device=own)
    took = min(seconds(lambda: target.copy_(source, non_blocking=True), 4, own) for _ in range(4))
    return Link(peer, pinned, nbytes / took)


class Layer:
    """A layer whose last experts lie over the link; `tables` by how many are held."""

    def __init__(self, problem: Problem, link: Link, held: Sequence[int]) -> None:
        self.problem, self.held = problem, held
        self.experts = problem.model.experts
        self._compiled: set[Any] = set()
        self.shape = layer_shape(problem.tables[0], problem.tables[1], problem.model.top_k)
        self.block = (BLOCK, BLOCK) if problem.model.quant == "block" else None
        self._kept = [dense.to(link.device).pin_memory() if link.pinned else dense.to(link.device, copy=True)
                      for dense in problem.dense]  # fmt: skip
        self.expert_bytes = sum(dense[0].numel() * dense.element_size() for dense in problem.dense)
        self.tables: dict[int, Tabled] = {count: self._direct(count) for count in held}
        self.tables[self.experts] = (problem.tables[0], problem.tables[1])

    def _direct(self, held: int) -> Tabled:
        made = []
        for own, far in zip(self.problem.tables, self._kept, strict=True):
            places = own.addresses.tolist()[:held] + [matrix.data_ptr() for matrix in far[held:]]
            shape = (self.experts, own.rows, own.cols)
            device = own.addresses.device
            made.append(WeightTable.from_addresses(places, shape, own.dtype, device, scales=own.scales))
        return made[0], made[1]

    def batches(self, tokens: int, count: int) -> list[Batch]:
        return [self.problem.batch(tokens, 1000 * tokens + seed) for seed in range(count)]

    def bytes_missing(self, batches: Sequence[Batch], held: int) -> float:
        """A batch's, on average: of its distinct experts."""
        hit = [sum(expert >= held for expert in batch.ids.unique().tolist()) for batch in batches]
        return statistics.mean(hit) * self.expert_bytes

    def room(self, tokens: int) -> Workspace:
        w13, w2 = self.problem.tables
        like = torch.empty(0, dtype=self.problem.dtype, device=self.problem.device)
        return Workspace.allocate(tokens * self.shape.top_k, w2.cols, w13, w2, like)

    def run(self, tabled: Tabled, batch: Batch, tiles: Tiles, room: Workspace) -> torch.Tensor:
        ops = self.problem.ops()
        return split_experts(batch.hidden, *tabled, batch.weights, batch.ids, ops=ops, tiles=tiles, workspace=room)

    def call(self, tabled: Tabled, batches: Sequence[Batch], tiles: Tiles, room: Workspace) -> Callable[[], object]:
        """All batches, one after the other, as one CUDA graph."""

        def cycle() -> None:
            for batch in batches:
                self.run(tabled, batch, tiles, room)

        return captured([cycle], self.problem.device)[0]

    def compile(self, wanted: Mapping[int, Sequence[Tiles]], workers: int) -> None:
        """By number of tokens; what fails will fail again where it is launched."""
        if INTERPRETED:
            return
        jobs = []
        for tokens, chosen in wanted.items():
            batch, room, routes = self.problem.batch(tokens, 0), self.room(tokens), tokens * self.shape.top_k
            if not self._compiled:  # the first one alone: it loads Triton's driver
                self.run(self.tables[self.experts], batch, chosen[0], room)
            # What Triton compiles apart.
            single = routes * 4 <= self.experts
            kinds = {tiles: (tiles, routes % 16 == 0, routes if single else 0) for tiles in chosen}
            for tiles, kind in kinds.items():
                if kind not in self._compiled:
                    jobs += gemms(self.problem, batch, tiles, room)
            self._compiled.update(kinds.values())
        compile_all(jobs, workers)


def us(calls: Mapping[Any, Callable[[], object]], count: int, device: torch.device, rounds: int) -> dict[Any, float]:
    """Median microseconds of a batch for each call, of `count` batches, taken in turns."""
    found: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            times = 1 if device.type != "cuda" else 2
            found[name].append(seconds(calls[name], times, device) / count * 1e6)
    return {name: statistics.median(values) for name, values in found.items()}
