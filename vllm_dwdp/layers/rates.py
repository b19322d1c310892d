"""What this rank measures of itself at start: how fast it copies from peers, and how fast it multiplies."""

from __future__ import annotations

import time

import torch

from vllm_dwdp.transport.base import CopyEngine, Program

_PRODUCT = 512
_PRODUCT_ON_GPU = 4096
_REPEATS = 8


def copy_rate(engine: CopyEngine, program: Program, timeout_s: float) -> float:
    """Bytes per second of one layer's copies; they run twice, since the first run touches the pages."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        engine.finish(engine.submit(program), timeout_s)
        seconds = time.perf_counter() - started
    return (program.pulled_bytes + program.merged_bytes) / seconds


def product_rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """FLOP per second of a matrix product on this rank's cores, or GPU; FP8 and packed integers, which kernels unpack,
    count as BF16."""
    on_gpu = torch.device(device).type == "cuda"
    size = _PRODUCT_ON_GPU if on_gpu else _PRODUCT
    plain = dtype.is_floating_point and dtype.itemsize > 1
    a = torch.ones(size, size, dtype=dtype if plain else torch.bfloat16, device=device)
    a @ a
    best = float("inf")
    for _ in range(_REPEATS):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
