"""Quantised experts as vLLM's own methods load and process them, shared on the simulated device: every byte of every
parameter, and of whatever kernel objects keep, as plain vLLM has it. Kernels do not run here."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file

from ci.checks.gpu_cases import QUANTISED
from examples.checkpoints import CheckpointSpec
from examples.checkpoints import expert_tensors as expert_tensors_of
from examples.checkpoints.quantised import FORMS, MX_LEVELS
from tests.unit import fake_vmm
from tests.unit.gpu_sharing import MANY, share_on_gpus
from tests.unit.hopper import on_hopper
from tests.unit.leftovers import check_message, refusal
from tests.unit.whole_model import Loaded, edited, expert_layers, load, vllm_groups
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers import gates, methods
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.kept import _tensors_in
from vllm_dwdp.layers.slabs import expert_tensors, tensors_of
from vllm_dwdp.layers.views import choose_view, split
from vllm_dwdp.page_plan import TensorPages
from vllm_dwdp.placement import place
from vllm_dwdp.platform import CUDA

EXPERTS, RANKS, FEW = 5, 2, 16
SIZES = {"num_experts": EXPERTS, "num_layers": 2, "hidden": 256, "intermediate": 128}

#: (form of the experts on disk, --moe-backend): all that are admitted and that vLLM's own choice takes on such a GPU.
TAKEN = [
    *((form, kernels) for form in ("fp8-block", "fp8-tensor", "fp8-tensor-static") for kernels in ("triton", "marlin")),
    *((f"ct-fp8-{form}", "cutlass") for form in ("channel", "tensor-static")),
    *((f"ct-fp8-{form}", "triton") for form in ("channel", "block", "tensor-static")),
    *((f"ct-fp8-{form}", "marlin") for form in ("channel", "block", "tensor-static")),
    *((form, "marlin") for form in ("gptq-int4", "gptq-int8", "awq-int4", "ct-int4", "ct-int4-zeros", "ct-int8")),
    *((form, "triton") for form in ("ct-int4", "ct-int4-zeros", "ct-int8", "ct-w8a8")),
    ("mxfp4", "marlin"),
    ("", "triton"),
]
#: Without cases for GPUs: FlashInfer is not among what is installed there.
FLASHINFER = [
    (form, "flashinfer_cutlass")
    for form in ("", "fp8-block", "fp8-tensor-static", "ct-fp8-block", "ct-fp8-tensor-static")
]


#: One of each method, kernels and kind of parameters.
COMPOSITE = [
    ("fp8-block", "triton"), ("fp8-tensor-static", "triton"), ("fp8-block", "marlin"), ("ct-fp8-channel", "cutlass"),
    ("ct-fp8-tensor-static", "cutlass"), ("gptq-int4", "marlin"), ("awq-int4", "marlin"), ("ct-int4-zeros", "marlin"),
    ("ct-int4", "triton"), ("ct-w8a8", "triton"), ("mxfp4", "marlin"), ("fp8-tensor-static", "flashinfer_cutlass"),
]  # fmt: skip
CONTIGUOUS = [("fp8-tensor-static", "marlin"), ("ct-fp8-channel", "triton"), ("gptq-int8", "marlin")]


def sizes(form: str) -> dict[str, Any]:
    return {**SIZES, "experts": form, **({"family": "gpt_oss"} if form == "mxfp4" else {})}


def cases() -> Iterator[Any]:
    for view, quick in (("composite", COMPOSITE), ("contiguous", CONTIGUOUS)):
        for taken in (*TAKEN, *FLASHINFER):
            yield pytest.param(*taken, view, marks=() if taken in quick else pytest.mark.full)


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with vllm_groups(), on_hopper():
        yield


@pytest.fixture(autouse=True)
def no_build_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ModelBuild, "_current", None)
    yield
    gates._gates.clear()
    gc.collect()


def rank_of(folder: Path, rank: int, kernels: str = "triton", view: str = "auto") -> Loaded:
    return load(folder, rank, RANKS, {"weight_view": view}, platform=CUDA, moe_backend=kernels)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def kept(module: Any) -> list[tuple[torch.Size, torch.dtype, bytes]]:
    """All tensors that the kernel object of a layer has of it."""
    method = module.quant_method
    found = _tensors_in([method.moe_kernel, method.moe_quant_config], set())
    return [(tensor.shape, tensor.dtype, as_bytes(tensor)) for tensor in found]


@pytest.mark.parametrize(("form", "kernels", "view"), list(cases()))
def test_every_byte_is_plain_vllms(
    form: str, kernels: str, view: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_vmm, "PAGE", 3 * 4096)
    folder = checkpoint(**sizes(form))
    plain = list(expert_layers(load(folder, 0, 1, moe_backend=kernels).model).values())
    direct = {"direct_tokens": FEW} if view == "composite" else {}
    builds = [rank_of(folder, rank, kernels, view).build for rank in range(RANKS)]
    _, ranks = share_on_gpus(monkeypatch, view, builds=builds, **direct)
    for rank in ranks:
        rank.sharing.start()
        for number, (module, whole) in enumerate(zip(rank.modules, plain, strict=True)):
            assert module.local_num_experts == module.moe_config.num_local_experts == EXPERTS  # type: ignore[attr-defined]
            expected = dict(whole.named_parameters())
            for tokens in (MANY, FEW, MANY):
                assert module.dwdp_gate is not None
                module.dwdp_gate.acquire(number, tokens)
                rank.device.machine.drain()
                found = dict(module.named_parameters())
                assert list(found) == list(expected)
                for name, parameter in found.items():
                    assert (parameter.shape, parameter.dtype) == (expected[name].shape, expected[name].dtype), name
                    assert as_bytes(parameter) == as_bytes(expected[name]), name
                # What the kernel is given under the names that it asks for.
                assert as_bytes(module.w13_weight) == as_bytes(whole.w13_weight)
                assert kept(module) == kept(whole)
                module.dwdp_gate.release(number, tokens)
        rank.sharing.close()


def matrices(folder: Path, form: str, kernels: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(w13, w2) [E, outputs, inputs] of every layer, as vLLM's parameters mean them."""
    found = []
    for module in expert_layers(load(folder, 0, 1, moe_backend=kernels).model).values():
        pair = []
        for name in ("w13", "w2"):
            weight = getattr(module, f"{name}_weight").data
            if kernels != "emulation":
                scale = getattr(module, f"{name}_weight_scale", None)
                scale = getattr(module, f"{name}_weight_scale_inv", None) if scale is None else scale
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


