"""A layer between acquire and release, whichever way vLLM reaches its experts, and its kernel once the gate is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from tests.unit.whole_model import load, vllm_groups
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.gates import between_ops, register_gate
from vllm_dwdp.layers.routed_experts import DwdpExpertsMixin

RANKS, EXPERTS = 2, 5


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with vllm_groups():
        yield


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(family="gpt_oss", num_experts=EXPERTS, num_layers=3, hidden=128, intermediate=128)


class Recorder:
    """A gate that notes what it is told."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def acquire(self, layer: int) -> None:
        self.events.append(f"acquire {layer}")

    def release(self, layer: int) -> None:
        self.events.append(f"release {layer}")


class Computes:
    """In place of vLLM's class behind the mixin."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        self.events.append("compute")
        return x + 1

    forward_modular = forward_monolithic = _compute


class Layer(DwdpExpertsMixin, Computes):
    """A layer without weights."""

    def __init__(self, events: list[str]) -> None:
        Computes.__init__(self, events)
        self.dwdp_gate, self.dwdp_layer, self._dwdp_outside = Recorder(events), 3, False


@pytest.mark.parametrize("forward", ["forward_modular", "forward_monolithic"])
def test_compute_is_between_acquire_and_release(forward: str) -> None:
    events: list[str] = []
    layer = Layer(events)
    assert getattr(layer, forward)(torch.zeros(2)).tolist() == [1, 1]
    assert events == ["acquire 3", "compute", "release 3"]
    # Where vLLM's runner is behind the gate its experts are not.
    layer._dwdp_outside = True
    getattr(layer, forward)(torch.zeros(2))
    assert events[3:] == ["compute"]


@pytest.mark.parametrize("shared", [False, True], ids=["routed", "with shared experts"])
def test_a_runner_is_between_acquire_and_release(shared: bool) -> None:
    events: list[str] = []
    number = register_gate(Recorder(events), 4)

    def forward(x: torch.Tensor) -> Any:
        events.append("compute")
        return (x, x + 1) if shared else x + 1

    output = between_ops(forward, number)(torch.zeros(2))
    assert (output[-1] if shared else output).tolist() == [1, 1]
    assert events == ["acquire 4", "compute", "release 4"]


def test_a_runner_outside_takes_the_gate_along(model: Path) -> None:
    loaded = load(model, 0, RANKS)
    layer: Any = loaded.build.layers[1].module
    events: list[str] = []
    runner = SimpleNamespace(_forward_entry=lambda x: (events.append("op"), x)[1])
    layer.dwdp_attach(Recorder(events), 1, runner)
    runner._forward_entry(torch.zeros(2))
    assert events == ["acquire 1", "op", "release 1"] and layer._dwdp_outside


def test_kernels_are_made_again_on_gpus(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep biases, scales and the number of experts; those of CPUs ask for them at every call."""
    loaded = load(model, 0, RANKS)
    layer: Any = loaded.build.layers[0].module
    kernel, tables = layer.quant_method.moe_kernel, []
    monkeypatch.setattr(ModelBuild.current(), "on_cpu", False)
    made: Any = type(kernel.fused_experts)
    monkeypatch.setattr(made, "attach_tables", lambda self, *given: tables.append(given), raising=False)
    layer.dwdp_tables = ("w13", "w2")
    layer.dwdp_attach(Recorder([]), 0)
    assert layer.quant_method.moe_kernel is not kernel and tables == [("w13", "w2")]
    assert layer.quant_method.moe_kernel.fused_experts.moe_config.num_local_experts == EXPERTS
