"""Checkpoints with quantised experts are what vLLM takes them for: its own config, methods and loaders read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file

from ci.checks.gpu_cases import ONLINE, QUANTISED
from examples.checkpoints import CheckpointSpec
from examples.checkpoints import expert_tensors as expert_tensors_of
from examples.checkpoints.float4 import MX_LEVELS
from examples.checkpoints.quantised import FORMS, GROUP
from tests.unit.hopper import Hopper
from tests.unit.quantised import EXPERTS, SIZES, TAKEN, plain_of, rank_of, sizes
from tests.unit.whole_model import edited, expert_layers, load, vllm_config
from vllm_dwdp.engine.options import check_model
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.page_plan import TensorPages
from vllm_dwdp.placement import place
from vllm_dwdp.platform import CPU, CUDA

CT = "compressed_tensors.compressed_tensors_moe"


pytestmark = pytest.mark.usefixtures("hopper", "no_build_stays")


def matrices(folder: Path, form: str, kernels: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(w13, w2) [E, outputs, inputs] of every layer, as vLLM's parameters mean them."""
    found = []
    for module in expert_layers(plain_of(folder, form, kernels).model).values():
        pair = []
        for name in ("w13", "w2"):
            weight = getattr(module, f"{name}_weight").data
            if kernels != "emulation":
                names = (f"{name}_weight_scale", f"{name}_weight_scale_inv", f"{name}_scale")
                scale = next(getattr(module, each) for each in names if getattr(module, each, None) is not None)
                weight = weight.float() - (128 if weight.dtype == torch.uint8 else 0)
                weight = weight * expanded(scale.data.float(), weight.shape)
            pair.append(weight.float())
        found.append((pair[0], pair[1]))
    return found