#: Largest error beside the largest weight. FP8 has 3 bits behind the first; of 4 bits a step is a seventh.
ERRORS = {"fp8": 0.07, "int4": 0.08, "int8": 0.005, "w8a8": 0.005}


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


def test_vllm_reads_gpt_osss_weights_that_were_quantised(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they lie in its parameters before they are repacked. A group's largest value may be cut by a quarter."""
    from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4MoEMethod

    monkeypatch.setattr(GptOssMxfp4MoEMethod, "process_weights_after_loading", lambda self, layer: None)
    whole = expert_layers(load(checkpoint(**sizes("mxfp4")), 0, 1, moe_backend="marlin").model)
    levels = torch.tensor([*MX_LEVELS, *(-level for level in MX_LEVELS)])
    for expert in expert_tensors_of(checkpoint(**SIZES, family="gpt_oss")):
        module = list(whole.values())[expert.layer]
        for name, right in (("w13", expert.w13), ("w2", expert.w2)):
            packed, exponents = (getattr(module, f"{name}_weight{part}")[expert.expert] for part in ("", "_scale"))
            values = levels[torch.stack([packed & 15, packed >> 4], -1).long()].view(right.shape[0], -1, 32)
            read = (values * torch.exp2(exponents.float() - 127)[..., None]).view(right.shape[0], -1)
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
    ],
)
def test_an_experts_tensor_that_is_not_there(
    form: str, name: str, said: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors[f"model.layers.1.mlp.experts.1.{name}"]
        return tensors

    folder = edited(checkpoint(**sizes(form)), tmp_path / "copy", edit)
    kernels = "triton" if (form, "triton") in TAKEN else "marlin"
    with pytest.raises(DwdpError, match=f"^no tensor .* was loaded into model.layers.1.mlp.experts.{said}"):
        rank_of(folder, 0, kernels)
    rank_of(folder, 1, kernels)


@pytest.mark.parametrize("form", ["gptq-int4", "awq-int4", "ct-int4"])
def test_kernels_that_break_the_rule_are_refused_before_weights_load(
    form: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM dequantises at start and leaves one scale in place of a row per expert."""
    monkeypatch.setattr("vllm_dwdp.engine.loader.mark_rows", lambda build: pytest.fail("weights are loaded"))
    message = refusal(lambda: rank_of(checkpoint(**sizes(form)), 0, "emulation"))
    check_message(
        message, ["kernels EMULATION", "scales without a row per expert", "dwdp needs --moe-backend", "marlin"]
    )


@pytest.mark.parametrize(
    ("method", "kernels", "said"),
    [
        ("Fp8MoEMethod", "DEEPGEMM", "strides that slabs do not keep: dwdp needs --moe-backend triton or marlin"),
        ("Fp8MoEMethod", "HUMMING", "a layout of their own"),
        ("UnquantizedFusedMoEMethod", "FLASHINFER_TRTLLM", "counts of the experts that they were made with"),
        ("AutoGPTQMoEMethod", "TRITON", "the kernels TRITON: dwdp needs --moe-backend marlin"),
        ("UnquantizedFusedMoEMethod", None, "the kernels None"),
        ("MoeWNA16Method", "TRITON", "use MoeWNA16Method, which this release"),
        ("ModelOptNvFp4FusedMoE", "MARLIN", "use ModelOptNvFp4FusedMoE, which this release"),
    ],
)
def test_methods_and_kernels_that_are_not_known(method: str, kernels: str | None, said: str) -> None:
    def made(kernels: str | None) -> Any:
        given = None if kernels is None else SimpleNamespace(name=kernels)
        known = methods.METHODS.get(method)
        return type(method, (), {known.backend if known else "backend": given})()

    assert said in str(methods.why_not(made(kernels), on_cpu=False))
    for name in methods.METHODS[method].kernels if method in methods.METHODS else ():
        assert methods.why_not(made(name), on_cpu=False) is None
        assert (methods.why_not(made(name), on_cpu=True) is None) == (method == methods.UNQUANTISED)


class Layer(torch.nn.Module):
    """Of 3 experts, computed by vLLM's method of this name."""

    def __init__(self, method: str, **parameters: torch.Tensor) -> None:
        super().__init__()
        self.quant_method = type(method, (), {})()
        for name, data in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(data, requires_grad=False))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        # As long as the share, by accident.
        ("workspace", torch.zeros(3), r"layer.workspace \[3\] is no parameter that .* knows of Fp8MoEMethod"),
        ("w13_weight_scale", torch.zeros(1), "layer.w13_weight_scale has 1 rows for a share of 3"),
        ("w13_weight_scale", torch.tensor(1.0), "layer.w13_weight_scale has no rows for a share of 3"),
        # Experts behind another dimension, as some kernels' scales lie.
        ("w13_weight_scale_inv", torch.zeros(2, 3), "has 2 rows for a share of 3"),
        (
            "w13_weight_scale_inv",
            torch.zeros(3, 4, 2).mT,
            r"\[3, 2, 4\] has strides \[8, 1, 2\], which a slab would not",
        ),
        ("w2_bias", torch.zeros(3, 0), r"layer.w2_bias has empty rows \[3, 0\]"),
    ],
)
def test_parameters_that_break_the_rule(name: str, data: torch.Tensor, said: str) -> None:
    weights = {"w13_weight": torch.zeros(3, 4, 2), "w2_weight": torch.zeros(3, 2, 2)}
    expert_tensors(Layer("Fp8MoEMethod", **weights), 3, "layer")
    with pytest.raises(DwdpError, match=said):
        expert_tensors(Layer("Fp8MoEMethod", **weights, **{name: data}), 3, "layer")


