"""The contiguous view: every forward fills a slot with all experts of a layer, and vLLM's own kernels read them there."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_dwdp.copy_plan import build_plan
from vllm_dwdp.layers.slabs import LayerSlab
from vllm_dwdp.prefetch.prefetcher import Prefetcher, bind_plan
from vllm_dwdp.transport.base import CopyEngine, Memory, Program


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


def why_not(layer: LayerSlab) -> str | None:
    """Any layer can be copied together: None."""
    return None


def slot_bytes(layers: Sequence[LayerSlab], rank: int) -> int:
    """Bytes of a slot of `rank` that fits any of `layers`."""
    return max(layer.layout.slot(rank).nbytes for layer in layers)


def attach(layer: LayerSlab, rank: int, slot: Memory, engine: CopyEngine, slice_bytes: int | None) -> Program:
    """Re-point the fetched tensors of `layer` into `slot`; returns the copies that fill it."""
    placement = layer.build.placement
    plan = build_plan(layer.layout, rank, slice_bytes)
    flat = slot.tensor()
    for tensor in layer.fetched:
        tensor.parameter.data = tensor.view(flat, plan.slot.begin(tensor.name), placement.num_experts)
    slabs = {owner: layer.memory(owner).address for owner in range(placement.num_ranks)}
    return bind_plan(engine, plan, slabs, slot.address)
