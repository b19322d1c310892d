"""The grouped GEMM of split_gemm.py on a fixed grid, with the weights read through one tensor descriptor (TMA on sm_90).

Experts lie anywhere, yet one descriptor serves them all: its outermost dimension counts units of 256 (or 16) bytes from the
lowest address, so that an expert begins at a coordinate. It is made once per program, not per tile. Each program takes
every PROGRAMS-th tile, in the order of the pointer kernel: within a group of row blocks by columns, so that blocks of one
expert read its weights while they are in the L2 cache. What the next tile needs (expert, place, routes) is loaded before
the loop over K of the current one. The routes' rows are gathered by pointers: sm_90 has no gathering descriptors.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .arguments import Assignment, Launch
from .launching import Planned
from .tile_math import compute_tile, halves, tile_place
from .tiles import Tiles
from .weight_table import WeightTable


@triton.jit
def persistent_kernel(
    a_ptr, table_ptr, out_ptr, bias_ptr, a_scale_ptr, w_scale_ptr, router_ptr, routes_ptr, experts_ptr, padded_ptr,
    N, K, EM, num_routes,
    stride_am, stride_wn, stride_om, stride_on, stride_asm, stride_ask,
    stride_se, stride_sn, stride_sk, stride_be, stride_bn, origin,
    WEIGHT_TYPE: tl.constexpr, COMPUTE_TYPE: tl.constexpr,
    W_SCALE: tl.constexpr, A_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, TOP_K: tl.constexpr, MUL_ROUTER: tl.constexpr,
    EVEN_K: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HALVES: tl.constexpr, PROGRAMS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Tiles program_id, program_id + PROGRAMS, ... HALVES: see the pointer kernel. UNIT: bytes."""
    blocks_m = tl.load(padded_ptr) // BLOCK_M
    blocks_n = tl.cdiv(N, BLOCK_N)
    tiles = blocks_m * blocks_n
    first = tl.program_id(0)
    if first >= tiles:
        return
    SIZE: tl.constexpr = WEIGHT_TYPE.primitive_bitwidth // 8
    weights = tl.make_tensor_descriptor(
        origin.to(tl.pointer_type(WEIGHT_TYPE)),
        shape=[0x7FFFFFFF, N, K],
        strides=[UNIT // SIZE, stride_wn, 1],
        block_shape=[1, BLOCK_N, BLOCK_K],
    )
    rows = tl.arange(0, BLOCK_M)
    half = tl.arange(0, BLOCK_M // 2)
    block_m, block_n = tile_place(first, blocks_m, blocks_n, GROUP_M)
    expert = tl.load(experts_ptr + block_m)
    routes = tl.load(routes_ptr + block_m * BLOCK_M + rows)
    upper = tl.load(routes_ptr + block_m * BLOCK_M + half)
    lower = tl.load(routes_ptr + block_m * BLOCK_M + BLOCK_M // 2)
    ahead_m, ahead_n = tile_place(min(first + PROGRAMS, tiles - 1), blocks_m, blocks_n, GROUP_M)
    next_expert = tl.load(experts_ptr + ahead_m)
    address = tl.load(table_ptr + tl.maximum(expert, 0))
    for tile in range(first, tiles, PROGRAMS):
        # Nothing of this is waited for before the next round: the address's expert came a round ago.
        next_address = tl.load(table_ptr + tl.maximum(next_expert, 0))
        next_routes = tl.load(routes_ptr + ahead_m * BLOCK_M + rows)
        next_upper = tl.load(routes_ptr + ahead_m * BLOCK_M + half)
        next_lower = tl.load(routes_ptr + ahead_m * BLOCK_M + BLOCK_M // 2)
        after_m, after_n = tile_place(min(tile + 2 * PROGRAMS, tiles - 1), blocks_m, blocks_n, GROUP_M)
        after_expert = tl.load(experts_ptr + after_m)

        place = ((address - origin) // UNIT).to(tl.int32)
        column = block_n * BLOCK_N
        readable = tl.where(expert < 0, 0, num_routes)
        known = tl.maximum(expert, 0).to(tl.int64)
        if HALVES:
            small = lower >= num_routes
        else:
            small: tl.constexpr = False  # type: ignore[no-redef]
        if small:
            compute_tile(
                a_ptr, weights, place, out_ptr, bias_ptr, a_scale_ptr, w_scale_ptr, router_ptr,
                upper, readable, known, column, N, K, num_routes,
                stride_am, stride_wn, stride_om, stride_on, stride_asm, stride_ask,
                stride_se, stride_sn, stride_sk, stride_be, stride_bn,
                COMPUTE_TYPE, W_SCALE, A_SCALE, HAS_BIAS, GROUP_N, GROUP_K, TOP_K, MUL_ROUTER,
                False, True, EVEN_K, INTERPRETED, BLOCK_M // 2, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            compute_tile(
                a_ptr, weights, place, out_ptr, bias_ptr, a_scale_ptr, w_scale_ptr, router_ptr,
                routes, readable, known, column, N, K, num_routes,
                stride_am, stride_wn, stride_om, stride_on, stride_asm, stride_ask,
                stride_se, stride_sn, stride_sk, stride_be, stride_bn,
                COMPUTE_TYPE, W_SCALE, A_SCALE, HAS_BIAS, GROUP_N, GROUP_K, TOP_K, MUL_ROUTER,
                False, True, EVEN_K, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        address, routes, upper, lower = next_address, next_routes, next_upper, next_lower
        expert, next_expert = next_expert, after_expert
        block_n, ahead_m, ahead_n = ahead_n, after_m, after_n


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # a few programs for the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(tiles: Tiles, itemsize: int, device: torch.device) -> int:
    """One per multiprocessor; two where their shared memory (of 227 KiB) and registers allow, to fill each other's gaps."""
    stages = (tiles.block_m + tiles.block_n) * tiles.block_k * itemsize * tiles.num_stages
    accumulator = tiles.block_m * tiles.block_n // (tiles.num_warps * 32)
    two = tiles.num_warps == 4 and stages <= 110 * 1024 and accumulator <= 128
    return _multiprocessors(device) * (2 if two else 1)


def describable(even_depth: bool, weights: WeightTable, assignment: Assignment) -> bool:
    """Whether a descriptor can serve this launch; the pointer kernel computes the others, with the same bits.

    Not: single routes, experts too far from each other, rows that are no multiple of 16 bytes apart, a depth that is no
    multiple of the tile's (vLLM reports wrong results of such descriptors on GPUs), and devices without TMA.
    """
    rows_apart = weights.row_stride * weights.dtype.itemsize
    device = weights.addresses.device
    return (
        assignment.routes is not None
        and weights.unit > 0
        and rows_apart % 16 == 0
        and even_depth
        and (device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0))
    )


def _descriptor_memory(size: int, _alignment: int, _stream: int | None) -> torch.Tensor:
    # 128 bytes a program, 512-byte aligned, of the current stream: inside of a capture it comes from the graph's pool, and
    # work that is given the same memory later in the stream runs after this kernel.
    return torch.empty(size, dtype=torch.int8, device="cuda")


def give_memory() -> None:
    """Before each launch: Triton keeps the allocator per context, and others set theirs."""
    triton.set_allocator(_descriptor_memory)


def planned(launch: Launch, constants: dict[str, Any], weights: WeightTable, tiles: Tiles) -> Planned:
    """How to launch what `prepare` laid out and `describable` allowed; `give_memory` comes before."""
    count = programs(tiles, weights.dtype.itemsize, weights.addresses.device)
    more = {"HALVES": halves(tiles), "PROGRAMS": count, "UNIT": weights.unit}
    grid = (min(count, launch.row_blocks * launch.column_blocks),)
    return Planned(persistent_kernel, grid, constants | more, True)
