"""The grouped GEMM of split_gemm.py on a fixed grid, with the weights read through tensor descriptors (TMA on sm_90).

One program per multiprocessor takes tiles in turn, so that no launch ends in a half-empty wave per row block. The weights'
tile is fetched by the copy hardware and needs no address arithmetic; the routes' rows are gathered by pointers. Tiles are
ordered expert by expert with row blocks inside, so that an expert's weights are read while they are in the L2 cache.
A descriptor is made per tile, from the expert's base address: hundreds of steps over K outweigh it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from vllm_dwdp.errors import DwdpError

from .split_gemm import ABSENT, BLOCKS, NO_SCALE, ROWS, Launch, expert_pointer, store_tile, weight_pointer


@triton.jit
def persistent_kernel(
    a_ptr, table_ptr, out_ptr, bias_ptr, a_scale_ptr, w_scale_ptr, router_ptr, routes_ptr, experts_ptr, padded_ptr,
    N, K, EM, num_routes,
    stride_am, stride_wn, stride_om, stride_on, stride_asm, stride_ask,
    stride_se, stride_sn, stride_sk, stride_be, stride_bn,
    WEIGHT_TYPE: tl.constexpr, COMPUTE_TYPE: tl.constexpr, BIAS_TYPE: tl.constexpr,
    W_SCALE: tl.constexpr, A_SCALE: tl.constexpr, HOW_SCALE: tl.constexpr, HOW_BIAS: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, TOP_K: tl.constexpr, MUL_ROUTER: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Tiles program_id, program_id + PROGRAMS, ... GROUP_M: row blocks within which blocks of one expert go together."""
    blocks_m = tl.load(padded_ptr) // BLOCK_M
    blocks_n = tl.cdiv(N, BLOCK_N)
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), blocks_m * blocks_n, PROGRAMS):
        guess = tile // blocks_n
        expert = tl.load(experts_ptr + guess).to(tl.int64)
        # The run of blocks of this expert inside the aligned window of GROUP_M blocks that holds `guess`: its tiles are
        # adjacent, whichever of its blocks the guess was.
        window = guess // GROUP_M * GROUP_M + tl.arange(0, GROUP_M)
        near = tl.load(experts_ptr + window, mask=window < blocks_m, other=-2)
        same = near == expert
        begin = tl.min(tl.where(same, window, blocks_m))
        count = tl.sum(same.to(tl.int32))
        local = tile - begin * blocks_n
        block_m = begin + local % count
        column = local // count * BLOCK_N

        routes = tl.load(routes_ptr + block_m * BLOCK_M + rows).to(tl.int64)
        valid = routes < tl.where(expert < 0, 0, num_routes)
        tokens = routes // TOP_K
        weights = tl.make_tensor_descriptor(
            weight_pointer(table_ptr, tl.maximum(expert, 0), WEIGHT_TYPE),
            shape=[N, K],
            strides=[stride_wn, 1],
            block_shape=[BLOCK_N, BLOCK_K],
        )
        a_ptrs = a_ptr + (tokens[:, None] * stride_am + depth[None, :])
        a_scale = 1.0
        w_scale = 1.0
        if W_SCALE != NO_SCALE:
            wrapped = (column + tl.arange(0, BLOCK_N)) % N
            w_scale_base = expert_pointer(w_scale_ptr, tl.maximum(expert, 0), stride_se, HOW_SCALE, tl.float32)
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
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(0, tl.cdiv(K, BLOCK_K)):
            a = tl.load(a_ptrs, mask=valid[:, None] & (depth[None, :] < K - step * BLOCK_K), other=0.0)
            # What lies outside of the matrix reads as zero.
            w = weights.load([column, step * BLOCK_K]).T
            if INTERPRETED:
                a = a.to(tl.float32)
                w = w.to(tl.float32)
            if W_SCALE == BLOCKS:
                group_k = step * BLOCK_K // GROUP_K
                a_now = tl.load(a_scales + group_k * stride_ask, mask=valid, other=0.0)
                w_now = tl.load(w_scales + group_k * stride_sk)
                acc += tl.dot(a, w) * a_now[:, None] * w_now[None, :]
            elif W_SCALE != NO_SCALE:
                acc = tl.dot(a, w, acc=acc)
            else:
                acc += tl.dot(a, w)
            a_ptrs += BLOCK_K
        bias_base = bias_ptr
        if HOW_BIAS != ABSENT:
            bias_base = expert_pointer(bias_ptr, tl.maximum(expert, 0), stride_be, HOW_BIAS, BIAS_TYPE)
        SCALED: tl.constexpr = W_SCALE != NO_SCALE and W_SCALE != BLOCKS
        store_tile(
            acc, out_ptr, router_ptr, bias_base, a_scale, w_scale, routes, valid, column, N,
            stride_om, stride_on, stride_bn,
            COMPUTE_TYPE, SCALED, HOW_BIAS != ABSENT, MUL_ROUTER, BLOCK_N,
        )  # fmt: skip


@lru_cache
def _programs(device: torch.device) -> int:
    """As many programs as the device has multiprocessors; a few for the interpreter."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor_memory(size: int, _alignment: int, _stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch_persistent(launch: Launch, device: torch.device) -> None:
    """Launch what `prepare` laid out; raises DwdpError for rows that a descriptor cannot address."""
    weight_type, row_stride = launch.constants["WEIGHT_TYPE"], launch.arguments[15]
    if row_stride * weight_type.primitive_bitwidth // 8 % 16:
        raise DwdpError(
            f"rows of weights are {row_stride} elements of {weight_type} apart, not a multiple of 16 bytes: "
            "descriptors cannot address them, use tiles with the kernel 'pointer'"
        )
    programs = _programs(device)
    # Per launch: Triton keeps the allocator per context, and others set theirs.
    triton.set_allocator(_descriptor_memory)
    grid = (min(programs, launch.row_blocks * launch.column_blocks),)
    persistent_kernel[grid](*launch.arguments, **launch.constants, PROGRAMS=programs)
