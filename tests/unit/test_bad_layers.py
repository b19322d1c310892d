"""Layers that cannot be shared, and memory that does not suffice: one line, before weights are loaded."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from torch import nn

from tests.unit.leftovers import check_message, refusal
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.layers.build import LayerBuild, ModelBuild
from vllm_dwdp.layers.coverage import check_coverage, check_memory
from vllm_dwdp.layers.routed_experts import DwdpExpertsMixin
from vllm_dwdp.layers.transports import make_transport
from vllm_dwdp.placement import place
from vllm_dwdp.platform import CPU, CUDA
from vllm_dwdp.transport import limits
from vllm_dwdp.transport.shm import ShmTransport

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("what", ["slab", "slot"])
def test_memory_that_does_not_suffice(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before a page of it is touched, or even reserved."""
    monkeypatch.setattr(limits, "available_memory", lambda: limits.Available(1 << 30, "the cgroup of this test"))
    monkeypatch.setattr(os, "memfd_create", lambda *_: pytest.fail("memory was taken"))
    transport = ShmTransport()
    message = refusal(lambda: getattr(transport, f"allocate_{what}")(5 << 30))
    check_message(message, [f"a {what} needs 5.00 GiB", "the cgroup of this test leaves 1.00 GiB", "use more ranks"])


def moe_layer(experts: int = 8, inner: int = 32, hidden: int = 32) -> Any:
    return SimpleNamespace(
        num_experts=experts, intermediate_size_per_partition=inner, hidden_dim=hidden, is_act_and_mul=True
    )


def add(settings: dict[str, Any], layer: Any, ranks: int = 2) -> tuple[int, ...]:
    build = ModelBuild(DwdpConfig.parse(settings), 0, ranks, platform=CPU)
    return build.add_layer(None, "model.layers.3.mlp.experts", torch.bfloat16, layer)  # type: ignore[arg-type]


def test_in_place_where_experts_do_not_end_on_pages() -> None:
    odd = moe_layer(hidden=33)
    message = refusal(lambda: add({"weight_view": "inplace"}, odd))
    check_message(message, ['"inplace"', "model.layers.3", "4224 and 2112 bytes", "4096", "auto or contiguous"])
    assert add({"weight_view": "auto"}, odd) == (0, 1, 2, 3)


def test_a_layer_with_fewer_experts_than_ranks() -> None:
    check_message(refusal(lambda: add({}, moe_layer(experts=3), ranks=4)), ["4 ranks", "3 experts", "to 3 or less"])


def test_fused_shared_experts() -> None:
    fused = SimpleNamespace(num_fused_shared_experts=2)
    message = refusal(lambda: DwdpExpertsMixin("layers.3.experts", torch.bfloat16, None, None, fused))  # type: ignore[arg-type]
    check_message(message, ["layers.3.experts fuses 2 shared experts", "turn shared-expert fusion off"])


def test_models_that_are_not_covered() -> None:
    empty = ModelBuild(DwdpConfig(), 0, 2, platform=CPU)
    check_message(refusal(lambda: check_coverage(nn.Linear(2, 2), empty)), ["Linear", "no MoE layer", "not support"])
    covered = dataclasses.replace(empty, layers=[LayerBuild(None, "layer", place(8, 2, None), False)])  # type: ignore[arg-type]
    model = nn.Module()
    model.add_module("experts", nn.Module())
    model.get_submodule("experts").register_parameter("w", nn.Parameter(torch.zeros(8, 2, 2)))
    holder = nn.Module()
    holder.add_module("mlp", model)
    check_message(refusal(lambda: check_coverage(holder, covered)), ["mlp.experts.w holds 8 experts", "not supported"])


@pytest.mark.parametrize(("view", "slots"), [("contiguous", "0.75"), ("auto", "0.00")])
def test_memory_that_does_not_suffice_for_all_ranks(view: str, slots: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with half of the experts each; known once the layers exist, before their weights are read."""
    monkeypatch.setattr(limits, "available_memory", lambda: limits.Available(1 << 30, "the cgroup of this test"))
    half = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(nbytes=3 << 26)]))
    layers = [LayerBuild(half, f"layers.{i}", place(8, 2, None), True) for i in range(3)]  # type: ignore[arg-type]
    group = dataclasses.replace(ModelBuild(DwdpConfig.parse({"weight_view": view}), 0, 2, platform=CPU), layers=layers)
    needed = "2.62 GiB" if view == "contiguous" else "1.12 GiB"
    words = [
        "2 ranks with 0.56 GiB of experts",
        f"{slots} GiB of slots",
        f"needs {needed}",
        "leaves 1.00 GiB",
        "free memory",
    ]
    check_message(refusal(lambda: check_memory(group)), words)


def test_a_transport_that_is_not_there() -> None:
    gpu = ModelBuild(DwdpConfig(transport="shm"), 0, 2, platform=CUDA)
    check_message(refusal(lambda: make_transport(gpu, (), "split")), ["'shm'", "GPUs", "cupy_ipc"])
    cpu = ModelBuild(DwdpConfig(transport="cupy_ipc"), 0, 2, platform=CPU)
    check_message(refusal(lambda: make_transport(cpu, (), "inplace")), ["'cupy_ipc'", "CPU", "shm"])
