"""Moves the share of each MoE layer into a slab."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import torch

from vllm_dwdp.copy_plan import ALIGNMENT, LayerLayout, TensorSpec
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import LayerBuild, ModelBuild
from vllm_dwdp.layers.methods import method_of
from vllm_dwdp.layers.tied import refuse_tied
from vllm_dwdp.page_plan import PagedLayout
from vllm_dwdp.transport.base import PeerSlab, Slab, Transport
from vllm_dwdp.transport.vmm import VmmTransport

if TYPE_CHECKING:
    from vllm_dwdp.transport.kept import Adopting, KeptSlab

#: Tensors of at most this part of an expert (biases, scales) are replicated at start instead of fetched per forward.
REPLICATED_PART = 0.01

#: Parameters of a RoutedExperts layer that do not have one row per expert of the share.
NOT_PER_EXPERT: Final = frozenset({"e_score_correction_bias", "hash_indices_table"})


class ExpertTensor(NamedTuple):
    """One parameter with a row per expert: `row_shape` without the expert dimension, `row_bytes` of one expert."""

    name: str
    parameter: torch.nn.Parameter
    row_shape: tuple[int, ...]
    row_bytes: int
    dtype: torch.dtype

    def view(self, flat: torch.Tensor, offset: int, rows: int) -> torch.Tensor:
        """[rows, *row_shape] over `flat` (uint8) from byte `offset` on."""
        part = flat[offset : offset + rows * self.row_bytes]
        return part.view(self.dtype).view(rows, *self.row_shape)


@dataclass
class LayerTensors:
    """The parameters of a loaded layer that have a row per expert of the share.

    Attributes:
        fetched: tensors that a forward needs from peers (or reads in place).
        replicated: small tensors copied from peers once.
    """

    build: LayerBuild
    fetched: tuple[ExpertTensor, ...]
    replicated: tuple[ExpertTensor, ...]


@dataclass
class LayerSlab(LayerTensors):
    """The share of one layer in its slab, and the peers' slabs of that layer.

    Attributes:
        layout: where the bytes of any rank are, in slabs and in slots.
        peers: rank in the group -> its slab, mapped read-only.
        paged: where they are instead in a view whose slabs are made of pages.
    """

    layout: LayerLayout
    slab: Slab
    peers: dict[int, PeerSlab] = field(default_factory=dict)
    paged: PagedLayout | None = None

    def memory(self, rank: int) -> Slab | PeerSlab:
        """The slab of `rank`, own or mapped."""
        return self.peers.get(rank, self.slab)

    def offset(self, rank: int, tensor: str, expert: int) -> int:
        """Byte offset, in the slab of `rank`, of an expert of its share; the next ids of the share follow it there."""
        return (self.layout if self.paged is None else self.paged).slabs[rank].offset(tensor, expert)


def specs_of(layer: LayerTensors) -> tuple[TensorSpec, ...]:
    """The tensors of a layer in the order in which they lie in a slab."""
    specs = [TensorSpec(tensor.name, tensor.row_bytes) for tensor in layer.fetched]
    return (*specs, *(TensorSpec(tensor.name, tensor.row_bytes, fetched=False) for tensor in layer.replicated))


def lay_out(layer: LayerTensors) -> LayerLayout:
    """The layout of a layer on all ranks; tensors begin on pages where peers may map them one by one."""
    alignment = mmap.PAGESIZE if layer.build.on_pages else ALIGNMENT
    return LayerLayout(layer.build.placement, specs_of(layer), alignment)


def expert_tensors(module: Any, share: int, name: str) -> tuple[tuple[ExpertTensor, ...], tuple[ExpertTensor, ...]]:
    """(fetched, replicated) parameters of a loaded layer; raises DwdpError for one whose layout we cannot share."""
    tensors: list[ExpertTensor] = []
    for parameter_name, parameter in module.named_parameters():
        if has_rows(module, parameter_name, parameter, share, name):
            row = parameter.data[0]
            nbytes = row.numel() * row.element_size()
            tensors.append(ExpertTensor(parameter_name, parameter, tuple(row.shape), nbytes, parameter.dtype))
    whole = sum(tensor.row_bytes for tensor in tensors)
    small = {
        tensor.name
        for tensor in tensors
        if (len(tensor.row_shape) < 2 or "_scale" in tensor.name) and tensor.row_bytes <= REPLICATED_PART * whole
    }
    return (
        tuple(tensor for tensor in tensors if tensor.name not in small),
        tuple(tensor for tensor in tensors if tensor.name in small),
    )


def has_rows(module: Any, parameter_name: str, parameter: torch.Tensor, share: int, name: str) -> bool:
    """Whether a parameter of a layer, whose name is `name`, is to be shared by rows.

    Raises DwdpError where it breaks the rule of methods.py.
    """
    if parameter_name in NOT_PER_EXPERT:
        return False
    known, here = method_of(module), f"{name}.{parameter_name}"
    if known is not None:
        if parameter.ndim == 0 and known.is_largest(parameter_name):
            return False
        if not known.has_rows(parameter_name) and not known.is_largest(parameter_name):
            raise DwdpError(
                f"{here} {list(parameter.shape)} is no parameter that this release of dwdp knows of "
                f"{type(module.quant_method).__name__}, and may belong to no single expert: serve this model without dwdp"
            )
    elif parameter.ndim == 0:
        return False
    if parameter.ndim == 0 or parameter.shape[0] != share:
        rows = parameter.shape[0] if parameter.ndim else "no"
        raise DwdpError(f"{here} has {rows} rows for a share of {share} experts: dwdp does not know how to spread it")
    if not parameter.numel():
        raise DwdpError(f"{here} has empty rows {list(parameter.shape)}: dwdp does not know what its kernels read")
    if not parameter.is_contiguous():
        raise DwdpError(
            f"{here} {list(parameter.shape)} has strides {list(parameter.stride())}, which a slab would not keep: choose "
            "another --moe-backend"
        )
    return True


def tensors_of(build: ModelBuild) -> list[LayerTensors]:
    """What the loaded layers have to share; raises DwdpError for parameters that dwdp cannot spread."""
    refuse_tied(build)
    return [
        LayerTensors(layer, *expert_tensors(layer.module, len(build.built(layer)), layer.name))
        for layer in build.layers
    ]


def move_to_slabs(
    build: ModelBuild,
    transport: Transport,
    layers: Sequence[LayerTensors],
    paged: Sequence[PagedLayout] | None = None,
) -> list[LayerSlab]:
    """Copy the share of every layer into a slab, layer by layer, freeing the originals at once; or adopt its slabs, in which
    the experts that were built have to be what was read.

    One slab for the whole share would need twice the share for a moment; this needs one layer more.
    paged: by layer, where slabs are made of pages.
    """
    slabs: list[LayerSlab] = []
    rank = build.rank
    for number, found in enumerate(layers):
        placement = found.build.placement
        layout, pages = lay_out(found), paged[number] if paged else None
        if not build.platform.on_cpu:
            # The original of the layer before; slabs do not come from torch's allocator.
            torch.cuda.empty_cache()
        adopted = _adopted(build, number, layout.slabs[rank].nbytes)
        if adopted is not None:
            slab = cast("Adopting", transport).adopt_slab(adopted)
        elif pages is None:
            slab = transport.allocate_slab(layout.slabs[rank].nbytes)
        else:
            assert isinstance(transport, VmmTransport)
            slab = transport.allocate_pieces(pages.slabs[rank].sizes)
        layer = LayerSlab(found.build, found.fetched, found.replicated, layout, slab, paged=pages)
        flat = slab.tensor()
        for tensor in (*found.fetched, *found.replicated):
            for run in placement.runs(rank):
                if run.owner == rank:
                    rows = tensor.view(flat, layer.offset(rank, tensor.name, run.first), run.length)
                    if adopted is None:
                        rows.copy_(tensor.parameter.data[run.local : run.local + run.length])
                    elif run.local == 0:
                        _check_adopted(rows, tensor, found.build.name)
            # The original goes; until the layer has a view nobody reads what stands for it.
            tensor.parameter.data = rows
        slabs.append(layer)
    if not build.platform.on_cpu:
        # These copies run on torch's stream; with its handle a peer may read a slab at once.
        torch.cuda.synchronize()
    gc.collect()
    return slabs


def _adopted(build: ModelBuild, layer: int, nbytes: int) -> KeptSlab | None:
    """An adopted slab of `nbytes`, by its layer's number; None where nothing is adopted."""
    if build.apart is None or (files := build.apart.adopted) is None:
        return None
    if len(files) != len(build.layers) or files[layer].handle.nbytes != nbytes:
        raise DwdpError(
            f"the group holds {len(files)} slabs of this rank's share, which has {len(build.layers)} MoE layers, one of "
            f"{nbytes} bytes: start all ranks of the group again"
        )
    return files[layer]


def _check_adopted(rows: torch.Tensor, tensor: ExpertTensor, name: str) -> None:
    """Raise DwdpError where the expert that was read is not the adopted one, bit by bit."""
    if not torch.equal(rows[0].reshape(-1).view(torch.uint8), tensor.parameter.data[0].reshape(-1).view(torch.uint8)):
        raise DwdpError(
            f"{name}.{tensor.name} of the checkpoint is not what the group holds of this share in memory: start all ranks "
            "of the group again"
        )


def replicate_small(layer: LayerSlab, rank: int) -> int:
    """Give every replicated tensor of `layer` all its rows, from the owners; returns its bytes."""
    placement, nbytes = layer.build.placement, 0
    for tensor in layer.replicated:
        whole = torch.empty((placement.num_experts, *tensor.row_shape), dtype=tensor.dtype)
        for run in placement.runs(rank):
            offset = layer.offset(run.owner, tensor.name, run.first)
            source = tensor.view(layer.memory(run.owner).tensor(), offset, run.length)
            whole[run.first : run.first + run.length] = source
        tensor.parameter.data = whole.to(tensor.parameter.device)
        nbytes += whole.nbytes
    return nbytes
