"""The in-place view: the pages of all owners, mapped into one range of addresses. Nothing is copied."""

from __future__ import annotations

import mmap

from vllm_dwdp.layers.slabs import LayerSlab
from vllm_dwdp.prefetch.counters import CounterPage
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


def why_not(layer: LayerSlab, page: int = mmap.PAGESIZE) -> str | None:
    """None where every run that a rank of the group reads begins on a page, in the view and at its owner, and ends on one
    or at the end; else what is wrong with "experts of <layer>"."""
    placement = layer.build.placement
    runs = [run for reader in range(placement.num_ranks) for run in placement.runs(reader)]
    if layer.build.on_pages and all(
        run.first * tensor.row_bytes % page == 0 and run.local * tensor.row_bytes % page == 0
        for tensor in layer.fetched
        for run in runs
    ):
        return None
    rows = ", ".join(f"{tensor.name} {tensor.row_bytes}" for tensor in layer.fetched)
    return f"({rows} bytes) do not begin on pages of {page} bytes"


def attach(layer: LayerSlab, rank: int, transport: ShmTransport) -> None:
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
