"""`--load-format dummy` of quantised experts: what vLLM's own dummy weights leave as memory has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from tests.unit.quantised import SIZES, rank_of, sizes
from tests.unit.whole_model import as_bytes, expert_layers
from vllm_dwdp.engine.dummy import draw_firsts, draw_packed
from vllm_dwdp.layers.build import BuildApart

pytestmark = pytest.mark.usefixtures("hopper", "no_build_stays")


def drawn(**parameters: torch.Tensor) -> dict[str, torch.Tensor]:
    """`parameters` of a layer's experts, after what `draw_packed` does."""
    module = torch.nn.Module()
    for name, data in parameters.items():
        module.register_parameter(name, torch.nn.Parameter(data.clone(), requires_grad=False))
    build: Any = SimpleNamespace(layers=[SimpleNamespace(module=module)])
    draw_packed(build.layers)
    return {name: parameter.data for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(
    ("form", "kernels", "name"),
    [("ct-int4", "triton", "w13_weight_packed"), ("ct-w8a8", "triton", "w2_weight"), ("mxfp4", "marlin", "w13_weight")],
)
def test_packed_integers_are_drawn(form: str, kernels: str, name: str, checkpoint: Callable[..., Path]) -> None:
    """And the model is not refused as one whose checkpoint lacks them."""
    ranks = [rank_of(checkpoint(**sizes(form)), rank, kernels, "composite", load_format="dummy") for rank in (0, 0)]
    for one, again in zip(*(expert_layers(rank.model).values() for rank in ranks), strict=True):
        data = getattr(one, name).data.view(torch.uint8)
        assert torch.equal(data, getattr(again, name).data.view(torch.uint8))
        assert len(data.unique()) > 100


def test_a_rank_that_returns_draws_what_it_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one expert built instead of all; drawn as on a GPU, where all numbers change with how many there are."""
    draw = torch.Tensor.random_

    def by_size(tensor: torch.Tensor, low: int, high: int, generator: torch.Generator) -> torch.Tensor:
        return draw(tensor, low, high, generator=torch.Generator().manual_seed(tensor.numel()))

    monkeypatch.setattr(torch.Tensor, "random_", by_size)
    rows = torch.zeros((5, 3, 4), dtype=torch.int32)
    all_, first = drawn(w13_qweight=rows), drawn(w13_qweight=rows[:1])
    assert torch.equal(all_["w13_qweight"][:1], first["w13_qweight"])


def test_what_vllm_gives_a_value_keeps_it() -> None:
    """Such as scales of which another one would be out of range; other numbers are drawn, of the first expert alone."""
    module = torch.nn.Module()
    for name in ("w13_weight", "w13_weight_scale"):
        module.register_parameter(name, torch.nn.Parameter(torch.ones(2, 3), requires_grad=False))
    module.w13_weight_scale.dummy_weight_value = 1.0  # type: ignore[union-attr, assignment]
    build: Any = SimpleNamespace(layers=[SimpleNamespace(module=module)])
    draw_firsts(build.layers)
    ones = {name: (parameter == 1).all(1).tolist() for name, parameter in module.named_parameters()}
    assert ones == {"w13_weight": [False, True], "w13_weight_scale": [True, True]}


def test_what_is_no_weight_is_left_alone() -> None:
    given = {
        "w13_g_idx": torch.arange(6, dtype=torch.int32).view(2, 3),
        "w13_weight_shape": torch.tensor([[8, 16]] * 2),
        "w2_weight": torch.ones((2, 3)),
        # Of a router: experts by the hash of a token.
        "hash_indices_table": torch.arange(6).view(2, 3),
    }
    found = drawn(**given)
    assert all(torch.equal(found[name], data) for name, data in given.items())


def test_exponents_of_scales_are_small() -> None:
    found = drawn(w13_weight_scale=torch.zeros((2, 3), dtype=torch.uint8))["w13_weight_scale"]
    assert (found == 120).all()


def test_what_a_layer_says_of_its_dummy_weights_holds() -> None:
    module = torch.nn.Module()
    for name, value in (("w2_weight_scale", 127), ("w13_weight_scale", None)):
        parameter: Any = torch.nn.Parameter(torch.zeros((2, 3), dtype=torch.uint8), requires_grad=False)
        parameter.dummy_weight_value = value
        module.register_parameter(name, parameter)
    build: Any = SimpleNamespace(layers=[SimpleNamespace(module=module)])
    draw_packed(build.layers)
    assert [int(parameter[0, 0]) for parameter in module.parameters()] == [0, 120]


#: Not in blocks, which vLLM quantises by compiled code.
ONLINE = [("online-fp8-channel", "triton"), ("online-fp8-tensor", "marlin"), ("online-int8", "triton")]


def rows(folder: Path, form: str, kernels: str, **more: Any) -> dict[str, torch.Tensor]:
    """Random experts that vLLM has quantised, of the second rank: bytes of each parameter, by row."""
    loaded = rank_of(folder, 1, kernels, "contiguous", form, load_format="dummy", **more)
    return {
        f"{layer}.{name}": as_bytes(parameter).clone()
        for layer, module in expert_layers(loaded.model).items()
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize(("form", "kernels"), ONLINE)
def test_what_vllm_quantises_is_drawn_before(
    form: str, kernels: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn after that would be no weight: scales below zero, bytes that are NaN."""
    found = rows(checkpoint(**SIZES), form, kernels)
    monkeypatch.setattr("vllm_dwdp.engine.loader.draw_packed", lambda layers: None)
    monkeypatch.setattr("vllm_dwdp.engine.loader.draw_firsts", lambda layers: pytest.fail("not vLLM's own numbers"))
    plain = rows(checkpoint(**SIZES), form, kernels)
    assert [name for name, data in found.items() if not torch.equal(data, plain[name])] == []
    monkeypatch.undo()
    apart = BuildApart(None, 1, 1, lambda held: None, lambda files: None)
    drawn = rows(checkpoint(**SIZES), form, kernels, apart=apart)
    assert drawn.keys() == plain.keys()
    scales = {name: data.view(torch.float32) for name, data in drawn.items() if "scale" in name}
    assert scales and all((scale > 0).all() for scale in scales.values())


@pytest.mark.parametrize(("form", "kernels"), ONLINE)
def test_a_rank_that_returns_finds_quantised_experts_again(
    form: str, kernels: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one expert built instead of all; drawn as on a GPU, where all numbers change with how many there are."""

    def draw(tensor: torch.Tensor) -> None:
        if tensor.is_floating_point() and not tensor.is_meta:
            tensor.data.uniform_(-1e-3, 1e-3, generator=torch.Generator().manual_seed(tensor.numel()))

    for module in ("vllm.model_executor.model_loader.dummy_loader", "vllm_dwdp.engine.dummy"):
        monkeypatch.setattr(f"{module}.initialize_single_dummy_weight", draw)
    all_, first = (
        rows(checkpoint(**SIZES), form, kernels, apart=BuildApart(adopted, 1, 0, lambda held: None, lambda files: None))
        for adopted in (None, [])
    )
    assert {name: len(data) for name, data in first.items()} == dict.fromkeys(all_, 1)
    assert [name for name, data in first.items() if not torch.equal(all_[name][:1], data)] == []
