"""Which sizes of forwards have every kernel of a split view compiled before the first request."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.v1.worker.gpu_worker import Worker

from tests.unit.gpu_layers import LAYERS
from tests.unit.gpu_sharing import share_on_gpus
from vllm_dwdp.engine import gpu_worker
from vllm_dwdp.engine.graphs import captured_tokens
from vllm_dwdp.kernels import launching
from vllm_dwdp.kernels.tiles import Tiles
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.warm_up import compile_at, distinct_sizes, warm_up_sizes


@given(st.lists(st.lists(st.integers(0, 4), min_size=20, max_size=20), max_size=3), st.integers(1, 12))
def test_every_answer_is_among_those_of_the_sizes(answers: list[list[int]], first: int) -> None:
    functions = [lambda size, given=given: given[size - 1] for given in answers]
    sizes = distinct_sizes(functions, first, 20)
    assert sizes == sorted(set(sizes)) and all(first <= size <= 20 for size in sizes)
    for function in functions:
        assert {function(size) for size in sizes} == {function(size) for size in range(first, 21)}
    # None is there for nothing.
    for size in sizes:
        assert any(function(size) not in {function(other) for other in range(first, size)} for function in functions)


def test_sizes_of_a_split_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tiles from 8 and from 30 tokens on, pulled; one for all direct forwards; two routes a token, five experts."""
    monkeypatch.setattr(ModelBuild, "_current", None)
    _, ranks = share_on_gpus(monkeypatch, "split")
    rank = ranks[0]
    for module in rank.modules:
        kernel: Any = module.quant_method.moe_kernel.fused_experts

        def tiles(tokens: int, top_k: int, kernel: Any = kernel) -> tuple[Tiles, Tiles]:
            return (Tiles(16, 128 if kernel.direct else 64 if tokens >= 30 else 32 if tokens >= 8 else 16, 64),) * 2

        kernel.all_tiles = tiles
    layers = rank.sharing.layers
    assert len(layers) == LAYERS
    # A token alone, fewer routes than experts (whole blocks only), and multiples of 16 routes are apart: 1; 2; 8, 16, 32.
    assert warm_up_sizes(layers, 0, 1, 40) == [1, 2, 3, 8, 9, 30, 32]
    assert warm_up_sizes(layers, 8, 1, 40) == [1, 2, 3, 8, 9, 16, 30, 32]
    assert warm_up_sizes(layers, 100, 1, 40) == [1, 2, 3, 8]
    assert warm_up_sizes(layers, 0, 41, 40) == []
    compiled: list[tuple[bool, int, int]] = []
    for module in rank.modules:
        fused: Any = module.quant_method.moe_kernel.fused_experts
        fused.compile = lambda tokens, top_k, fused=fused: compiled.append((fused.direct, tokens, top_k))
    # One layer of each kind.
    assert compile_at(layers, 8, [8, 9]) == 0 and compiled == [(True, 8, 2), (False, 9, 2)]
    for one in ranks:
        one.sharing.close()


