"""Which CUDA graphs vLLM is left with (engine/graphs.py): those of forwards that read experts where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import graphs
from vllm_dwdp.engine.configure import _named_tokens
from vllm_dwdp.engine.graphs import fit_graphs, limit_graphs

SIZES = [1, 2, 4, 8, 16, 24, 32]
MODES = [CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.NONE]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    found: list[str] = []
    monkeypatch.setattr(graphs.logger, "info", lambda text, *values: found.append(text % values))
    return found


def compilation(mode: CUDAGraphMode | None, sizes: list[int] | None = None) -> CompilationConfig:
    given = SIZES if sizes is None else sizes
    made = CompilationConfig(cudagraph_mode=mode, cudagraph_capture_sizes=list(given))
    made.max_cudagraph_capture_size = given[-1]
    return made


def state(config: CompilationConfig) -> tuple[object, ...]:
    return (
        config.cudagraph_mode,
        config.cudagraph_capture_sizes,
        config.max_cudagraph_capture_size,
        config.splitting_ops,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, None),
        ({"direct_tokens": 8}, None),
        ({"weight_view": "split"}, None),
        ({"direct_tokens": 0}, "dwdp.direct_tokens is 0"),
        ({"weight_view": "contiguous"}, 'dwdp.weight_view is "contiguous"'),
        ({"weight_view": "split", "direct_tokens": 0}, "dwdp.direct_tokens is 0"),
    ],
)
def test_without_direct_reads_there_are_no_graphs(
    mode: CUDAGraphMode, settings: dict[str, Any], why: str | None, lines: list[str]
) -> None:
    config = compilation(mode)
    before = state(config)
    fit_graphs(config, DwdpConfig(**settings))
    if why is None or mode == CUDAGraphMode.NONE:
        assert state(config) == before and lines == []
    else:
        assert state(config) == (CUDAGraphMode.NONE, *before[1:])
        (line,) = lines
        assert "\n" not in line and "without CUDA graphs" in line and why in line


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize(
    ("most", "left"), [(32, SIZES), (1000, SIZES), (31, SIZES[:-1]), (8, SIZES[:4]), (1, [1]), (0, None)]
)
def test_sizes_beyond_direct_forwards_are_left_out(
    mode: CUDAGraphMode | None, most: int, left: list[int] | None, lines: list[str]
) -> None:
    config = compilation(mode)
    before = state(config)
    limit_graphs(config, most, rank=1)
    if mode in (None, CUDAGraphMode.NONE):
        assert state(config) == before and lines == []
    elif left is None:
        assert config.cudagraph_mode == CUDAGraphMode.NONE
        (line,) = lines
        assert "without CUDA graphs" in line and "rank 1" in line and "up to 0 tokens" in line
    else:
        assert state(config) == (before[0], left, left[-1], before[3])
        told = f"dwdp rank 1: CUDA graphs up to {left[-1]} tokens, not 32: larger forwards pull experts"
        assert lines == ([] if left == SIZES else [told])
    # vLLM asserts that the limit is the last size.
    config.post_init_cudagraph_sizes()


def test_where_no_size_is_small_enough_there_are_no_graphs(lines: list[str]) -> None:
    config = compilation(CUDAGraphMode.FULL_AND_PIECEWISE, [64, 128])
    limit_graphs(config, 24, rank=0)
    assert config.cudagraph_mode == CUDAGraphMode.NONE and len(lines) == 1
    config.post_init_cudagraph_sizes()


def test_sizes_are_sorted_by_vllm_later_only(lines: list[str]) -> None:
    config = CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL, cudagraph_capture_sizes=[16, 2, 64, 8])
    config.max_cudagraph_capture_size = 64
    limit_graphs(config, 20, rank=0)
    config.post_init_cudagraph_sizes()
    assert (config.cudagraph_capture_sizes, config.max_cudagraph_capture_size) == ([2, 8, 16], 16)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, False),
        ({"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, False),
        ({"cudagraph_capture_sizes": [8, 48]}, True),
        ({"max_cudagraph_capture_size": 48}, True),
        ({"compilation_config": {"cudagraph_capture_sizes": [8, 48]}}, True),
        ({"compilation_config": {"max_cudagraph_capture_size": 48}}, True),
    ],
)
def test_sizes_that_the_user_named_are_told_from_vllms_own(given: dict[str, Any], named: bool, tmp_path: Path) -> None:
    # The model is a folder: vLLM looks any other name up.
    args = EngineArgs(model=str(tmp_path), **given)
    finished = compilation(CUDAGraphMode.FULL, [8, 48])
    assert _named_tokens(args, finished) == (48 if named else 0)
    # Where there are no graphs, vLLM has no limit.
    finished.max_cudagraph_capture_size = None  # type: ignore[assignment]
    assert _named_tokens(args, finished) == 0
