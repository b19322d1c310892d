"""Moves the share of each MoE layer into a slab and maps the slabs of the peers."""

from __future__ import annotations

import gc
import mmap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from vllm_dwdp.copy_plan import ALIGNMENT, LayerLayout, TensorSpec
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import LayerBuild, ModelBuild
from vllm_dwdp.layers.tied import refuse_tied
from vllm_dwdp.transport.base import Handle, Memory, PeerSlab, Slab, Transport

if TYPE_CHECKING:
    from vllm_dwdp.group.rendezvous import Rendezvous
    from vllm_dwdp.transport.memfd import MemoryFile
    from vllm_dwdp.transport.shm import ShmPeerSlab, ShmTransport

#: Tensors of at most this part of an expert (biases, scales) are replicated at start instead of fetched per forward.
REPLICATED_PART = 0.01

#: Parameters of a RoutedExperts layer that do not have one row per expert of the share.
NOT_PER_EXPERT = frozenset({"e_score_correction_bias", "hash_indices_table"})


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
class LayerSlab:
    """The share of one layer in its slab, and the peers' slabs of that layer.

    Attributes:
        fetched: tensors that a forward needs from peers (or reads in place).
        replicated: small tensors copied from peers once.
        layout: where the bytes of any rank are, in slabs and in slots.
        peers: rank in the group -> its slab, mapped read-only.
    """

    build: LayerBuild
    fetched: tuple[ExpertTensor, ...]
    replicated: tuple[ExpertTensor, ...]
    layout: LayerLayout
    slab: Slab
    peers: dict[int, PeerSlab] = field(default_factory=dict)

    def memory(self, rank: int) -> Memory:
        """The slab of `rank`, own or mapped."""
        return self.peers.get(rank, self.slab)


def lay_out(layer: LayerBuild, fetched: tuple[ExpertTensor, ...], replicated: tuple[ExpertTensor, ...]) -> LayerLayout:
    """The layout of a layer on all ranks; tensors begin on pages where peers may map them one by one."""
    specs = [TensorSpec(tensor.name, tensor.row_bytes) for tensor in fetched]
    specs += [TensorSpec(tensor.name, tensor.row_bytes, fetched=False) for tensor in replicated]
    return LayerLayout(layer.placement, tuple(specs), mmap.PAGESIZE if layer.on_pages else ALIGNMENT)


def expert_tensors(module: Any, share: int, name: str) -> tuple[tuple[ExpertTensor, ...], tuple[ExpertTensor, ...]]:
    """(fetched, replicated) parameters of a loaded layer; raises DwdpError for one whose layout we cannot share."""
    tensors: list[ExpertTensor] = []
    for parameter_name, parameter in module.named_parameters():
        if parameter_name in NOT_PER_EXPERT or parameter.ndim == 0:
            continue
        if parameter.shape[0] != share:
            raise DwdpError(
                f"{name}.{parameter_name} has {parameter.shape[0]} rows for a share of {share} experts: "
                "dwdp does not know how to spread it"
            )
        row = parameter.data[0]
        tensors.append(
            ExpertTensor(parameter_name, parameter, tuple(row.shape), row.numel() * row.element_size(), parameter.dtype)
        )
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


def move_to_slabs(build: ModelBuild, transport: Transport) -> list[LayerSlab]:
    """Copy the share of every layer into a slab, layer by layer, freeing the originals at once.

    One slab for the whole share would need twice the share for a moment; this needs one layer more.
    """
    refuse_tied(build)
    slabs: list[LayerSlab] = []
    for layer in build.layers:
        share = layer.placement.shares[build.rank]
        fetched, replicated = expert_tensors(layer.module, len(share), layer.name)
        layout = lay_out(layer, fetched, replicated)
        if not build.platform.on_cpu:
            # The original of the layer before; slabs do not come from torch's allocator.
            torch.cuda.empty_cache()
        own = layout.slabs[build.rank]
        adopted = _adopted(build, len(slabs), own.nbytes)
        if adopted is None:
            slab = transport.allocate_slab(own.nbytes)
        else:
            slab = cast("ShmTransport", transport).adopt_slab(adopted)
        flat = slab.tensor()
        for tensor in (*fetched, *replicated):
            rows = tensor.view(flat, own.begin(tensor.name), len(share))
            if adopted is None:
                rows.copy_(tensor.parameter.data)
            else:
                _check_adopted(rows, tensor, layer.name)
            tensor.parameter.data = rows
        slabs.append(LayerSlab(layer, fetched, replicated, layout, slab))
    if not build.platform.on_cpu:
        # These copies run on torch's stream; with its handle a peer may read a slab at once.
        torch.cuda.synchronize()
    gc.collect()
    return slabs


def _adopted(build: ModelBuild, layer: int, nbytes: int) -> MemoryFile | None:
    """An adopted slab of `nbytes`, by its layer's number; None where nothing is adopted."""
    if build.apart is None or (files := build.apart.adopted) is None:
        return None
    if len(files) != len(build.layers) or files[layer].handle.nbytes != nbytes:
        raise DwdpError(
            f"the group holds {len(files)} slabs of this rank, which has {len(build.layers)} MoE layers, one of {nbytes} "
            "bytes: start all ranks of the group again"
        )
    return files[layer]


def _check_adopted(rows: torch.Tensor, tensor: ExpertTensor, name: str) -> None:
    """Raise DwdpError where the expert that was read is not the adopted one, bit by bit."""
    if not torch.equal(rows[0].reshape(-1).view(torch.uint8), tensor.parameter.data[0].reshape(-1).view(torch.uint8)):
        raise DwdpError(
            f"{name}.{tensor.name} of the checkpoint is not what the group holds of this rank in memory: start all ranks of "
            "the group again"
        )


def map_peers(
    slabs: list[LayerSlab], build: ModelBuild, transport: Transport, rendezvous: Rendezvous, group: list[int]
) -> None:
    """Exchange the handles of all slabs over `group` and map every peer's."""
    mine = [transport.export_handle(layer.slab).to_dict() for layer in slabs]
    for peer, handles in enumerate(rendezvous.gather("slabs", mine, group)):
        if peer == build.rank:
            continue
        if len(handles) != len(slabs):
            raise DwdpError(f"rank {group[peer]} has {len(handles)} MoE layers, rank {group[build.rank]} {len(slabs)}")
        for layer, handle in zip(slabs, handles, strict=True):
            layer.peers[peer] = transport.map_peer(Handle.from_dict(handle))
    if build.apart is not None:
        # With handles of this process's own.
        build.apart.hold(
            {
                group[peer]: [cast("ShmPeerSlab", layer.peers[peer]).handle.to_dict() for layer in slabs]
                for peer in slabs[0].peers
            }
        )


def replicate_small(layer: LayerSlab, rank: int) -> int:
    """Give every replicated tensor of `layer` all its rows, from the owners; returns its bytes."""
    placement, nbytes = layer.build.placement, 0
    for tensor in layer.replicated:
        whole = torch.empty((placement.num_experts, *tensor.row_shape), dtype=tensor.dtype)
        for run in placement.runs(rank):
            offset = layer.layout.slabs[run.owner].offset(tensor.name, run.first)
            source = tensor.view(layer.memory(run.owner).tensor(), offset, run.length)
            whole[run.first : run.first + run.length] = source
        tensor.parameter.data = whole.to(tensor.parameter.device)
        nbytes += whole.nbytes
    return nbytes