def test_a_largest_value_is_no_row_and_nothing_else_is_one() -> None:
    layer = Layer("Fp8MoEMethod", w13_weight=torch.zeros(3, 4, 2), w13_input_scale=torch.tensor(1.0))
    fetched, small = expert_tensors(layer, 3, "layer")
    assert [tensor.name for tensor in (*fetched, *small)] == ["w13_weight"]
    with pytest.raises(DwdpError, match=r"w13_input_scale \[\] is no parameter that .* knows of Unquantized"):
        expert_tensors(Layer(methods.UNQUANTISED, w13_input_scale=torch.tensor(1.0)), 3, "layer")


@pytest.mark.parametrize(
    ("form", "kernels", "why"),
    [
        ("fp8-block", "triton", None),
        ("fp8-tensor", "triton", None),
        ("fp8-block", "marlin", "are computed by the kernels MARLIN"),
        (
            "fp8-tensor-static",
            "triton",
            "are computed by Fp8MoEMethod with static scales, for which no split-weight kernel was tried",
        ),
        ("ct-fp8-channel", "triton", "are computed by CompressedTensorsW8A8Fp8MoEMethod, for which"),
        ("ct-fp8-channel", "cutlass", "are computed by the kernels VLLM_CUTLASS"),
        ("ct-w8a8", "triton", "are computed by CompressedTensorsW8A8Int8MoEMethod, for which"),
    ],
)
def test_layers_that_have_a_split_view(
    form: str, kernels: str, why: str | None, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(**sizes(form))
    build = rank_of(folder, 0, kernels).build
    found = split.why_not(tensors_of(build)[0])
    assert choose_view(build, tensors_of(build)) == ("contiguous" if why else "split")
    if why is None:
        assert found is None
        return
    assert str(found).startswith(why)
    # Asked for, it is refused before weights load.
    monkeypatch.setattr("vllm_dwdp.engine.loader.mark_rows", lambda build: pytest.fail("weights are loaded"))
    with pytest.raises(DwdpError, match=f'weight_view "split": experts of model.layers.0.* {why}.*: use weight_view'):
        rank_of(folder, 0, kernels, "split")


def test_forms_say_what_they_are(checkpoint: Callable[..., Path]) -> None:
    """Everything but experts stays as it is."""
    for form in FORMS:
        folder = checkpoint(**sizes(form))
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] in ("fp8", "gptq", "awq", "compressed-tensors", "mxfp4")
        types = {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}
        kept = {dtype for name, dtype in types.items() if ".experts." not in name}
        assert kept == {torch.bfloat16}
        stem = "experts.down_proj_" if form == "mxfp4" else "experts.4.down_proj."
        assert any(stem in name for name in types)


