"""The split view: kernels find every expert by its address, in the own slab or in a slot, and nothing is merged (GPUs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_dwdp.copy_plan import Layout, build_plan
from vllm_dwdp.layers import methods
from vllm_dwdp.layers.slabs import ExpertTensor, LayerSlab
from vllm_dwdp.prefetch.prefetcher import bind_plan
from vllm_dwdp.transport.base import CopyEngine, Memory, Program

if TYPE_CHECKING:
    from vllm_dwdp.kernels.weight_table import WeightTable

#: What the split-weight kernels fetch; everything else of a layer is small and replicated.
WEIGHTS = ("w13_weight", "w2_weight")


class SplitTables(NamedTuple):
    """(w13, w2) of a layer, twice. pulled: missing experts in the slot. direct: missing experts in their owners' slabs."""

    pulled: tuple[WeightTable, WeightTable]
    direct: tuple[WeightTable, WeightTable]


def why_not(layer: LayerSlab) -> str | None:
    """None where there is a split-weight kernel for `layer`; else what is wrong with "experts of <layer>"."""
    import torch

    if why := methods.why_not_split(getattr(layer.build.module, "quant_method", None)):
        return why
    fetched = tuple(tensor.name for tensor in layer.fetched)
    if fetched != WEIGHTS:
        return f"have no split-weight kernel (they fetch {', '.join(fetched)}, not just {' and '.join(WEIGHTS)})"
    known = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
    if layer.fetched[0].dtype not in known:
        return f"have no split-weight kernel (they are {layer.fetched[0].dtype})"
    return None


def addresses(layer: LayerSlab, rank: int, tensor: str, slot: Memory, layout: Layout) -> list[int]:
    """[expert] -> address of its row of `tensor`: in the own slab for the share, else in the slot, which has `layout`."""
    own = layer.layout.slabs[rank]
    return [
        layer.slab.address + own.offset(tensor, expert)
        if owner == rank
        else slot.address + layout.offset(tensor, expert)
        for expert, owner in enumerate(layer.build.placement.owners[rank])
    ]


def direct_addresses(layer: LayerSlab, rank: int, tensor: str) -> list[int]:
    """[expert] -> address of its row of `tensor` in the slab of the rank that `rank` takes it from, as for pulls."""
    return [
        layer.memory(owner).address + layer.layout.slabs[owner].offset(tensor, expert)
        for expert, owner in enumerate(layer.build.placement.owners[rank])
    ]


def slot_bytes(layers: Sequence[LayerSlab], rank: int) -> int:
    """Bytes of a slot of `rank` that fits any of `layers`."""
    return max(layer.layout.slot(rank, split=True).nbytes for layer in layers)


def attach(layer: LayerSlab, rank: int, slot: Memory, engine: CopyEngine, slice_bytes: int | None) -> Program:
    """Have the layer compute from `addresses` or `direct_addresses`; returns the copies that fill its slot.

    vLLM's code reads shapes off the parameters: they become [E, ...] tensors that repeat one row and cost no memory.
    """
    from vllm_dwdp.kernels.experts import SplitExperts, stand_in

    plan = build_plan(layer.layout, rank, slice_bytes, split=True)
    module: Any = layer.build.module
    pulled, direct = [], []
    for tensor in layer.fetched:
        where = addresses(layer, rank, tensor.name, slot, plan.slot)
        pulled.append(_table(module, tensor, where, layer.replicated))
        direct.append(_table(module, tensor, direct_addresses(layer, rank, tensor.name), layer.replicated))
        tensor.parameter.data = stand_in(pulled[-1])
    module.quant_method.experts_cls = SplitExperts
    module.dwdp_tables = SplitTables((pulled[0], pulled[1]), (direct[0], direct[1]))
    slabs = {owner: layer.memory(owner).address for owner in range(layer.build.placement.num_ranks)}
    return bind_plan(engine, plan, slabs, slot.address)


def _table(module: Any, tensor: ExpertTensor, where: list[int], small: tuple[ExpertTensor, ...]) -> WeightTable:
    from vllm_dwdp.kernels.experts import scales_of
    from vllm_dwdp.kernels.weight_table import WeightTable

    named = {other.name: other.parameter.data for other in small}
    prefix = tensor.name.removesuffix("_weight")
    rows, cols = tensor.row_shape
    scales = named.get(f"{prefix}_weight_scale_inv", named.get(f"{prefix}_weight_scale"))
    method = module.quant_method
    block = getattr(method, "moe_block_shape", getattr(method, "weight_block_size", None))
    return WeightTable.from_addresses(
        where,
        (len(where), rows, cols),
        tensor.dtype,
        tensor.parameter.device,
        scales=None if scales is None else scales_of(scales, block, rows),
        bias=named.get(f"{prefix}_bias"),
    )
