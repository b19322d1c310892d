"""The composite view: own pages and a slot's, or own pages and the peers', in one range of addresses (GPUs).

Kernels see one dense [E, ...] tensor, so any of vLLM's can compute, and nothing is merged. A tensor has two such ranges,
made once: `pulled`, whose missing pages are filled by copies, and `direct`, whose missing pages are their owners'. A forward
takes one by its number of tokens (direct.py), which is an assignment to the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_dwdp.copy_plan import LayerLayout
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.slabs import ExpertTensor, LayerSlab, LayerTensors, specs_of
from vllm_dwdp.page_plan import SLOT, PagedLayout
from vllm_dwdp.transport.base import Copy, CopyEngine, PeerSlab, Program, Slab, Slot
from vllm_dwdp.transport.vmm import Part, VmmTransport

_REMEDY = "use weight_view split or contiguous"


class Ranges(NamedTuple):
    """All E experts of a parameter, twice. pulled: missing ones in the slot. direct: missing ones at their owners."""

    parameter: torch.nn.Parameter
    pulled: torch.Tensor
    direct: torch.Tensor


class LayerRanges:
    """The ranges of a layer's tensors, and which of them its kernel reads."""

    def __init__(self, tensors: tuple[Ranges, ...]) -> None:
        self.tensors = tensors
        self._direct = False
        self.attach()

    def take(self, direct: bool) -> None:
        """Have the kernel read missing experts at their owners, or in the slot."""
        if direct != self._direct:
            self._direct = direct
            self.attach()

    def attach(self) -> None:
        """Have the parameters be what was taken last."""
        for tensor in self.tensors:
            tensor.parameter.data = tensor.direct if self._direct else tensor.pulled


def why_not(layer: LayerTensors) -> str | None:
    """None where every share is one run of experts, around the end if need be; else what is wrong with "experts of
    <layer>"."""
    placement = layer.build.placement
    for rank, share in enumerate(placement.shares):
        held = set(share)
        runs = sum((expert + 1) % placement.num_experts not in held for expert in share)
        if runs > 1:
            return f"are held in {runs} runs by rank {rank} of the group, whose ends would take pages of their own"
    return None


def lay_out(layers: Sequence[LayerTensors], page: int) -> list[PagedLayout]:
    """Where pages of `page` bytes are, by layer.

    Raises DwdpError where one slot does not serve all layers, or a rank would hold every page.
    """
    known: dict[PagedLayout, PagedLayout] = {}
    layouts = []
    for layer in layers:
        layout = PagedLayout(layer.build.placement, specs_of(layer), page)
        layouts.append(known.setdefault(layout, layout))
        if layouts[-1].slots != layouts[0].slots:
            raise DwdpError(
                f'weight_view "composite": experts of {layer.build.name} are cut into other pages than those of '
                f"{layers[0].build.name}, and cannot share slots: {_REMEDY}"
            )
    for rank, slot in enumerate(layouts[0].slots):
        if not slot.pieces:
            raise DwdpError(
                f'weight_view "composite": rank {rank} of the group would hold every page ({page} bytes) of '
                f"{layers[0].build.name}, and nothing is left to fetch: {_REMEDY}, or fewer dwdp.experts_per_rank"
            )
    return layouts


def fits(layers: Sequence[LayerTensors], page: int, num_slots: int) -> bool:
    """Whether `layers` have a layout in pages of `page` bytes, and no rank needs more memory for it than for the contiguous
    view."""
    try:
        layouts = lay_out(layers, page)
    except DwdpError:
        return False
    slots = min(num_slots, len(layers))
    whole = [LayerLayout(layer.build.placement, specs_of(layer)) for layer in layers]
    for rank, slot in enumerate(layouts[0].slots):
        paged = sum(sum(layout.slabs[rank].sizes) for layout in layouts) + slots * sum(slot.sizes)
        largest = max(layout.slot(rank).nbytes for layout in whole)
        if paged > sum(layout.slabs[rank].nbytes for layout in whole) + slots * largest:
            return False
    return True


def allocate_slot(layers: Sequence[LayerSlab], rank: int, transport: VmmTransport) -> Slot:
    """A slot of `rank` that fits any of `layers`."""
    return transport.allocate_slot_pieces(_pages(layers[0]).slots[rank].sizes)


def slot_bytes(layers: Sequence[LayerSlab], rank: int) -> int:
    """Bytes of a slot of `rank` that fits any of `layers`."""
    return sum(_pages(layers[0]).slots[rank].sizes)


def fill(layers: Sequence[LayerSlab], rank: int) -> int:
    """Copy what is on the outermost pages of `rank` and not of its share, from the owners' shares; returns its bytes.

    No page may be read by a peer before it returns.
    """
    nbytes = 0
    for layer in layers:
        own = layer.slab.tensor()
        for item in _pages(layer).foreign(rank):
            source = layer.memory(item.source).tensor()[item.src_offset :]
            own[item.dst_offset :][: item.nbytes].copy_(source[: item.nbytes])
            nbytes += item.nbytes
    torch.cuda.synchronize()
    return nbytes


def attach(
    layer: LayerSlab,
    rank: int,
    slot: Slot,
    engine: CopyEngine,
    slice_bytes: int | None,
    transport: VmmTransport,
) -> Program:
    """Re-point the fetched tensors of `layer` to ranges of their own; returns the copies that fill its slot."""
    pages, placement = _pages(layer), layer.build.placement
    memories: dict[int, Slab | Slot | PeerSlab] = {owner: layer.memory(owner) for owner in range(placement.num_ranks)}
    memories[SLOT] = slot

    def whole(tensor: ExpertTensor, direct: bool) -> torch.Tensor:
        parts = [Part(memories[part.owner], part.number) for part in pages.range_of(rank, tensor.name, direct)]
        return tensor.view(transport.compose(parts).tensor(), 0, placement.num_experts)

    tensors = (Ranges(tensor.parameter, whole(tensor, False), whole(tensor, True)) for tensor in layer.fetched)
    layer.build.module.dwdp_ranges = LayerRanges(tuple(tensors))
    return engine.bind(
        [
            Copy(slot.address + item.dst_offset, memories[item.source].address + item.src_offset, item.nbytes)
            for item in pages.pulls(rank, slice_bytes)
        ]
    )


def _pages(layer: LayerSlab) -> PagedLayout:
    assert layer.paged is not None
    return layer.paged
