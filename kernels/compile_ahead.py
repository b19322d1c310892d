"""Compiles what layers will launch, several kernels at a time, and launches nothing.

A launch compiles its kernel while it waits; most of that is work outside of Python (MLIR, ptxas), so that threads share it.
Triton keeps what is compiled in this process and, for later starts, on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from . import launching, persistent
from .arguments import Assignment
from .split_gemm import compile_gemm, split_gemm_kernel
from .tiles import Tiles
from .torch_ops import QuantKind, are_single, room_for_routes
from .weight_table import WeightTable

_META = torch.device("meta")
#: More wait for each other's Python.
_MOST_THREADS = 16


def compile_ahead(layers: Iterable[Callable[[], None]]) -> int:
    """Call each of `layers`, which call `compile_layer`, and compile in threads; returns how many kernels there are more.

    A kernel that cannot be compiled is left to the launch that needs it, which raises why.
    """
    held = _held()
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    # An error would end Triton's clearing up, and leave promises where launches look for kernels.
    with ThreadPoolExecutor(threads, "dwdp-compile") as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for compile_one in layers:
            compile_one()
    return _held() - held


def _held() -> int:
    return launching.held(split_gemm_kernel) + launching.held(persistent.persistent_kernel)


def compile_layer(
    tables: tuple[WeightTable, WeightTable], tiles: Tiles, tokens: int, top_k: int, quant: QuantKind, dtype: torch.dtype,
    single: bool | None = None,
) -> None:  # fmt: skip
    """Both GEMMs of a forward of `tokens` tokens, given what they compute from. dtype: of results. single: whether routes
    are left unsorted; None goes by their number."""
    routes, (w13, w2) = tokens * top_k, tables
    if single is None:
        single = are_single(routes, w13.num_experts)
    room = None if single else _ints(room_for_routes(routes, tiles.block_m, w13.num_experts))
    assignment = Assignment(room, _ints(routes), _ints(1))
    for weights, rows, each, router in ((w13, tokens, top_k, None), (w2, routes, 1, torch.empty(routes, device=_META))):
        a = torch.empty(rows, weights.cols, dtype=weights.dtype, device=_META)
        out = torch.empty(routes, weights.rows, dtype=dtype, device=_META)
        scale = None
        if weights.scales is not None:
            groups = -(-weights.cols // weights.scales.group[1]) if quant == "block" else 1
            scale = torch.empty(1 if quant == "tensor" else rows, groups, device=_META)
        compile_gemm(a, weights, out, assignment, tiles, top_k=each, a_scale=scale, router_weights=router)


def _ints(count: int) -> Any:
    return torch.empty(count, dtype=torch.int32, device=_META)
