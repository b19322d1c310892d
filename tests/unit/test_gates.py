"""A layer between acquire and release, whichever way vLLM reaches its experts, and its kernel once the gate is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from tests.unit.whole_model import load
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.gates import register_gate
from vllm_dwdp.layers.routed_experts import DwdpExpertsMixin
from vllm_dwdp.layers.views.split import SplitTables
from vllm_dwdp.platform import CUDA

pytestmark = pytest.mark.usefixtures("groups")

RANKS, EXPERTS = 2, 5


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(family="gpt_oss", num_experts=EXPERTS, num_layers=3, hidden=128, intermediate=128)


class Recorder:
    """A gate that notes what it is told."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def acquire(self, layer: int, tokens: int) -> None:
        self.events.append(f"acquire {layer} for {tokens}")

    def release(self, layer: int, tokens: int) -> None:
        self.events.append(f"release {layer} for {tokens}")


class Computes:
    """In place of vLLM's class behind the mixin."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        if self.events is not None:
            self.events.append("compute")
        return x + 1

    forward_modular = forward_monolithic = _compute


class Layer(DwdpExpertsMixin, Computes):
    """A layer without weights."""

    def __init__(self, events: list[str]) -> None:
        Computes.__init__(self, events)
        self.dwdp_gate, self.dwdp_layer, self._dwdp_number = Recorder(events), 3, register_gate(Recorder(events), 3)


@pytest.mark.parametrize("forward", ["forward_modular", "forward_monolithic"])
def test_compute_is_between_acquire_and_release(forward: str) -> None:
    events: list[str] = []
    layer = Layer(events)
    assert getattr(layer, forward)(torch.zeros(2)).tolist() == [1, 1]
    assert events == ["acquire 3 for 2", "compute", "release 3 for 2"]


def test_compiled_experts_keep_the_order_and_tell_the_tokens() -> None:
    """Code that torch.compile traces through: the ops stay on either side of the compute."""
    events: list[str] = []
    layer = Layer(events)
    kept: list[list[str]] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        kept.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module

    def model(states: torch.Tensor) -> torch.Tensor:
        return layer.forward_modular(states * 2) * 3

    layer.events = None  # type: ignore[assignment] # nothing is noted while tracing
    output = torch.compile(model, backend=backend, fullgraph=True)(torch.ones(7, 2))
    assert torch.equal(output, torch.full((7, 2), 9.0))
    assert events == ["acquire 3 for 7", "release 3 for 7"]
    (targets,) = kept
    order = [next(i for i, name in enumerate(targets) if part in name) for part in ("acquire", "add", "release")]
    assert order == sorted(order)


def test_kernels_are_made_again_on_gpus(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep biases, scales and the number of experts; those of CPUs ask for them at every call."""
    loaded = load(model, 0, RANKS)
    layer: Any = loaded.build.layers[0].module
    kernel, tables = layer.quant_method.moe_kernel, []
    monkeypatch.setattr(ModelBuild.current(), "platform", CUDA)
    made: Any = type(kernel.fused_experts)
    monkeypatch.setattr(made, "attach_tables", lambda self, *given: tables.append(given), raising=False)
    layer.dwdp_tables = SplitTables(("w13", "w2"), ("w13 at owners", "w2 at owners"))  # type: ignore[arg-type]
    layer.dwdp_attach(Recorder([]), 0)
    assert layer.quant_method.moe_kernel is not kernel and tables == [tuple(layer.dwdp_tables)]
    assert layer.quant_method.moe_kernel.fused_experts.moe_config.num_local_experts == EXPERTS
