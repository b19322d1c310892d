"""How the kernels of a layer see all its experts: in place, or contiguous in a slot."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from vllm_dwdp.copy_plan import build_plan
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.slabs import ExpertTensor, LayerSlab
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.prefetcher import Prefetcher, bind_plan
from vllm_dwdp.transport.base import CopyEngine, Memory, Program
from vllm_dwdp.transport.shm import ShmTransport, SlabRun


class InplaceGate:
    """Acquire and release of layers whose peers' pages are mapped: nothing to wait for, only counted."""

    def __init__(self, counters: CounterPage) -> None:
        self._page = counters.fields

    def acquire(self, layer: int, tokens: int) -> None:
        """Count the layer."""
        self._page.layers += 1

    def release(self, layer: int, tokens: int) -> None:
        """Nothing to do."""


class RingGate:
    """Acquire and release of layers whose experts are pulled into slots in every forward."""

    def __init__(self, prefetcher: Prefetcher) -> None:
        self._prefetcher = prefetcher

    def acquire(self, layer: int, tokens: int) -> None:
        """See Prefetcher."""
        self._prefetcher.acquire(layer)

    def release(self, layer: int, tokens: int) -> None:
        """See Prefetcher."""
        self._prefetcher.release(layer)


def fits_pages(layer: LayerSlab, rank: int, page: int = mmap.PAGESIZE) -> bool:
    """Whether every run that `rank` reads begins on a page, in the view and at its owner, and ends on one or at the end."""
    placement = layer.build.placement
    return layer.build.on_pages and all(
        run.first * tensor.row_bytes % page == 0 and run.local * tensor.row_bytes % page == 0
        for tensor in layer.fetched
        for run in placement.runs(rank)
    )


def attach_inplace(layer: LayerSlab, rank: int, transport: ShmTransport) -> None:
    """Re-point the fetched tensors of `layer` to one range each that is made of all owners' pages."""
    placement = layer.build.placement
    for tensor in layer.fetched:
        runs = [
            SlabRun(
                layer.memory(run.owner),
                layer.layout.slabs[run.owner].offset(tensor.name, run.first),
                run.first * tensor.row_bytes,
                run.length * tensor.row_bytes,
            )
            for run in placement.runs(rank)
        ]
        whole = transport.map_runs(runs)
        tensor.parameter.data = tensor.view(whole.tensor(), 0, placement.num_experts)


def slot_bytes(layers: Sequence[LayerSlab], rank: int, split: bool = False) -> int:
    """Bytes of a slot of `rank` that fits any of `layers`, in the contiguous or in the split view."""
    return max(layer.layout.slot(rank, split).nbytes for layer in layers)


def attach_contiguous(
    layer: LayerSlab, rank: int, slot: Memory, engine: CopyEngine, slice_bytes: int | None
) -> Program:
    """Re-point the fetched tensors of `layer` into `slot`; returns the copies that fill it."""
    placement = layer.build.placement
    plan = build_plan(layer.layout, rank, slice_bytes)
    flat = slot.tensor()
    for tensor in layer.fetched:
        tensor.parameter.data = tensor.view(flat, plan.slot.begin(tensor.name), placement.num_experts)
    slabs = {owner: layer.memory(owner).address for owner in range(placement.num_ranks)}
    return bind_plan(engine, plan, slabs, slot.address)


def refuse_inplace(layer: LayerSlab, tensors: Sequence[ExpertTensor]) -> DwdpError:
    """The error for a forced in-place view whose boundaries turned out not to fall on pages."""
    rows = ", ".join(f"{tensor.name} {tensor.row_bytes}" for tensor in tensors)
    return DwdpError(
        f'weight_view "inplace": experts of {layer.build.name} ({rows} bytes) do not begin on pages of '
        f"{mmap.PAGESIZE} bytes: use weight_view auto or contiguous"
    )
