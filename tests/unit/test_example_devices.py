"""examples/devices.py: what the examples add to vLLM's options, by what vLLM's platform says."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import devices

SHARED = {"kv_cache_memory_bytes": 256 << 20, "gpu_memory_utilization": 0.5}


def platform(monkeypatch: pytest.MonkeyPatch, gpus: int, cpu: bool = False, unspecified: bool = False) -> None:
    fake = SimpleNamespace(is_cpu=lambda: cpu, is_unspecified=lambda: unspecified, device_count=lambda: gpus)
    monkeypatch.setattr("vllm.platforms.current_platform", fake)
    monkeypatch.delenv("DWDP_ATTENTION_BACKEND", raising=False)


def test_nothing_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    platform(monkeypatch, 1, cpu=True)
    monkeypatch.setenv("DWDP_ATTENTION_BACKEND", "TRITON_ATTN")
    assert devices.count_gpus() == 0
    assert devices.engine_options(4) == devices.dwdp_settings(4) == {}
    assert devices.dwdp_arguments(4) == ["--distributed-executor-backend", "dwdp", "--data-parallel-size", "4"]


@pytest.mark.parametrize(
    ("ranks", "gpus", "engine", "settings"),
    [
        (2, 2, {}, {}),
        (2, 8, {}, {}),
        (2, 1, SHARED, {"ranks_per_device": 2}),
        (3, 2, SHARED, {"ranks_per_device": 2}),
        (4, 1, SHARED, {"ranks_per_device": 4}),
    ],
)
def test_ranks_share_gpus_where_there_are_too_few(
    monkeypatch: pytest.MonkeyPatch, ranks: int, gpus: int, engine: dict[str, Any], settings: dict[str, Any]
) -> None:
    platform(monkeypatch, gpus)
    assert devices.engine_options(ranks) == engine
    assert devices.dwdp_settings(ranks) == settings


def test_words_for_vllm_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    platform(monkeypatch, 1)
    monkeypatch.setenv("DWDP_ATTENTION_BACKEND", "TRITON_ATTN")
    assert devices.dwdp_arguments(2) == [
        *("--distributed-executor-backend", "dwdp", "--data-parallel-size", "2"),
        *("--additional-config", '{"dwdp": {"ranks_per_device": 2}}'),
        *("--kv-cache-memory-bytes", "268435456", "--gpu-memory-utilization", "0.5"),
        *("--attention-backend", "TRITON_ATTN"),
    ]


@pytest.mark.parametrize("unspecified", [False, True])
def test_a_build_for_gpus_without_one(monkeypatch: pytest.MonkeyPatch, unspecified: bool) -> None:
    platform(monkeypatch, 0, unspecified=unspecified)
    with pytest.raises(SystemExit, match="no GPU is visible"):
        devices.count_gpus()
