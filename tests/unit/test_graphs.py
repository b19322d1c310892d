"""How vLLM's CUDA graphs are fitted to acquire and release (engine/graphs.py), without a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.forward_context
from torch import nn
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.offloader import base
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_dwdp.engine.graphs import CopiesInGraphs, fit_graphs, follow_graphs, graphs_chosen, refuse_piecewise, splits
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.gates import OPS, between_ops, register_gate
from vllm_dwdp.patches import cuda_graph


def config(graphs: CUDAGraphMode | None, compiled: bool = True, **more: Any) -> Any:
    compilation = SimpleNamespace(
        cudagraph_mode=graphs,
        mode=CompilationMode.VLLM_COMPILE if compiled else CompilationMode.NONE,
        use_inductor_graph_partition=False,
        splitting_ops=["vllm::unified_attention_with_output"],
    )
    compilation.__dict__.update(more)
    return SimpleNamespace(compilation_config=compilation)


@pytest.mark.parametrize(
    ("mode", "compiled", "split"),
    [
        (CUDAGraphMode.FULL_AND_PIECEWISE, True, True),
        (CUDAGraphMode.PIECEWISE, True, True),
        (CUDAGraphMode.FULL, True, True),
        (CUDAGraphMode.FULL_DECODE_ONLY, True, False),
        (CUDAGraphMode.FULL, False, False),
        (CUDAGraphMode.NONE, True, False),
        (None, False, False),
    ],
)
def test_compiled_code_is_split_where_there_are_piecewise_graphs(
    mode: CUDAGraphMode | None, compiled: bool, split: bool
) -> None:
    given = config(mode, compiled)
    shared = given.compilation_config.splitting_ops
    fit_graphs(given)
    found = given.compilation_config.splitting_ops
    assert found == ["vllm::unified_attention_with_output", *(OPS if split else ())]
    assert splits(given.compilation_config) is split and len(shared) == 1
    for name in OPS:  # vLLM looks operators up by these names
        namespace, op = name.split("::")
        assert getattr(getattr(torch.ops, namespace), op).default is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config(CUDAGraphMode.PIECEWISE, use_inductor_graph_partition=True), "use_inductor_graph_partition"),
        (config(CUDAGraphMode.FULL, splitting_ops=[]), "splitting_ops is empty"),
        (config(CUDAGraphMode.PIECEWISE, mode=CompilationMode.STOCK_TORCH_COMPILE), "STOCK_TORCH_COMPILE"),
    ],
)
def test_graphs_that_cannot_be_split_are_refused(given: Any, message: str) -> None:
    with pytest.raises(DwdpError, match=message) as caught:
        fit_graphs(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "left"),
    [
        (CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY),
        (CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE),
        (CUDAGraphMode.FULL, CUDAGraphMode.FULL),
    ],
)
def test_breakable_graphs_are_whole_forwards_only(
    mode: CUDAGraphMode, left: CUDAGraphMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    given = config(mode, compiled=False)
    fit_graphs(given)
    assert given.compilation_config.cudagraph_mode == left


def test_vllm_tells_the_prefetcher_of_whole_forwards_only(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    prefetcher: Any = SimpleNamespace(align=lambda: told.append("align"), end_capture=lambda: told.append("end"))
    prefetcher.count_replay = None
    monkeypatch.setattr(base, "_instance", base.NoopOffloader())
    monkeypatch.setattr(cuda_graph, "install", lambda count_replay: lambda counts: None)
    follow_graphs(prefetcher, cut=True)
    offloader = base.get_offloader()
    assert isinstance(offloader, CopiesInGraphs)
    layers = [nn.Linear(1, 1)]
    assert offloader.wrap_modules(layer for layer in layers) == layers
    for context, tells in ((None, True), ("FULL", True), ("PIECEWISE", False), ("NONE", False)):
        told.clear()
        found = None if context is None else SimpleNamespace(cudagraph_runtime_mode=CUDAGraphMode[context])
        monkeypatch.setattr(vllm.forward_context, "_forward_context", found)
        offloader.sync_prev_onload()
        offloader.join_after_forward()
        assert told == (["align", "end"] if tells else []), context
    with pytest.raises(DwdpError, match="CopiesInGraphs moves weights"):
        follow_graphs(prefetcher, cut=True)


def test_a_piecewise_graph_that_would_hold_copies_is_refused_before_its_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    prefetcher: Any = SimpleNamespace(align=lambda: told.append("align"), end_capture=lambda: told.append("end"))
    offloader = CopiesInGraphs(prefetcher, cut=False, give_counts=lambda counts: None)
    monkeypatch.setattr(vllm.forward_context, "_forward_context", None)
    offloader.sync_prev_onload()
    for mode in ("FULL", "NONE", "PIECEWISE"):
        context = SimpleNamespace(cudagraph_runtime_mode=CUDAGraphMode[mode])
        monkeypatch.setattr(vllm.forward_context, "_forward_context", context)
        if mode != "PIECEWISE":
            offloader.sync_prev_onload()
    with pytest.raises(DwdpError, match=r"-cc\.cudagraph_mode NONE"):
        offloader.sync_prev_onload()
    assert told == ["align", "align"]


@pytest.mark.parametrize(
    ("mode", "chosen", "left"),
    [
        (CUDAGraphMode.FULL_AND_PIECEWISE, False, CUDAGraphMode.FULL_DECODE_ONLY),
        (CUDAGraphMode.FULL_AND_PIECEWISE, True, CUDAGraphMode.FULL_AND_PIECEWISE),
        (CUDAGraphMode.FULL, False, CUDAGraphMode.FULL_DECODE_ONLY),
        (CUDAGraphMode.FULL, True, CUDAGraphMode.FULL),
        (CUDAGraphMode.PIECEWISE, False, CUDAGraphMode.PIECEWISE),
        (CUDAGraphMode.NONE, False, CUDAGraphMode.NONE),
        (None, False, None),
    ],
)
def test_piecewise_graphs_are_made_where_they_are_asked_for(
    mode: CUDAGraphMode | None, chosen: bool, left: CUDAGraphMode | None
) -> None:
    given = config(mode)
    fit_graphs(given, chosen)
    compilation = given.compilation_config
    assert compilation.cudagraph_mode == left
    assert (compilation.splitting_ops[-2:] == list(OPS)) is splits(compilation)


@pytest.mark.parametrize("shared", [False, True])
def test_between_ops_acquires_first_and_releases_last(shared: bool) -> None:
    seen: list[Any] = []
    gate: Any = SimpleNamespace(
        acquire=lambda layer: seen.append(("acquire", layer)), release=lambda layer: seen.append(("release", layer))
    )

    def forward(states: torch.Tensor, more: int) -> Any:
        seen.append(("forward", more))
        return (states + 2, states + 1) if shared else states + 1

    gated = between_ops(forward, register_gate(gate, 5))
    states = torch.zeros(3)
    output = gated(states, 4)
    assert seen == [("acquire", 5), ("forward", 4), ("release", 5)]
    assert torch.equal(output[1] if shared else output, states + 1)


def test_a_compiled_layer_keeps_the_order() -> None:
    seen: list[str] = []
    gate: Any = SimpleNamespace(
        acquire=lambda layer: seen.append("acquire"), release=lambda layer: seen.append("release")
    )
    gated = between_ops(lambda states: states * 2, register_gate(gate, 0))

    def model(states: torch.Tensor) -> torch.Tensor:
        return gated(states + 1) + 1

    kept: list[list[str]] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        kept.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module

    output = torch.compile(model, backend=backend, fullgraph=True)(torch.ones(2))
    assert torch.equal(output, torch.full((2,), 5.0)) and seen == ["acquire", "release"]
    (targets,) = kept
    order = [next(i for i, name in enumerate(targets) if part in name) for part in ("acquire", "mul", "release")]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [({}, False), ({"cudagraph_capture_sizes": [1]}, False), ({"cudagraph_mode": "PIECEWISE"}, True)],
)
def test_whether_a_mode_was_named(given: dict[str, Any], chosen: bool, tmp_path: Path) -> None:
    # The model is a folder: vLLM looks any other name up.
    args = EngineArgs(model=str(tmp_path), compilation_config=given)  # type: ignore[arg-type]
    assert graphs_chosen(args) is chosen


@pytest.mark.parametrize(
    ("mode", "left"),
    [(CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.NONE), (CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.PIECEWISE)],
)
def test_uncut_code_gets_no_piecewise_graphs_for_a_backend_without_whole_ones(
    mode: CUDAGraphMode, left: CUDAGraphMode
) -> None:
    compilation = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=mode)
    compilation.set_splitting_ops_for_v1("none")
    assert compilation.splitting_ops_contain_attention()
    refuse_piecewise(compilation)
    assert compilation.resolve_cudagraph_mode_and_sizes(AttentionCGSupport.NEVER, "SomeBackend") == left
