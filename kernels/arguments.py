"""What a grouped GEMM is given, checked and laid out for its kernels; no device work."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vllm_dwdp.errors import DwdpError

from .tile_math import BLOCKS, NO_SCALE, ROWS, TENSOR
from .tiles import Tiles
from .weight_table import WeightTable


class Assignment(NamedTuple):
    """Which routes each row block computes, and with which expert.

    Attributes:
        routes: int32 [EM], sorted by expert and padded with num_routes; None: block i computes route i alone.
        experts: int [blocks], the expert of a block; -1 writes zeros.
        padded: int32 [1], how many of `routes` are in use, on the device.
    """

    routes: torch.Tensor | None
    experts: torch.Tensor
    padded: torch.Tensor


class Launch(NamedTuple):
    """Arguments of one launch, the same for both kernels: pointers, then sizes and strides; and what follows from them.

    row_blocks, column_blocks: of the output, at most. a_kind: what a scale of the activations covers.
    """

    pointers: tuple[torch.Tensor | None, ...]
    numbers: tuple[int, ...]
    row_blocks: int
    column_blocks: int
    a_kind: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the kernels' order."""
        return self.pointers + self.numbers


def padded_routes(room: int | None, rows: int, num_routes: int, block_m: int) -> int:
    """Routes of a launch with their padding, at most. room: of the sorted ones; None where a block is one route."""
    # With fewer rows than a block has, at most one block per route is in use.
    return num_routes * block_m if room is None else min(room, num_routes * block_m) if rows < block_m else room


def prepare(
    a: torch.Tensor,
    weights: WeightTable,
    out: torch.Tensor,
    assignment: Assignment,
    tiles: Tiles,
    top_k: int,
    router_weights: torch.Tensor | None,
    a_scale: torch.Tensor | None,
) -> Launch:
    """Check the arguments of `split_gemm` and lay them out for a kernel; no device work, no synchronisation."""
    num_routes = a.shape[0] * top_k
    if a.shape[1] != weights.cols or out.shape != (num_routes, weights.rows) or a.stride(1) != 1:
        raise DwdpError(
            f"split GEMM of {tuple(a.shape)} (strides {a.stride()}) with experts of {weights.rows} x {weights.cols} into "
            f"{tuple(out.shape)}: needs [M, {weights.cols}] with adjacent elements and [{num_routes}, {weights.rows}]"
        )
    if a.dtype != weights.dtype:
        raise DwdpError(f"split GEMM of {a.dtype} with weights of {weights.dtype}: both must be the same")
    scales = weights.scales
    if (scales is None) != (a_scale is None):
        raise DwdpError(
            f"weights with{'out' if scales is None else ''} scales, activations the other way: give both or none"
        )
    routes = assignment.routes
    em = padded_routes(None if routes is None else routes.shape[0], a.shape[0], num_routes, tiles.block_m)
    a_kind, a_strides = NO_SCALE.value, (0, 0)
    if scales is not None and a_scale is not None:
        a_kind = BLOCKS.value if scales.kind == "block" else (TENSOR.value if a_scale.numel() == 1 else ROWS.value)
        if a_kind == TENSOR.value:
            a_scale = a_scale.reshape(1)
        else:
            a_strides = (a_scale.stride(0), a_scale.stride(1) if a_scale.ndim == 2 else 0)
    pointers = (
        a, weights.addresses, out, weights.bias, a_scale, scales.values if scales else None,
        router_weights, routes, assignment.experts, assignment.padded,
    )  # fmt: skip
    numbers = (
        weights.rows, weights.cols, em, num_routes,
        a.stride(0), weights.row_stride, out.stride(0), out.stride(1), *a_strides,
        *weights.strides,
    )  # fmt: skip
    return Launch(pointers, numbers, -(-em // tiles.block_m), -(-weights.rows // tiles.block_n), a_kind)
