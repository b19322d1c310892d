"""What a rank measures of itself at start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_dwdp.layers import rates
from vllm_dwdp.layers.rates import copy_rate, product_rate
from vllm_dwdp.transport.base import Program


def test_the_second_run_of_a_copy_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one touches the pages."""
    clock, runs = [0.0], iter((10.0, 2.0))

    def finish(event: object, timeout_s: float) -> None:
        clock[0] += next(runs)

    engine: Any = SimpleNamespace(submit=lambda program: None, finish=finish)
    monkeypatch.setattr(rates, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert copy_rate(engine, Program(pulled_bytes=600, merged_bytes=200, copies=2), 1.0) == 400.0


@pytest.mark.parametrize(
    ("dtype", "multiplied"),
    [
        (torch.float16, torch.float16),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.int32, torch.bfloat16),  # CUDA multiplies none
        (torch.uint8, torch.bfloat16),
    ],
)
def test_a_product_of_fp8_or_packed_integers_counts_as_bf16(
    dtype: torch.dtype, multiplied: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ones = [], torch.ones

    def watched(*size: int, dtype: torch.dtype, device: object) -> torch.Tensor:
        made.append(dtype)
        return ones(*size, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "ones", watched)
    assert 0 < product_rate(dtype) < float("inf") and made == [multiplied]
