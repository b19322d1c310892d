"""What the card's matrix units reach on one large product: what shares of the matrix rate are shares of."""

from __future__ import annotations

import statistics

import torch

from .timing import seconds

SIDE = 8192


def matrix_rates(device: torch.device, side: int = SIDE, times: int = 12) -> dict[str, float]:
    """TFLOP/s of a [side, side] product by torch, on random data: 'bf16', and 'fp8' where the device has it.

    Medians of `times` products, each timed alone, after three for warming up.
    """
    flops = 2.0 * side**3
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    calls = {"bf16": lambda: a @ b.T}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        narrow_a, narrow_b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        calls["fp8"] = lambda: torch._scaled_mm(
            narrow_a, narrow_b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    found = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        found[name] = flops / statistics.median(seconds(call, 1, device) for _ in range(times)) / 1e12
    return found
