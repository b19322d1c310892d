"""Calls of CUDA that a layer costs the host: what docs/architecture.md says, on the simulated device."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from ci.bench.layer_calls import OF_TORCH, Simulated, measure


@pytest.mark.parametrize(
    ("case", "most", "of_torch"), [("hidden", 5, 1), ("ahead", 8.5, 2), ("own slot", 1, 0), ("direct", 0, 0)]
)
def test_calls_of_a_layer(case: str, most: float, of_torch: int) -> None:
    calls, _ = measure(Simulated(), case, count=True)
    once_a_forward = calls.pop("capturing", 0)
    asked = sum(calls.pop(name, 0) for name in OF_TORCH)
    assert 0.9 * most <= sum(calls.values()) <= most and "make_event" not in calls, calls
    assert once_a_forward < 0.05 and 0.9 * of_torch <= asked <= of_torch + once_a_forward
