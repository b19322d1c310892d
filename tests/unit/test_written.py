"""Rows of the share that no tensor of the checkpoint was loaded into, and experts that two layers have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from tests.unit.leftovers import TINY, check_message, refusal
from tests.unit.meeting import Meeting
from tests.unit.whole_model import edited, expert_layers, load, vllm_config
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine.loader import ShareOnlyLoader
from vllm_dwdp.layers.build import LayerBuild, ModelBuild
from vllm_dwdp.layers.coverage import check_coverage
from vllm_dwdp.layers.sharing import ExpertSharing
from vllm_dwdp.layers.tied import refuse_tied
from vllm_dwdp.layers.written import check_written, mark_rows
from vllm_dwdp.placement import place
from vllm_dwdp.platform import CPU

pytestmark = pytest.mark.usefixtures("groups")

Tensors = dict[str, torch.Tensor]

#: Two MoE layers of 5 experts: ranks of two hold 0, 1 and 2, 3, 4.
SIZES = {**TINY, "num_layers": 2, "num_experts": 5}


def without(part: str) -> Callable[[Tensors], Tensors]:
    def edit(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if part not in name}
        assert len(kept) < len(tensors)
        return kept

    return edit


def renumbered(tensors: Tensors) -> Tensors:
    """Experts numbered from 5 on, as a model with two kinds of experts numbers the second."""
    for expert in range(5):
        tensors = {name.replace(f".experts.{expert}.", f".experts.{5 + expert}."): t for name, t in tensors.items()}
    return tensors


def fewer_rows(tensors: Tensors) -> Tensors:
    return {name: tensor[:4] if ".experts." in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("fused", "edit", "words"),
    [
        pytest.param(
            False, without("layers.1.mlp.experts.3.down_proj"),
            ["layers.1.mlp.experts", ".w2_weight of 1 of this rank's 3 experts: 3;"], id="an expert's tensor",
        ),
        pytest.param(False, without("layers.0.mlp.experts.3.up_proj"), ["layers.0", "w13_weight (up)", ": 3;"], id="up"),
        pytest.param(False, without("layers.0.mlp.experts.4.gate_proj"), ["w13_weight (gate)", ": 4;"], id="gate"),
        pytest.param(False, renumbered, ["layers.0", "3 of this rank's 3 experts: 2, 3, 4", "5 more"], id="numbers"),
        pytest.param(True, fewer_rows, ["layers.0", "of 1 of this rank's 3 experts: 4"], id="fewer rows"),
    ],
)  # fmt: skip
def test_a_row_that_nothing_was_loaded_into(
    checkpoint: Callable[..., Path], tmp_path: Path, fused: bool, edit: Callable[[Tensors], Tensors], words: list[str]
) -> None:
    whole = checkpoint(family="qwen3_moe", fused=fused, **SIZES)
    broken = edited(whole, tmp_path / "broken", edit)
    check_message(refusal(lambda: load(broken, 1, 2)), [*words, "no tensor of the checkpoint", "without dwdp"])


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "mixtral", "granitemoe", "olmoe", "gpt_oss", "dummy"]
)
def test_whole_checkpoints_load(checkpoint: Callable[..., Path], family: str) -> None:
    arguments: dict[str, Any] = {"load_format": "dummy"} if family == "dummy" else {}
    named = "qwen3_moe" if family == "dummy" else family
    loaded = load(checkpoint(family=named, **SIZES), 1, 2, **arguments)
    layers = expert_layers(loaded.model)
    assert layers
    for module in layers.values():
        assert all(not parameter.isnan().any() for parameter in module.parameters())


def module_of(parameters: Tensors, padded: int = 32, real: int = 32) -> nn.Module:
    module = nn.Module()
    module.moe_config = SimpleNamespace(  # type: ignore[assignment]
        is_act_and_mul=True, intermediate_size_per_partition=padded, intermediate_size_per_partition_unpadded=real
    )
    for name, tensor in parameters.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


def build_of(*modules: nn.Module) -> ModelBuild:
    """Rank 1 of 2, with experts 2, 3 and 4 of 5."""
    build = ModelBuild(DwdpConfig(), 1, 2, platform=CPU)
    placement = place(5, 2, None)
    build.layers = [LayerBuild(module, f"layers.{i}", placement, False) for i, module in enumerate(modules)]  # type: ignore[arg-type]
    return build


def fp8_layer() -> nn.Module:
    """Three rows of FP8 weights with block scales, as vLLM allocates them, and one scale per part."""
    weights = {"w13_weight": torch.empty(3, 64, 32), "w2_weight": torch.empty(3, 32, 32)}
    scales = {"w13_weight_scale_inv": torch.ones(3, 4, 2), "w2_weight_scale_inv": torch.ones(3, 2, 2)}
    scales |= {"w13_weight_scale": torch.ones(3, 2), "w2_weight_scale": torch.ones(3), "w13_bias": torch.zeros(3, 64)}
    return module_of({**{name: weight.to(torch.float8_e4m3fn) for name, weight in weights.items()}, **scales})


def fill(module: nn.Module, *left: tuple[str, tuple[Any, ...]]) -> None:
    """Write all weights but the rows and parts of `left`."""
    for name, parameter in module.named_parameters():
        before = parameter.data.clone()
        if name.endswith("_weight") or any(name == other for other, _ in left):
            parameter.data.copy_(torch.full(parameter.shape, 0.5).to(parameter.dtype))
        for other, index in left:
            if name == other:
                parameter.data[index] = before[index]


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (("w13_weight_scale_inv", (1, slice(2, 4))), ["w13_weight_scale_inv (up)", "experts: 3;"]),
        (("w2_weight_scale_inv", (2,)), ["w2_weight_scale_inv of 1", "experts: 4;"]),
        (("w13_weight_scale", (0, 0)), ["w13_weight_scale (gate)", "experts: 2;"]),
        (("w2_weight_scale", (slice(1, 3),)), ["w2_weight_scale of 2", "experts: 3, 4;"]),
        (("w13_bias", (1,)), ["w13_bias (gate)", "experts: 3 (and 1 more", "complete the checkpoint"]),
        (("w2_weight", (0,)), ["w2_weight of 1", "experts: 2;"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_scale_or_a_bias_that_is_missing(left: tuple[str, tuple[Any, ...]], words: list[str]) -> None:
    module = fp8_layer()
    build = build_of(module)
    marks = mark_rows(build)
    fill(module, left)
    check_message(refusal(lambda: check_written(marks, build)), ["layers.0", *words])


def test_what_a_checkpoint_leaves_keeps_its_default() -> None:
    module, fresh = fp8_layer(), dict(fp8_layer().named_parameters())
    build = build_of(module)
    marks = mark_rows(build)
    fill(module)
    check_written(marks, build)
    for name, parameter in module.named_parameters():
        if not name.endswith("_weight"):
            assert torch.equal(parameter.data, fresh[name].data), name
    packed = packed_layer()
    build = build_of(packed)
    marks = mark_rows(build)
    packed.w13_qzeros.data.fill_(1)  # type: ignore[operator, union-attr]
    assert packed.w2_weight_scale.any()  # type: ignore[operator]
    check_written(marks, build)
    assert not any(parameter.any() for name, parameter in packed.named_parameters() if name != "w13_qzeros")


def packed_layer() -> nn.Module:
    """Packed integers whose rows end anywhere: 11 groups, 92 bytes, one group; GPTQ's outputs come last."""
    shapes = {"w13_weight_zero_point": (3, 8, 11), "w2_weight_zero_point": (3, 4, 1), "w13_qzeros": (3, 1, 6)}
    packed = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    module = module_of({**packed, "w2_weight_scale": torch.zeros(3, 32, 92, dtype=torch.uint8)})
    module.w13_qzeros.is_transposed = True  # type: ignore[union-attr]
    return module


