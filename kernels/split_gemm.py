"""Grouped GEMM of a MoE layer whose weights are given by a table of base addresses.

out[route] = a[route // top_k] @ weight[expert of route].T, for every route: a (token, top-k position) pair. Routes come
sorted by expert, each expert's padded to whole row blocks, as vLLM's `moe_align_block_size` sorts them. Tiles, order of
operations and rounding are those of vLLM's `fused_moe_kernel`, so that results are bitwise equal under equal tiles.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_dwdp.errors import DwdpError

from .tiles import Tiles
from .weight_table import WeightTable

# Constants of the kernels: what a scale covers.
NO_SCALE: tl.constexpr = tl.constexpr(0)
TENSOR: tl.constexpr = tl.constexpr(1)
ROWS: tl.constexpr = tl.constexpr(2)  # a channel of the weights, a token of the activations
BLOCKS: tl.constexpr = tl.constexpr(3)

# Constants of the kernels: how a tensor per expert is given.
ABSENT: tl.constexpr = tl.constexpr(0)
DENSE: tl.constexpr = tl.constexpr(1)
TABLE: tl.constexpr = tl.constexpr(2)

TL_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
}


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


@triton.jit
def expert_pointer(ptr, expert, stride, HOW: tl.constexpr, TYPE: tl.constexpr):
    """First element of a tensor per expert, dense or by table."""
    if HOW == TABLE:
        return tl.load(ptr + expert).to(tl.pointer_type(TYPE))
    return ptr + expert * stride


@triton.jit
def weight_pointer(table_ptr, expert, TYPE: tl.constexpr):
    """Base address of an expert's matrix; the table's constructor has checked what is promised here."""
    base = tl.load(table_ptr + expert).to(tl.pointer_type(TYPE))
    return tl.multiple_of(base, 16)


@triton.jit
def store_tile(
    acc, out_ptr, router_ptr, bias_base, a_scale, w_scale, routes, valid, column, N,
    stride_om, stride_on, stride_bn,
    COMPUTE_TYPE: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, MUL_ROUTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Dequantise, add the bias, weigh by the router, all in float32; round once and store."""
    columns = column + tl.arange(0, BLOCK_N)
    if SCALED:
        acc = acc * a_scale * w_scale
    if HAS_BIAS:
        bias = tl.load(bias_base + columns * stride_bn, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if MUL_ROUTER:
        weight = tl.load(router_ptr + routes, mask=valid, other=0)
        acc *= weight.to(tl.float32)[:, None]
    outs = out_ptr + stride_om * routes[:, None] + stride_on * columns[None, :]
    tl.store(outs, acc.to(COMPUTE_TYPE), mask=valid[:, None] & (columns[None, :] < N))


@triton.jit
def split_gemm_kernel(
    a_ptr, table_ptr, out_ptr, bias_ptr, a_scale_ptr, w_scale_ptr, router_ptr, routes_ptr, experts_ptr, padded_ptr,
    N, K, EM, num_routes,
    stride_am, stride_wn, stride_om, stride_on, stride_asm, stride_ask,
    stride_se, stride_sn, stride_sk, stride_be, stride_bn,
    WEIGHT_TYPE: tl.constexpr, COMPUTE_TYPE: tl.constexpr, BIAS_TYPE: tl.constexpr,
    W_SCALE: tl.constexpr, A_SCALE: tl.constexpr, HOW_SCALE: tl.constexpr, HOW_BIAS: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, TOP_K: tl.constexpr, MUL_ROUTER: tl.constexpr,
    SINGLE: tl.constexpr, SWAP: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M routes, BLOCK_N columns] per program.

    SINGLE: a block is one route. SWAP: compute the transposed tile, so that the long side of a flat tile lies where the
    matrix unit wants 64 rows. INTERPRETED: multiply in float32, since the interpreter multiplies the bits of bfloat16.
    """
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(EM, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    in_group = GROUP_M * blocks_n
    first_m = pid // in_group * GROUP_M
    group = min(blocks_m - first_m, GROUP_M)
    block_m = first_m + pid % in_group % group
    block_n = pid % in_group // group

    if block_m * BLOCK_M >= tl.load(padded_ptr):
        return
    # int64: a route times a row of the output can pass 2^31.
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    if SINGLE:
        routes = tl.where(rows == 0, block_m, num_routes).to(tl.int64)
    else:
        routes = tl.load(routes_ptr + block_m * BLOCK_M + rows).to(tl.int64)
    valid = routes < num_routes
    expert = tl.load(experts_ptr + block_m).to(tl.int64)
    if expert == -1:
        columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        outs = out_ptr + stride_om * routes[:, None] + stride_on * columns[None, :]
        nothing = tl.zeros((BLOCK_M, BLOCK_N), dtype=COMPUTE_TYPE)
        tl.store(outs, nothing, mask=valid[:, None] & (columns[None, :] < N))
        return

    tokens = routes // TOP_K
    # Columns past the end wrap around instead of being masked; they are not stored.
    wrapped = (block_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)) % N
    depth = tl.arange(0, BLOCK_K)
    weights = weight_pointer(table_ptr, expert, WEIGHT_TYPE)
    if SWAP:
        a_ptrs = a_ptr + (depth[:, None] + tokens[None, :] * stride_am)
        w_ptrs = weights + (wrapped[:, None] * stride_wn + depth[None, :])
    else:
        a_ptrs = a_ptr + (tokens[:, None] * stride_am + depth[None, :])
        w_ptrs = weights + (depth[:, None] + wrapped[None, :] * stride_wn)

    a_scale = 1.0
    w_scale = 1.0
    if W_SCALE != NO_SCALE:
        w_scale_base = expert_pointer(w_scale_ptr, expert, stride_se, HOW_SCALE, tl.float32)
        if W_SCALE == BLOCKS:
            w_scales = w_scale_base + wrapped // GROUP_N * stride_sn
        elif W_SCALE == ROWS:
            w_scale = tl.load(w_scale_base + wrapped * stride_sn)[None, :]
        else:
            w_scale = tl.load(w_scale_base)
        if A_SCALE == BLOCKS:
            a_scales = a_scale_ptr + tokens * stride_asm
        elif A_SCALE == ROWS:
            a_scale = tl.load(a_scale_ptr + tokens * stride_asm, mask=valid, other=0.0)[:, None]
        else:
            a_scale = tl.load(a_scale_ptr)

    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        left = K - step * BLOCK_K
        if SWAP:
            a = tl.load(a_ptrs, mask=(depth[:, None] < left) & valid[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=depth[None, :] < left, other=0.0)
        else:
            a = tl.load(a_ptrs, mask=valid[:, None] & (depth[None, :] < left), other=0.0)
            w = tl.load(w_ptrs, mask=depth[:, None] < left, other=0.0)
        if INTERPRETED:
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        if W_SCALE == BLOCKS:
            group_k = step * BLOCK_K // GROUP_K
            a_now = tl.load(a_scales + group_k * stride_ask, mask=valid, other=0.0)
            w_now = tl.load(w_scales + group_k * stride_sk)
            if SWAP:
                acc += tl.dot(w, a) * w_now[:, None] * a_now[None, :]
            else:
                acc += tl.dot(a, w) * a_now[:, None] * w_now[None, :]
        elif W_SCALE != NO_SCALE:
            # Given as acc, and not added: the matrix unit then keeps FP8 sums itself, as it does in vLLM's kernel.
            if SWAP:
                acc = tl.dot(w, a, acc=acc)
            else:
                acc = tl.dot(a, w, acc=acc)
        else:
            acc += tl.dot(a, w)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if SWAP:
        acc = tl.trans(acc, (1, 0))

    bias_base = bias_ptr
    if HOW_BIAS != ABSENT:
        bias_base = expert_pointer(bias_ptr, expert, stride_be, HOW_BIAS, BIAS_TYPE)
    SCALED: tl.constexpr = W_SCALE != NO_SCALE and W_SCALE != BLOCKS
    store_tile(
        acc, out_ptr, router_ptr, bias_base, a_scale, w_scale, routes, valid, block_n * BLOCK_N, N,
        stride_om, stride_on, stride_bn,
        COMPUTE_TYPE, SCALED, HOW_BIAS != ABSENT, MUL_ROUTER, BLOCK_N,
    )  # fmt: skip


#: Whether Triton was told to interpret (TRITON_INTERPRET=1 before its first import).
INTERPRETED = not isinstance(split_gemm_kernel, triton.JITFunction)

_KINDS = {"tensor": TENSOR.value, "channel": ROWS.value, "block": BLOCKS.value}


@lru_cache
def swaps(device: torch.device) -> bool:
    """Whether flat FP8 tiles are computed transposed there: where vLLM does, on compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


class Launch(NamedTuple):
    """Arguments of one launch, the same for both kernels: pointers, sizes and strides, then constants."""

    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    row_blocks: int
    column_blocks: int


def prepare(
    a: torch.Tensor,
    weights: WeightTable,
    out: torch.Tensor,
    assignment: Assignment,
    tiles: Tiles,
    top_k: int,
    router_weights: torch.Tensor | None,
    a_scale: torch.Tensor | None,
    compute_dtype: torch.dtype,
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
    scales, bias = weights.scales, weights.bias
    if (scales is None) != (a_scale is None):
        raise DwdpError(
            f"weights with{'out' if scales is None else ''} scales, activations the other way: give both or none"
        )
    routes = assignment.routes
    if routes is None:
        em = num_routes * tiles.block_m
    else:
        em = routes.shape[0]
        if a.shape[0] < tiles.block_m:
            # At most one block per route is in use.
            em = min(em, num_routes * tiles.block_m)
    block_k, w_kind, a_kind, a_strides = tiles.block_k, NO_SCALE.value, NO_SCALE.value, (0, 0)
    if scales is not None and a_scale is not None:
        w_kind = _KINDS[scales.kind]
        a_kind = w_kind if scales.kind == "block" else (TENSOR.value if a_scale.numel() == 1 else ROWS.value)
        if scales.kind == "block":
            block_k = min(block_k, *scales.group)
        if a_kind == TENSOR.value:
            a_scale = a_scale.reshape(1)
        else:
            a_strides = (a_scale.stride(0), a_scale.stride(1) if a_scale.ndim == 2 else 0)
    scale_strides = scales.values.strides if scales else (0, 0, 0)
    bias_strides = bias.strides if bias else (0, 0, 0)
    arguments = (
        a, weights.addresses, out, bias.data if bias else None, a_scale, scales.values.data if scales else None,
        router_weights, routes, assignment.experts, assignment.padded,
        weights.rows, weights.cols, em, num_routes,
        a.stride(0), weights.row_stride, out.stride(0), out.stride(1), *a_strides,
        *scale_strides, bias_strides[0], bias_strides[1],
    )  # fmt: skip
    constants = {
        "WEIGHT_TYPE": TL_DTYPES[weights.dtype],
        "COMPUTE_TYPE": TL_DTYPES[compute_dtype],
        "BIAS_TYPE": TL_DTYPES[bias.dtype] if bias else tl.float32,
        "W_SCALE": w_kind,
        "A_SCALE": a_kind,
        "HOW_SCALE": _how(scales.values.is_table) if scales else ABSENT.value,
        "HOW_BIAS": _how(bias.is_table) if bias else ABSENT.value,
        "GROUP_N": scales.group[0] if scales else 0,
        "GROUP_K": scales.group[1] if scales else 0,
        "TOP_K": top_k,
        "MUL_ROUTER": router_weights is not None,
        "INTERPRETED": INTERPRETED,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": block_k,
        "GROUP_M": tiles.group_m,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    return Launch(arguments, constants, -(-em // tiles.block_m), -(-weights.rows // tiles.block_n))


def _how(is_table: bool) -> int:
    return int(TABLE.value if is_table else DENSE.value)


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
    launch = prepare(a, weights, out, assignment, tiles, top_k, router_weights, a_scale, compute_dtype or out.dtype)
    if tiles.kernel == "persistent":
        from .persistent import launch_persistent

        if assignment.routes is not None:
            launch_persistent(launch, a.device)
            return
    flat = weights.scales is not None and tiles.block_m < 64 <= tiles.block_n
    split_gemm_kernel[(launch.row_blocks * launch.column_blocks,)](
        *launch.arguments, **launch.constants, SINGLE=assignment.routes is None, SWAP=flat and swaps(a.device)
    )
