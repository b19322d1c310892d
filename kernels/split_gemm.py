"""Grouped GEMM of a MoE layer whose weights are given by a table of base addresses.

out[route] = a[route // top_k] @ weight[expert of route].T, for every route: a (token, top-k position) pair. Routes come
sorted by expert, each expert's padded to whole row blocks, as vLLM's `moe_align_block_size` sorts them. Tiles, order of
operations and rounding are those of vLLM's `fused_moe_kernel`, so that results are bitwise equal under equal tiles.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from . import launching, persistent
from .arguments import Assignment, Launch, prepare
from .block_order import joined_routes, order, spread_block
from .tile_math import BLOCKS, INTERPRETED, NO_SCALE, ROWS, TENSOR, compute_tile, halves, tile_place
from .tiles import Tiles
from .weight_table import WeightTable

TL_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
}


@triton.jit
def split_gemm_kernel(
    a_ptr, table_ptr, out_ptr, bias_ptr, a_scale_ptr, w_scale_ptr, router_ptr, routes_ptr, experts_ptr, padded_ptr,
    N, K, EM, num_routes,
    stride_am, stride_wn, stride_om, stride_on, stride_asm, stride_ask,
    stride_se, stride_sn, stride_sk, stride_be, stride_bn,
    WEIGHT_TYPE: tl.constexpr, COMPUTE_TYPE: tl.constexpr,
    W_SCALE: tl.constexpr, A_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, TOP_K: tl.constexpr, MUL_ROUTER: tl.constexpr,
    EVEN_K: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HALVES: tl.constexpr, SINGLE: tl.constexpr, SWAP: tl.constexpr, SPREAD: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M routes, BLOCK_N columns] per program.

    SINGLE: a block is one route. HALVES: a block of which half or less is filled is computed as a tile of half the height.
    SPREAD: see `Tiles`. JOIN: 0, or the room for all single routes, of which the first of an expert computes the others too.
    """
    block_m, block_n = tile_place(tl.program_id(0), tl.cdiv(EM, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    if SPREAD > 1:
        block_m = spread_block(block_m, tl.load(padded_ptr) // BLOCK_M, SPREAD)
    # The three loads do not wait for each other. A block past the padded ones holds rubbish, and no address is looked up
    # for it; with single routes every block is in use.
    expert = tl.load(experts_ptr + block_m).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    begin = block_m * BLOCK_M
    if JOIN > 0:
        routes, before = joined_routes(experts_ptr, block_m, expert, num_routes, BLOCK_M, JOIN)
        if before % BLOCK_M != 0:
            return
    elif SINGLE:
        routes = tl.where(rows == 0, block_m, num_routes)
    else:
        routes = tl.load(routes_ptr + begin + rows, mask=begin + rows < EM, other=num_routes)
        if HALVES:
            half = begin + tl.arange(0, BLOCK_M // 2)
            upper = tl.load(routes_ptr + half, mask=half < EM, other=num_routes)
            lower = tl.load(routes_ptr + min(begin + BLOCK_M // 2, EM - 1))
        if begin >= tl.load(padded_ptr):
            return
    if expert == -1:
        columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        outs = out_ptr + stride_om * routes.to(tl.int64)[:, None] + stride_on * columns[None, :]
        nothing = tl.zeros((BLOCK_M, BLOCK_N), dtype=COMPUTE_TYPE)
        tl.store(outs, nothing, mask=(routes < num_routes)[:, None] & (columns[None, :] < N))
        return

    # The constructor of the table has checked what is promised here.
    weights = tl.multiple_of(tl.load(table_ptr + expert).to(tl.pointer_type(WEIGHT_TYPE)), 16)
    if HALVES:
        small = lower >= num_routes
    else:
        small: tl.constexpr = False  # type: ignore[no-redef]
    if small:
        compute_tile(
            a_ptr, weights, 0, out_ptr, bias_ptr, a_scale_ptr, w_scale_ptr, router_ptr,
            upper, num_routes, expert, block_n * BLOCK_N, N, K, num_routes,
            stride_am, stride_wn, stride_om, stride_on, stride_asm, stride_ask,
            stride_se, stride_sn, stride_sk, stride_be, stride_bn,
            COMPUTE_TYPE, W_SCALE, A_SCALE, HAS_BIAS, GROUP_N, GROUP_K, TOP_K, MUL_ROUTER,
            SWAP, False, EVEN_K, INTERPRETED, BLOCK_M // 2, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        compute_tile(
            a_ptr, weights, 0, out_ptr, bias_ptr, a_scale_ptr, w_scale_ptr, router_ptr,
            routes, num_routes, expert, block_n * BLOCK_N, N, K, num_routes,
            stride_am, stride_wn, stride_om, stride_on, stride_asm, stride_ask,
            stride_se, stride_sn, stride_sk, stride_be, stride_bn,
            COMPUTE_TYPE, W_SCALE, A_SCALE, HAS_BIAS, GROUP_N, GROUP_K, TOP_K, MUL_ROUTER,
            SWAP, False, EVEN_K, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


_KINDS = {"tensor": TENSOR.value, "channel": ROWS.value, "block": BLOCKS.value}


@lru_cache
def swaps(device: torch.device) -> bool:
    """Whether flat FP8 tiles are computed transposed there: where vLLM does, on compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def constants_of(
    launch: Launch, weights: WeightTable, tiles: Tiles, top_k: int, compute_dtype: torch.dtype
) -> dict[str, Any]:
    """The constants that both kernels take, and Triton's options."""
    *_, router_weights, _, _, _ = launch.pointers
    scales = weights.scales
    block_k = min(tiles.block_k, *scales.group) if scales and scales.kind == "block" else tiles.block_k
    return {
        "WEIGHT_TYPE": TL_DTYPES[weights.dtype],
        "COMPUTE_TYPE": TL_DTYPES[compute_dtype],
        "W_SCALE": _KINDS[scales.kind] if scales else NO_SCALE.value,
        "A_SCALE": launch.a_kind,
        "HAS_BIAS": weights.bias is not None,
        "GROUP_N": scales.group[0] if scales else 0,
        "GROUP_K": scales.group[1] if scales else 0,
        "TOP_K": top_k,
        "MUL_ROUTER": router_weights is not None,
        "EVEN_K": weights.cols % block_k == 0,
        "INTERPRETED": INTERPRETED,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": block_k,
        "GROUP_M": tiles.group_m,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def split_gemm(
    a: torch.Tensor,
    weights: WeightTable,
    out: torch.Tensor,
    assignment: Assignment,
    tiles: Tiles,
    *,
    top_k: int,
    router_weights: torch.Tensor | None = None,
    a_scale: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Compute out[route] = a[route // top_k] @ weights[expert of route].T on the current stream.

    Args:
        a: [M, K] of the weights' dtype, rows at any distance.
        out: [M * top_k, N], written; rows of routes that are not assigned stay as they are.
        assignment: made for `tiles.block_m`.
        top_k: routes per row of `a`; 1 where `a` has a row per route.
        router_weights: multiplied onto the result if given; [M * top_k] entries, contiguous.
        a_scale: float32 scales of FP8 activations: [M, K / group_k] for block scales, [M, 1] per token, one per tensor.
        compute_dtype: what results are rounded to, `out.dtype` if not given.

    Raises:
        DwdpError: shapes or dtypes that do not fit each other.
    """
    compute = compute_dtype or out.dtype
    laid_out = prepare(a, weights, out, assignment, tiles, top_k, router_weights, a_scale)
    key: tuple[Any, ...] | None = None
    if launching.aligned(laid_out.pointers):
        dtypes = tuple(None if tensor is None else tensor.dtype for tensor in laid_out.pointers)
        key = (weights.kind, tiles, top_k, laid_out.a_kind, compute, dtypes, laid_out.numbers)
        if (known := launching.find(key)) is not None:
            known.launch(laid_out.arguments + _more(weights, known.persistent))
            return
    planned = _planned(laid_out, weights, assignment, tiles, top_k, compute)
    launching.launch(key, planned, laid_out.arguments + _more(weights, planned.persistent))


def compile_gemm(
    a: torch.Tensor, weights: WeightTable, out: torch.Tensor, assignment: Assignment, tiles: Tiles, *, top_k: int,
    router_weights: torch.Tensor | None = None, a_scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Compile what `split_gemm` would launch, and launch nothing; tensors may be on the device `meta`."""
    laid_out = prepare(a, weights, out, assignment, tiles, top_k, router_weights, a_scale)
    planned = _planned(laid_out, weights, assignment, tiles, top_k, out.dtype)
    pointers = (tensor.dtype if tensor is not None and tensor.is_meta else tensor for tensor in laid_out.pointers)
    arguments = (*pointers, *laid_out.numbers, *_more(weights, planned.persistent))
    planned.function.warmup(*arguments, grid=planned.grid, **planned.constants)


def _more(weights: WeightTable, described: bool) -> tuple[int, ...]:
    """What follows the common arguments."""
    if not described:
        return ()
    persistent.give_memory()
    return (weights.origin,)


def _planned(
    laid_out: Launch, weights: WeightTable, assignment: Assignment, tiles: Tiles, top_k: int, compute_dtype: torch.dtype
) -> launching.Planned:
    constants, device = constants_of(laid_out, weights, tiles, top_k, compute_dtype), weights.addresses.device
    if tiles.kernel == "persistent" and persistent.describable(constants["EVEN_K"], weights, assignment):
        return persistent.planned(laid_out, constants, weights, tiles)
    grid = (laid_out.row_blocks * laid_out.column_blocks,)
    single_routes = assignment.experts.numel() if assignment.routes is None else 0
    constants |= variant(weights, assignment, tiles, device) | order(single_routes, tiles)
    return launching.Planned(split_gemm_kernel, grid, constants, False)


def variant(weights: WeightTable, assignment: Assignment, tiles: Tiles, device: torch.device) -> dict[str, bool]:
    """Constants of the pointer kernel alone."""
    flat = weights.scales is not None and tiles.block_m < 64 <= tiles.block_n
    single = assignment.routes is None
    return {"SINGLE": single, "SWAP": flat and swaps(device), "HALVES": not single and halves(tiles)}