def expanded(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Scales of an expert, of its rows, groups or blocks, one for each weight."""
    scale = scale.view(*scale.shape, *[1] * (3 - scale.ndim))
    for dim in (1, 2):
        scale = scale.repeat_interleave(shape[dim] // scale.shape[dim], dim)
    return scale


#: Largest error beside the largest weight. FP8 has 3 bits behind the first; of 4 bits a step is a seventh. INT8 that vLLM
#: makes may be off by a whole step, since it divides in BF16.
ERRORS = {"online-int8": 0.008, "fp8": 0.07, "int4": 0.08, "int8": 0.005, "w8a8": 0.005}


@pytest.mark.parametrize(
    ("form", "kernels"),
    [(form, kernels) for form, kernels in TAKEN if form and kernels == "triton" and "int4" not in form]
    + [(form, "emulation") for form in ("awq-int4", "ct-int4", "ct-int4-zeros")],
)
def test_vllm_reads_the_weights_that_were_quantised(form: str, kernels: str, checkpoint: Callable[..., Path]) -> None:
    """Of 4 bits by vLLM's own way back to BF16, which takes GPTQ's stored zero points for zero points: see the next test."""
    error = next(error for word, error in ERRORS.items() if word in form)
    found = matrices(checkpoint(**sizes(form)), form, kernels)
    for expert in expert_tensors_of(checkpoint(**SIZES)):
        for read, right in zip(found[expert.layer], (expert.w13, expert.w2), strict=True):
            apart = (read[expert.expert] - right.float()).abs().max() / right.float().abs().max()
            assert 0 < apart < error


def scales_of_four_bits(module: Any, product: str, expert: int) -> torch.Tensor:
    """[outputs, groups], of an expert in NVFP4 or MXFP4 before it is processed."""
    scales: torch.Tensor = getattr(module, f"{product}_weight_scale")[expert]
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.float() - 127)
    whole = getattr(module, f"{product}_weight_scale_2", None)
    one = 1 / getattr(module, f"{product}_weight_global_scale")[expert] if whole is None else whole[expert]
    # Gate and up have the same.
    assert one.unique().numel() == 1
    return scales.float() * one.flatten()[0]


@pytest.mark.parametrize(
    ("form", "method"),
    [
        ("mxfp4", "mxfp4.GptOssMxfp4MoEMethod"),
        ("mxfp4-each", "mxfp4.Mxfp4MoEMethod"),
        ("ct-mxfp4", f"{CT}.compressed_tensors_moe_w4a4_mxfp4.CompressedTensorsW4A4Mxfp4MoEMethod"),
        ("nvfp4", "modelopt.ModelOptNvFp4FusedMoE"),
        ("ct-nvfp4", f"{CT}.compressed_tensors_moe_w4a4_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod"),
    ],
)
def test_vllm_reads_weights_of_four_bits_in_floating_point(
    form: str, method: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they lie in its parameters before they are repacked. A group's largest value may be cut by a quarter."""
    monkeypatch.setattr(
        f"vllm.model_executor.layers.quantization.{method}.process_weights_after_loading", lambda self, layer: None
    )
    whole = expert_layers(load(checkpoint(**sizes(form)), 0, 1, moe_backend="marlin").model)
    levels = torch.tensor([*MX_LEVELS, *(-level for level in MX_LEVELS)])
    for expert in expert_tensors_of(checkpoint(**{**sizes(form), "experts": ""})):
        module = list(whole.values())[expert.layer]
        for name, right in (("w13", expert.w13), ("w2", expert.w2)):
            packed = getattr(module, f"{name}_weight{'_packed' if form.startswith('ct') else ''}")[expert.expert]
            scales = scales_of_four_bits(module, name, expert.expert)
            values = levels[torch.stack([packed & 15, packed >> 4], -1).long()].view(*scales.shape, -1)
            read = (values * scales[..., None]).view(right.shape[0], -1)
            # vLLM pads rows to what its kernels want.
            assert not read[:, right.shape[1] :].any()
            apart = (read[:, : right.shape[1]] - right.float()).abs().max() / right.float().abs().max()
            assert 0 < apart < 0.26


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_and_compressed_tensors_are_the_same_to_a_kernel(bits: int, checkpoint: Callable[..., Path]) -> None:
    """Packed along other dimensions, in files and parameters of other names."""
    gptq, packed = (
        expert_layers(load(checkpoint(**SIZES, experts=f"{form}-int{bits}"), 0, 1, moe_backend="marlin").model)
        for form in ("gptq", "ct")
    )
    for one, other in zip(gptq.values(), packed.values(), strict=True):
        for name in ("w13", "w2"):
            assert torch.equal(getattr(one, f"{name}_weight"), getattr(other, f"{name}_weight"))
            assert torch.equal(getattr(one, f"{name}_scales"), getattr(other, f"{name}_weight_scale"))


@pytest.mark.parametrize(
    ("form", "name", "said"),
    [
        ("gptq-int4", "up_proj.qweight", r"w13_qweight \(up\) of 1 .*: 1;"),
        ("gptq-int8", "down_proj.scales", r"w2_scales of 1 .*: 1;"),
        ("awq-int4", "gate_proj.qweight", r"w13_qweight \(gate\) of 1 .*: 1;"),
        ("ct-int4-zeros", "up_proj.weight_zero_point", r"w13_weight_zero_point \(up\) of 1 .*: 1;"),
        ("ct-int8", "down_proj.weight_packed", r"w2_weight_packed of 1 .*: 1;"),
        ("ct-w8a8", "down_proj.weight", r"w2_weight of 1 .*: 1;"),
        ("fp8-tensor-static", "down_proj.input_scale", r"w2_input_scale of 1 .*: 1;"),
        ("nvfp4", "up_proj.weight_scale_2", r"w13_weight_scale_2 \(up\) of 1 .*: 1;"),
        ("ct-nvfp4", "down_proj.weight_packed", r"w2_weight_packed of 1 .*: 1;"),
        # Rows of 11 groups, which are no multiple of eight bytes.
        ("ct-int4-zeros", "down_proj.weight_zero_point", r"w2_weight_zero_point of 1 .*: 1;"),
    ],
)
def test_an_experts_tensor_that_is_not_there(
    form: str, name: str, said: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors[f"model.layers.1.mlp.experts.1.{name}"]
        return tensors

    odd = {"intermediate": 11 * GROUP} if name == "down_proj.weight_zero_point" else {}
    folder = edited(checkpoint(**{**sizes(form), **odd}), tmp_path / "copy", edit)
    kernels = "triton" if (form, "triton") in TAKEN else "marlin"
    with pytest.raises(DwdpError, match=f"^no tensor .* was loaded into model.layers.1.mlp.experts.{said}"):
        rank_of(folder, 0, kernels)
    rank_of(folder, 1, kernels)


@pytest.mark.parametrize(
    ("form", "name", "parameter"),
    [
        ("gptq-int4", "down_proj.scales", "w2_scales"),
        ("gptq-int8", "up_proj.qzeros", r"w13_qzeros \(up\)"),
        ("awq-int4", "gate_proj.scales", r"w13_scales \(gate\)"),
        ("awq-int4", "down_proj.qzeros", "w2_qzeros"),
        ("nvfp4", "down_proj.weight_scale", "w2_weight_scale"),
        ("ct-nvfp4", "gate_proj.weight_global_scale", r"w13_weight_global_scale \(gate\)"),
        ("ct-nvfp4", "down_proj.weight_scale", "w2_weight_scale"),
        ("ct-mxfp4", "down_proj.weight_scale", "w2_weight_scale"),
    ],
)
def test_a_tensor_that_no_expert_of_a_layer_has(
    form: str, name: str, parameter: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """vLLM has no default for it."""

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        left = {key: value for key, value in tensors.items() if not (".layers.1." in key and key.endswith(name))}
        assert len(left) == len(tensors) - EXPERTS
        return left

    folder = edited(checkpoint(**sizes(form)), tmp_path / "copy", edit)
    said = rf"^no tensor .* was loaded into model.layers.1.mlp.experts.{parameter} of 2 of this rank's 2 experts: 0, 1;"
    with pytest.raises(DwdpError, match=said):
        rank_of(folder, 0, "marlin")


def test_forms_say_what_they_are(checkpoint: Callable[..., Path]) -> None:
    """Everything but experts stays as it is."""
    for form in FORMS:
        folder = checkpoint(**sizes(form))
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] in ("fp8", "gptq", "awq", "compressed-tensors", "mxfp4", "modelopt")
        types = {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}
        kept = {dtype for name, dtype in types.items() if ".experts." not in name}
        assert kept == {torch.bfloat16}
        stem = "experts.down_proj_" if form == "mxfp4" else "experts.4.down_proj."
        assert any(stem in name for name in types)


def test_cases_for_gpus_are_those_that_are_simulated() -> None:
    """And every rank has pages to fetch there, of the smallest experts."""
    found: dict[str, set[tuple[str, str]]] = {"composite": set(), "contiguous": set(), "split": set()}
    for name, case in QUANTISED.items():
        kernels, view = case.options["moe_backend"], case.dwdp["weight_view"]
        form = name.removesuffix(f"-{kernels}-{view}")
        assert case.model.get("experts", form) == form and ("quantization" in case.options) == (form in ONLINE)
        found[view].add((form, kernels))
        spec = CheckpointSpec(**case.model)
        for row in spec.expert_bytes:
            held = case.dwdp.get("experts_per_rank")
            pages = TensorPages(place(spec.num_experts, case.ranks, held), row, 2 << 20)
            assert all(pages.missing(rank) for rank in range(case.ranks))
    assert found["composite"] == set(TAKEN) - {("", "triton")} >= found["contiguous"]
    assert found["split"] == {(f"{by}fp8-{of}", "triton") for by in ("", "online-") for of in ("block", "tensor")}


@pytest.mark.parametrize("form", ["fp8-block", "ct-int4", "gptq-int4", "awq-int4", "mxfp4", "nvfp4", "mxfp4-each"])
def test_a_launch_on_gpus_takes_them_and_one_on_cpu_does_not(
    form: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the name that vLLM has for what config.json says."""
    from vllm.model_executor.layers.quantization import auto_awq

    monkeypatch.setattr(auto_awq, "current_platform", Hopper(auto_awq.current_platform))
    config = vllm_config(checkpoint(**sizes(form))).model_config
    assert check_model(config, CUDA) == EXPERTS
    with pytest.raises(DwdpError, match=f"quantisation '{config.quantization}' is not supported .*: use a BF16"):
        check_model(config, CPU)