@pytest.mark.parametrize(
    ("name", "index", "what"),
    [
        ("w13_weight_zero_point", (1, slice(0, 4)), "w13_weight_zero_point (gate) of 1 of this rank's 3 experts: 3;"),
        ("w13_weight_zero_point", (1, slice(4, 8)), "w13_weight_zero_point (up) of 1 of this rank's 3 experts: 3;"),
        ("w2_weight_zero_point", (0,), "w2_weight_zero_point of 1 of this rank's 3 experts: 2;"),
        ("w2_weight_scale", (2,), "w2_weight_scale of 1 of this rank's 3 experts: 4;"),
        ("w13_qzeros", (0, 0, slice(3, 6)), "w13_qzeros (up) of 1 of this rank's 3 experts: 2;"),
    ],
    ids=lambda value: value.partition(" of ")[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_packed_rows_of_any_length(name: str, index: tuple[Any, ...], what: str) -> None:
    module = packed_layer()
    build, before = build_of(module), {}
    marks = mark_rows(build)
    for other, parameter in module.named_parameters():
        before[other] = parameter.data.clone()
        # Not even what is part of a mark is one.
        parameter.data.fill_(int(before[other].reshape(-1)[0]))
    check_written(marks, build)
    module.get_parameter(name).data[index] = before[name][index]
    check_message(refusal(lambda: check_written(marks, build)), ["layers.0", what])


@pytest.mark.parametrize(
    ("name", "shape"), [("w2_weight", (3,)), ("w2_weight", (3, 1, 64)), ("w13_weight", (3, 2, 64))]
)
def test_packed_rows_that_are_too_short_to_tell(name: str, shape: tuple[int, ...]) -> None:
    build = build_of(module_of({name: torch.zeros(shape, dtype=torch.int32)}))
    check_message(refusal(lambda: mark_rows(build)), [f"layers.0.{name} {list(shape)} has too few", "without dwdp"])


def test_padding_is_no_row() -> None:
    """Rows as long as the padded size; one loader writes gate and up apart, another both at once from the first on."""
    apart = module_of({"w13_weight": torch.empty(3, 256, 64)}, padded=128, real=96)
    together = module_of({"w13_weight": torch.empty(3, 256, 64)}, padded=128, real=32)
    build = build_of(apart, together)
    marks = mark_rows(build)
    apart.w13_weight.data[:, :96, :48] = 1.0  # type: ignore[index, operator]
    apart.w13_weight.data[:, 128:224, :48] = 1.0  # type: ignore[index, operator]
    together.w13_weight.data[:, :64, :48] = 1.0  # type: ignore[index, operator]
    check_written(marks, build)


def test_tied_experts() -> None:
    first, second = (module_of({"w13_weight": torch.zeros(3, 64, 32)}) for _ in range(2))
    refuse_tied(build_of(first, second))
    words = ["layers.0.w13_weight and layers.1.w13_weight are one tensor", "without tied layers"]
    second.w13_weight.data = first.w13_weight.data.view(3, 64, 32)  # type: ignore[union-attr]
    check_message(refusal(lambda: refuse_tied(build_of(first, second))), words)
    second.w13_weight = first.w13_weight
    check_message(refusal(lambda: refuse_tied(build_of(first, second))), words)
    alias = module_of({"w13_weight": torch.zeros(3, 64, 32)})
    alias.w2_weight = alias.w13_weight
    check_message(refusal(lambda: refuse_tied(build_of(alias))), ["layers.0.w13_weight and layers.0.w2_weight"])


def test_a_drafter_is_loaded_behind_its_target(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM loads a dense drafter with the target's loader, once the target's weights are read and processed."""
    loaded = load(checkpoint(family="qwen3_moe", **SIZES), 1, 2)
    before = {name: module.w13_weight.data.clone() for name, module in expert_layers(loaded.model).items()}
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    dense = vllm_config(checkpoint(family="qwen3", **TINY))
    loader = get_model_loader(loaded.vllm_config.load_config)
    # Nor are block scales of the target shared once more.
    monkeypatch.setattr("vllm_dwdp.engine.loader.scaled_layers", None)
    with set_current_vllm_config(dense):
        loader.load_model(vllm_config=dense, model_config=dense.model_config)
    for name, module in expert_layers(loaded.model).items():
        assert torch.equal(module.w13_weight.data, before[name])


def test_a_loader_that_is_asked_again_writes_nothing(tiny_moe: Path) -> None:
    """Not even its marks: parameters are slots by then, or pages of peers that cannot be written."""
    from vllm.model_executor.model_loader import DefaultModelLoader

    loaded = load(tiny_moe, 0, 2)
    build, config = loaded.build, vllm_config(tiny_moe)
    before = {name: layer.w13_weight.clone() for name, layer in expert_layers(loaded.model).items()}
    loader: Any = type("Loader", (ShareOnlyLoader,), {})(config.load_config)
    assert isinstance(loader, DefaultModelLoader)
    build.open().shared = True
    check_message(refusal(lambda: loader.load_weights(loaded.model, config.model_config)), ["loader", "peers read"])
    assert all(torch.equal(layer.w13_weight, before[name]) for name, layer in expert_layers(loaded.model).items())


def test_tied_experts_are_refused_before_weights_are_read_and_before_slabs(checkpoint: Callable[..., Path]) -> None:
    loaded = load(checkpoint(family="gpt_oss", num_experts=8, num_layers=3), 0, 2)
    first, second, _ = (layer.module for layer in loaded.build.layers)
    second.w2_weight = first.w2_weight  # type: ignore[attr-defined]
    launch: Any = SimpleNamespace(group_of=lambda rank: [0, 1], cores=())
    words = ["layers.0.mlp.experts", "layers.1.mlp.experts", "w2_weight are one tensor"]
    check_message(refusal(lambda: check_coverage(loaded.model, loaded.build)), words)
    check_message(refusal(lambda: ExpertSharing(loaded.build, Meeting().of(0), launch)), words)
