"""A MoE layer over split memory: both GEMMs, the activation between them, the top-k reduction."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from vllm_dwdp.errors import DwdpError

from .split_gemm import split_gemm
from .tiles import Tiles
from .torch_ops import MoeOps
from .weight_table import WeightTable

#: Where the router's weights are multiplied: onto the second GEMM's result, onto the first one's, or not here.
RouterWeight = Literal["output", "input", "none"]


@dataclass(frozen=True)
class Workspace:
    """Memory of the compute dtype that `split_experts` may overwrite, used from the front.

    Attributes:
        activated: for M * top_k rows of the activation's width.
        gemm: for M * top_k rows of max(2 I, H); the second GEMM overwrites the first one's result.
    """

    activated: torch.Tensor
    gemm: torch.Tensor

    @classmethod
    def allocate(cls, num_routes: int, width: int, w13: WeightTable, w2: WeightTable, like: torch.Tensor) -> Workspace:
        """As large as a layer of `num_routes` routes needs, in the dtype and on the device of `like`."""
        return cls(like.new_empty(num_routes * width), like.new_empty(num_routes * max(w13.rows, w2.rows)))


def _part(memory: torch.Tensor, *shape: int) -> torch.Tensor:
    if memory.numel() < prod(shape):
        raise DwdpError(f"workspace of {memory.numel()} elements for {shape}: needs {prod(shape)}")
    return memory.flatten()[: prod(shape)].view(shape)


def check_layer(w13: WeightTable, w2: WeightTable, width: int) -> None:
    """Raise DwdpError unless the two matrices belong to one layer; for set-up, not per step."""
    if w13.num_experts != w2.num_experts or w2.rows != w13.cols or w2.cols != width or w13.dtype != w2.dtype:
        raise DwdpError(
            f"w13 of {w13.num_experts} experts {w13.rows} x {w13.cols} {w13.dtype} beside w2 of {w2.num_experts} experts "
            f"{w2.rows} x {w2.cols} {w2.dtype}: needs as many experts, {w13.cols} x {width} and one dtype"
        )


def split_experts(
    hidden: torch.Tensor,
    w13: WeightTable,
    w2: WeightTable,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    ops: MoeOps,
    tiles: Tiles,
    router_weight: RouterWeight = "output",
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    out: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The routed experts of one layer, on the current stream, without a synchronisation.

    Args:
        hidden: [M, H]; of the weights' dtype, or of the model's for FP8 weights (then quantised here); FP8 comes with
            `a1_scale`. Rows at any distance.
        w13: [E] tables of [2 I, H] (gate and up, as the activation of `ops` wants them).
        w2: [E] tables of [H, I].
        topk_weights: [M, top_k], contiguous; float32 as routers give it.
        topk_ids: int [M, top_k], each in 0..E-1: rows without an expert would add what the workspace held.
        ops: sorting, activation, quantisation, reduction; `torch_ops.TorchOps` or `vllm_ops.VllmOps`.
        a1_scale, a2_scale: scales of the GEMMs' FP8 inputs: with FP8 `hidden` its own, otherwise static ones.
        workspace: allocated if not given.
        out: [M, H], allocated if not given.
        compute_dtype: of the GEMMs' results; by default the workspace's.

    Returns:
        [M, H].

    Raises:
        DwdpError: shapes or dtypes that do not fit each other.
    """
    num_tokens, top_k = topk_ids.shape
    num_routes, width = num_tokens * top_k, ops.width(w13.rows)
    if hidden.shape[0] != num_tokens or topk_weights.shape != topk_ids.shape:
        raise DwdpError(
            f"{hidden.shape[0]} tokens with ids {tuple(topk_ids.shape)} and router weights {tuple(topk_weights.shape)}: "
            "all must be of one batch"
        )
    quantized_here = hidden.dtype.itemsize > w13.dtype.itemsize
    if out is None:
        out = torch.empty(num_tokens, w2.rows, dtype=_result_dtype(hidden, compute_dtype), device=hidden.device)
    if num_tokens == 0:
        return out
    if workspace is None:
        workspace = Workspace.allocate(num_routes, width, w13, w2, out)
    check_layer(w13, w2, width)
    gate_up = _part(workspace.gemm, num_routes, w13.rows)
    activated = _part(workspace.activated, num_routes, width)
    partial = _part(workspace.gemm, num_routes, w2.rows)
    if quantized_here:
        hidden, a1_scale = ops.quantize(hidden, a1_scale)

    assignment = ops.assign(topk_ids, tiles.block_m, w13.num_experts)
    split_gemm(
        hidden, w13, gate_up, assignment, tiles, top_k=top_k, a_scale=a1_scale, compute_dtype=compute_dtype,
        router_weights=topk_weights if router_weight == "input" else None,
    )  # fmt: skip
    second, second_scale = ops.activate_quantize(activated, gate_up, a2_scale)
    split_gemm(
        second, w2, partial, assignment, tiles, top_k=1, a_scale=second_scale, compute_dtype=compute_dtype,
        router_weights=topk_weights if router_weight == "output" else None,
    )  # fmt: skip
    ops.reduce(partial.view(num_tokens, top_k, w2.rows), out)
    return out


def _result_dtype(hidden: torch.Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    if hidden.dtype.itemsize > 1:
        return hidden.dtype
    return compute_dtype or torch.bfloat16
