"""What one tile of the grouped GEMM computes, whichever way its weights are fetched; shared by both kernels.

The order of operations and the rounding are those of vLLM's `fused_moe_kernel`, so that results are bitwise equal to its
under equal tiles. Whatever the end of a tile needs (bias, router weights) is loaded before the loop over K, so that its
latency is hidden there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import Tiles

# Constants of the kernels: what a scale covers.
NO_SCALE: tl.constexpr = tl.constexpr(0)
TENSOR: tl.constexpr = tl.constexpr(1)
ROWS: tl.constexpr = tl.constexpr(2)  # a channel of the weights, a token of the activations
BLOCKS: tl.constexpr = tl.constexpr(3)


@triton.jit
def tile_place(tile, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """(row block, column block) of a tile: GROUP_M row blocks share a column block before the next one is begun."""
    in_group = GROUP_M * blocks_n
    first_m = tile // in_group * GROUP_M
    group = min(blocks_m - first_m, GROUP_M)
    return first_m + tile % in_group % group, tile % in_group // group


#: Whether Triton was told to interpret (TRITON_INTERPRET=1 before its first import).
INTERPRETED = not isinstance(tile_place, triton.JITFunction)


def halves(tiles: Tiles) -> bool:
    """Whether half-filled blocks are computed as half tiles: where the matrix unit still has its 64 rows then."""
    return tiles.block_m >= (32 if INTERPRETED else 128)


@triton.jit
def compute_tile(
    a_ptr, weights, place, out_ptr, bias_ptr, a_scale_ptr, w_scale_ptr, router_ptr,
    routes, readable, expert, column, N, K, num_routes,
    stride_am, stride_wn, stride_om, stride_on, stride_asm, stride_ask,
    stride_se, stride_sn, stride_sk, stride_be, stride_bn,
    COMPUTE_TYPE: tl.constexpr, W_SCALE: tl.constexpr, A_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, TOP_K: tl.constexpr, MUL_ROUTER: tl.constexpr,
    SWAP: tl.constexpr, DESCRIPTOR: tl.constexpr, EVEN_K: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute and store out[routes, column : column + BLOCK_N].

    weights: base address of the expert's matrix, or (DESCRIPTOR) the descriptor of all, in which it begins at `place`.
    routes: int32 [BLOCK_M]. readable: num_routes, or 0 to write zeros. SWAP: compute the transposed tile, so that the long
    side of a flat tile lies where the matrix unit wants 64 rows. INTERPRETED: multiply in float32, since the interpreter
    multiplies the bits of bfloat16.
    """
    valid = routes < num_routes
    reads = routes < readable
    # int64 from here on: a route times a row of the output can pass 2^31.
    tokens = (routes // TOP_K).to(tl.int64)
    columns = column + tl.arange(0, BLOCK_N)
    # Columns past the end read the last one instead of being masked; they are not stored.
    inside = tl.minimum(columns, N - 1).to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    if SWAP:
        a_ptrs = a_ptr + (depth[:, None] + tokens[None, :] * stride_am)
    else:
        a_ptrs = a_ptr + (tokens[:, None] * stride_am + depth[None, :])
    if not DESCRIPTOR:
        if SWAP:
            w_ptrs = weights + (inside[:, None] * stride_wn + depth[None, :])
        else:
            w_ptrs = weights + (depth[:, None] + inside[None, :] * stride_wn)

    # One scale for all columns of the tile: the same products, without a pointer and a load per column.
    ONE_GROUP: tl.constexpr = W_SCALE == BLOCKS and GROUP_N % BLOCK_N == 0
    a_scale = 1.0
    w_scale = 1.0
    if W_SCALE != NO_SCALE:
        w_scale_base = w_scale_ptr + expert * stride_se
        if W_SCALE == BLOCKS:
            if ONE_GROUP:
                w_scales = w_scale_base + column // GROUP_N * stride_sn
            else:
                w_scales = w_scale_base + inside // GROUP_N * stride_sn
        elif W_SCALE == ROWS:
            w_scale = tl.load(w_scale_base + inside * stride_sn)[None, :]
        else:
            w_scale = tl.load(w_scale_base)
        if A_SCALE == BLOCKS:
            a_scales = a_scale_ptr + tokens * stride_asm
        elif A_SCALE == ROWS:
            a_scale = tl.load(a_scale_ptr + tokens * stride_asm, mask=reads, other=0.0)[:, None]
        else:
            a_scale = tl.load(a_scale_ptr)
    if HAS_BIAS:
        bias_base = bias_ptr + expert * stride_be
        biased = tl.where(readable > 0, N, 0)
        bias = tl.load(bias_base + columns * stride_bn, mask=columns < biased, other=0.0)
    if MUL_ROUTER:
        router = tl.load(router_ptr + routes, mask=valid, other=0)

    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        left = K - step * BLOCK_K
        if SWAP:
            a_mask = reads[None, :] if EVEN_K else (depth[:, None] < left) & reads[None, :]
        else:
            a_mask = reads[:, None] if EVEN_K else reads[:, None] & (depth[None, :] < left)
        a = tl.load(a_ptrs, mask=a_mask, other=0.0)
        if DESCRIPTOR:
            w = weights.load([place, column, step * BLOCK_K]).reshape(BLOCK_N, BLOCK_K).T
        elif EVEN_K:
            w = tl.load(w_ptrs)
        elif SWAP:
            w = tl.load(w_ptrs, mask=depth[None, :] < left, other=0.0)
        else:
            w = tl.load(w_ptrs, mask=depth[:, None] < left, other=0.0)
        if INTERPRETED:
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        if W_SCALE == BLOCKS:
            group_k = step * BLOCK_K // GROUP_K
            a_now = tl.load(a_scales + group_k * stride_ask, mask=reads, other=0.0)
            w_now = tl.load(w_scales + group_k * stride_sk)
            if ONE_GROUP:
                if SWAP:
                    acc += tl.dot(w, a) * w_now * a_now[None, :]
                else:
                    acc += tl.dot(a, w) * a_now[:, None] * w_now
            elif SWAP:
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
        if not DESCRIPTOR:
            w_ptrs += BLOCK_K
    if SWAP:
        acc = tl.trans(acc, (1, 0))

    # Dequantise, add the bias, weigh by the router, all in float32; round once.
    if W_SCALE != NO_SCALE and W_SCALE != BLOCKS:
        acc = acc * a_scale * w_scale
    if HAS_BIAS:
        acc += bias.to(tl.float32)[None, :]
    if MUL_ROUTER:
        acc *= router.to(tl.float32)[:, None]
    outs = out_ptr + stride_om * routes.to(tl.int64)[:, None] + stride_on * columns[None, :]
    tl.store(outs, acc.to(COMPUTE_TYPE), mask=valid[:, None] & (columns[None, :] < N))