def test_cases_for_gpus_are_those_that_are_simulated() -> None:
    """And every rank has pages to fetch there, of the smallest experts."""
    found: dict[str, set[tuple[str, str]]] = {"composite": set(), "contiguous": set(), "split": set()}
    for name, case in QUANTISED.items():
        form, kernels = case.model["experts"], case.options["moe_backend"]
        assert name == f"{form}-{kernels}-{case.dwdp['weight_view']}"
        found[case.dwdp["weight_view"]].add((form, kernels))
        spec = CheckpointSpec(**case.model)
        for row in spec.expert_bytes:
            pages = TensorPages(place(spec.num_experts, case.ranks), row, 2 << 20)
            assert all(pages.missing(rank) for rank in range(case.ranks))
    assert found["composite"] == set(TAKEN) - {("", "triton")} >= found["contiguous"]
    assert found["split"] == {("fp8-block", "triton"), ("fp8-tensor", "triton")}


@pytest.mark.parametrize(
    ("form", "kernels"), [("ct-int4", "marlin"), ("ct-w8a8", "triton"), ("ct-fp8-channel", "cutlass")]
)
def test_a_layer_that_the_warm_up_left_out_has_nothing_to_compute_with(
    form: str, kernels: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integers have no NaN, and kernels that take addresses would read past one line of it."""
    folder = checkpoint(**sizes(form))
    builds = [rank_of(folder, rank, kernels, "contiguous").build for rank in range(RANKS)]
    plain = list(expert_layers(load(folder, 0, 1, moe_backend=kernels).model).values())[1]
    _, ranks = share_on_gpus(monkeypatch, "contiguous", builds=builds)
    for rank in ranks:
        rank.sharing.start()
        used, left_out = rank.modules
        used.dwdp_gate.acquire(0, MANY)  # type: ignore[union-attr]
        used.dwdp_gate.release(0, MANY)  # type: ignore[union-attr]
        rank.sharing.seal_unused()
        assert len(used.w13_weight) == EXPERTS and not left_out.w13_weight.numel() and not left_out.w2_weight.numel()
        left_out.dwdp_gate.acquire(1, MANY)  # type: ignore[union-attr]
        rank.device.machine.drain()
        assert as_bytes(left_out.w13_weight) == as_bytes(plain.w13_weight)
        rank.sharing.close()