def test_kernels_of_a_rank_that_gives_way_are_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs change at another size."""
    monkeypatch.setattr(ModelBuild, "_current", None)
    _, ranks = share_on_gpus(monkeypatch, "split")
    for module in ranks[0].modules:
        kernel: Any = module.quant_method.moe_kernel.fused_experts
        kernel.all_tiles = lambda tokens, top_k: (Tiles(16, 64, 64), Tiles(16, 64 if tokens < 37 else 128, 64))
    assert 37 in warm_up_sizes(ranks[0].sharing.layers, 0, 33, 60)
    for one in ranks:
        one.sharing.close()


def test_layers_of_another_shape_have_kernels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As models have them whose layers were pruned apart; tables of one kind, dtype and device are there for any shape."""
    monkeypatch.setattr(ModelBuild, "_current", None)
    _, ranks = share_on_gpus(monkeypatch, "split")
    modules: list[Any] = ranks[0].modules
    asked = []
    for number, module in enumerate(modules):
        kernel: Any = module.quant_method.moe_kernel.fused_experts
        kernel.all_tiles = lambda tokens, top_k, number=number: asked.append(number) or (Tiles(16, 64, 64),) * 2
    tables = modules[0].dwdp_tables
    narrow = tuple(replace(table, rows=table.rows // 2) for table in tables.pulled)
    modules[0].dwdp_tables = tables._replace(pulled=narrow)
    warm_up_sizes(ranks[0].sharing.layers, 0, 1, 2)
    assert 0 in asked and len(set(asked)) == 2
    for one in ranks:
        one.sharing.close()


def test_the_contiguous_view_has_vllms_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelBuild, "_current", None)
    _, ranks = share_on_gpus(monkeypatch, "contiguous")
    assert warm_up_sizes(ranks[0].sharing.layers, 0, 1, 100) == []
    for one in ranks:
        one.sharing.close()


@pytest.mark.parametrize(
    ("mode", "tokens"),
    [
        (None, 0),
        (CUDAGraphMode.NONE, 0),
        (CUDAGraphMode.FULL_DECODE_ONLY, 0),
        (CUDAGraphMode.PIECEWISE, 8),
        (CUDAGraphMode.FULL, 8),
        (CUDAGraphMode.FULL_AND_PIECEWISE, 8),
    ],
)
def test_what_is_captured_is_compiled_by_that(mode: CUDAGraphMode | None, tokens: int) -> None:
    made = CompilationConfig(cudagraph_mode=mode, cudagraph_capture_sizes=[1, 8])
    made.max_cudagraph_capture_size = 8
    assert captured_tokens(made) == tokens


def test_they_run_before_vllms_own_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(launching, "_tell", None)
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: ran.append("vLLM") or "times")
    monkeypatch.setattr(Worker, "randomize_dummy_inputs", property(lambda self: True))
    monkeypatch.setattr(gpu_worker, "compile_at", lambda layers, direct, sizes: ran.append((direct, sizes)) or 5)
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        gpu_worker, "warm_up_sizes", lambda layers, direct, first, last: asked.append((direct, first, last)) or [9, 12]
    )
    made: Any = gpu_worker.DwdpGPUWorker.__new__(gpu_worker.DwdpGPUWorker)
    made.dwdp_rank, made.dwdp_rendezvous = 0, "meets"
    made.dwdp_launch = SimpleNamespace(group_of=lambda rank: [rank, 1])
    made.dwdp_sharing = SimpleNamespace(
        layers=[],
        direct_tokens=4,
        hits=None,
        unused=list,
        seal_unused=lambda: ran.append("seal"),
        warmed_up=lambda rendezvous, group: ran.append((rendezvous, group)),
        view="split",
        forwards=SimpleNamespace(reset=lambda: ran.append("reset")),
        counters=SimpleNamespace(fields=SimpleNamespace(kernels_compiled_after_start=0)),
    )
    compilation = CompilationConfig(cudagraph_mode=CUDAGraphMode.PIECEWISE, cudagraph_capture_sizes=[1, 8])
    compilation.max_cudagraph_capture_size = 8
    made.vllm_config = SimpleNamespace(
        compilation_config=compilation, scheduler_config=SimpleNamespace(max_num_batched_tokens=100)
    )
    made.model_runner = SimpleNamespace(
        _dummy_run=lambda size, skip_eplb, remove_lora, randomize_inputs: ran.append((size, randomize_inputs))
    )
    page = made.dwdp_sharing.counters.fields
    assert made.compile_or_warm_up_model() == "times"
    told: Any = launching._tell
    made.dwdp_step_tokens = 77
    logged: list[str] = []
    monkeypatch.setattr(gpu_worker.logger, "warning", lambda text, *words: logged.append(text % words))
    for kernels in (1, 2):
        told("split_gemm_kernel")
        assert page.kernels_compiled_after_start == kernels == len(logged)
    assert "rank 0: a step of 77 tokens waited while split_gemm_kernel was compiled" in logged[0]
    assert asked == [(4, 9, 100)]
    assert ran == [(4, [9, 12]), (12, True), (9, True), "vLLM", "seal", ("meets", [0, 1]), "reset"]
