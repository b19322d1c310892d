"""Experts that vLLM quantises while it reads them: a rank's share is, as its experts come, and nothing waits for others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader import base_loader

from tests.unit.gpu_sharing import share_on_gpus
from tests.unit.leftovers import refusal
from tests.unit.quantised import SIZES, options, rank_of, ranks_of, sizes
from tests.unit.whole_model import Loaded, as_bytes, edited, expert_layers, load, vllm_config
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine.auto_share import memory_of
from vllm_dwdp.engine.options import check_model, check_quantisation
from vllm_dwdp.engine.stored import stored_config
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.group.launch import DwdpLaunch
from vllm_dwdp.layers.online import Arrival, watch_online
from vllm_dwdp.platform import CPU, CUDA

FORM, GIB = "online-fp8-tensor", 2**30


pytestmark = pytest.mark.usefixtures("hopper", "no_build_stays")


@pytest.mark.parametrize(
    "fields",
    [
        {**SIZES, "fused": True},
        {**SIZES, "shard_mib": 0.5},
        # Rows that vLLM pads to whole blocks.
        {**SIZES, "intermediate": 160, "num_layers": 1, "form": "online-fp8-block"},
    ],
    ids=["fused", "files", "padded"],
)
def test_a_share_has_the_bytes_of_plain_vllm_as_soon_as_it_is_read(
    fields: dict[str, Any], checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's last resort, for layers of which something never came, finds nothing to do but for rows that are padded."""
    form = str(fields.pop("form", FORM))
    folder, told = checkpoint(**fields), options(form, "triton")
    plain = list(expert_layers(load(folder, 0, 1, **told).model).values())
    late: list[str] = []
    finalise = base_loader.finalize_layerwise_processing

    def watched(model: torch.nn.Module, *args: Any) -> None:
        late.extend(name for name, module in expert_layers(model).items() if module.dwdp_arrival is not None)
        finalise(model, *args)

    monkeypatch.setattr(base_loader, "finalize_layerwise_processing", watched)
    for rank in range(2):
        settings = {"experts_per_rank": 4, "weight_view": "contiguous"}
        build = load(folder, rank, 2, settings, platform=CUDA, **told).build
        assert len(late) == (len(build.layers) if "block" in form else 0)
        late.clear()
        for layer, whole in zip(build.layers, plain, strict=True):
            share = list(layer.placement.shares[rank])
            assert len(share) == 4 and layer.module.dwdp_arrival is None
            expected = dict(whole.named_parameters())
            assert dict(layer.module.named_parameters()).keys() == expected.keys()
            for name, parameter in layer.module.named_parameters():
                assert torch.equal(as_bytes(parameter), as_bytes(expected[name])[share]), name


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (r"model.layers.1.mlp.experts.1.up_proj.weight", r"w13_weight \(up\) of 1 of this rank's 2 experts: 1;"),
        (r"model.layers.1.mlp.experts.0.down_proj.weight", "w2_weight of 1 of this rank's 2 experts: 0;"),
        # All of a layer: vLLM would take what memory held.
        ("model.layers.1.mlp.experts.", r"w13_weight \(gate\) of 2 of this rank's 2 experts: 0, 1 .*more such"),
    ],
)
def test_an_experts_tensor_that_is_not_there(
    gone: str, said: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = edited(
        checkpoint(**SIZES), tmp_path / "copy", lambda all_: {k: v for k, v in all_.items() if not k.startswith(gone)}
    )
    with pytest.raises(DwdpError, match=f"^no tensor .* was loaded into model.layers.1.mlp.experts.{said}"):
        rank_of(folder, 0, form=FORM)
    if not gone.endswith("."):
        rank_of(folder, 1, form=FORM)


def test_what_had_a_value_when_it_was_built_has_none_in_new_memory() -> None:
    """So that a bias which a checkpoint lacks is told, not taken from what memory held; the method is vLLM's again then."""
    method, processed = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod), list[Any]()
    module: Any = torch.nn.Module()
    for name, shape in (("w13_weight", (2, 8, 4)), ("w13_bias", (2, 8)), ("w2_weight", (2, 4, 4))):
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(shape), requires_grad=False))
    module.moe_config = SimpleNamespace(is_act_and_mul=True, intermediate_size_per_partition=4)
    module.moe_config.intermediate_size_per_partition_unpadded = None
    object.__setattr__(module, "quant_method", method)
    layer: Any = SimpleNamespace(module=module, name="a.layer", placement=SimpleNamespace(shares=[(3, 5)]))
    build: Any = SimpleNamespace(rank=0, layers=[layer])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(method), "process_weights_after_loading", lambda self, layer: processed.append(layer))
        arrival = Arrival(build, layer)
        arrival.mark()
        for name in ("w13_weight", "w2_weight"):
            getattr(module, name).data.fill_(1.0)
        with pytest.raises(DwdpError, match=r"into a.layer.w13_bias \(gate\) of 2 of this rank's 2 experts: 3, 5 "):
            method.process_weights_after_loading(module)
        module.w13_bias.data.fill_(1.0)
        method.process_weights_after_loading(module)
        method.process_weights_after_loading(module)
    assert processed == [module] * 2 and module.dwdp_arrival is None
    assert "process_weights_after_loading" not in vars(method)


def test_layers_are_watched_that_have_weights_without_memory() -> None:
    """Be it that a bias of theirs has some."""

    def layer(*devices: str) -> Any:
        module: Any = torch.nn.Module()
        for number, device in enumerate(devices):
            module.register_parameter(f"w{number}", torch.nn.Parameter(torch.zeros(2, device=device)))
        module.quant_method = SimpleNamespace(process_weights_after_loading=None)
        return SimpleNamespace(module=module)

    build: Any = SimpleNamespace(layers=[layer("meta", "cpu"), layer("cpu", "cpu"), layer("cpu", "meta")])
    watch_online(build)
    assert [hasattr(each.module, "dwdp_arrival") for each in build.layers] == [True, False, True]


def test_random_weights_are_quantised_too(checkpoint: Callable[..., Path]) -> None:
    told = {**options(FORM, "triton"), "load_format": "dummy"}
    made: Loaded = load(checkpoint(**SIZES), 0, 2, {"weight_view": "split"}, platform=CUDA, **told)
    for module in expert_layers(made.model).values():
        assert module.w13_weight.dtype == torch.float8_e4m3fn and module.w13_weight_scale.shape == (2,)
        assert module.w13_weight.float().isfinite().all()


@pytest.mark.parametrize(("form", "kind"), [("online-fp8-block", "block"), (FORM, "tensor")])
def test_split_kernels_know_blocks(
    form: str, kind: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = [loaded.build for loaded in ranks_of(checkpoint(**SIZES), form, view="split")]
    _, ranks = share_on_gpus(monkeypatch, "split", builds=builds)
    for rank in ranks:
        for module in rank.modules:
            method: Any = module.quant_method
            assert method.moe_kernel.fused_experts.quant_kind == kind
            assert [table.scales.kind for table in module.dwdp_tables.pulled] == [kind] * 2  # type: ignore[union-attr]
        rank.sharing.close()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"quantization": "fp8_per_tensor"}, None),
        ({"quantization": "fp8"}, None),
        ({"quantization": "online", "quantization_config": {"moe": "fp8_per_block"}}, None),
        ({"quantization": "mxfp8"}, "quantisation 'mxfp8' is not supported by this release of dwdp: .*fp8_per_tensor"),
        ({"quantization": "nvfp4_per_token"}, "quantisation 'nvfp4_per_token' is not supported"),
        ({"quantization": "humming"}, "quantisation 'humming' is not supported"),
        ({"quantization_config": {"moe": "fp8_per_tensor"}}, "with --quantization online or .* alone: leave it out"),
        (
            {"quantization": "fp8", "quantization_config": {"linear": "fp8_per_tensor"}},
            "--quantization online or the name of a scheme",
        ),
        ({"quantization": "fp8_per_block", "quantization_config": {"ignore": ["re:.*o_proj"]}}, None),
    ],
)
def test_what_may_be_asked_for(given: dict[str, Any], why: str | None, tmp_path: Path) -> None:
    args = EngineArgs(model=str(tmp_path), **given)
    said = refusal(lambda: check_quantisation(args, CPU))
    assert "not supported" in said or "leave it out" in said
    if why is None:
        check_quantisation(args, CUDA)
        model: Any = SimpleNamespace(model="m", quantization=given["quantization"], get_num_experts=lambda: 8)
        assert check_model(model, CUDA) == 8
        return
    with pytest.raises(DwdpError, match=why):
        check_quantisation(args, CUDA)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"quantization": "fp8"}, 2),
        ({"quantization": "fp8_per_block"}, 2),
        ({"quantization": "fp8_per_channel"}, 2),
        ({"quantization": "int8_per_channel_weight_only"}, 2),
        # By layer: not foreseen, so that sizes are those on disk.
        ({"quantization": "online", "quantization_config": {"targets": {"re:.*experts": "fp8_per_tensor"}}}, 1),
        ({}, 1),
    ],
)
def test_memory_is_that_of_quantised_experts(
    given: dict[str, Any], part: int, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, stored = (vllm_config(checkpoint(**SIZES), **told) for told in (given, {}))
    launch = DwdpLaunch(DwdpConfig.parse({"weight_view": "contiguous"}), 2, "", ())
    found, plain = (memory_of(each, launch, CUDA, GIB) for each in (config, stored))
    assert found.expert * part == pytest.approx(plain.expert, rel=0.01)
    # Linear layers, but for embeddings.
    assert (found.dense < plain.dense) == str(given.get("quantization")).startswith("fp8")
    blocks = stored_config(config.model_config).get("quantization_config", {}).get("weight_block_size")
    assert blocks == ([128, 128] if given.get("quantization") == "fp8_per_block" else None)
    assert "quantization_config" not in stored_config(stored.model_config)


def test_sizes_of_a_quantised_checkpoint_are_its_own(checkpoint: Callable[..., Path]) -> None:
    model = vllm_config(checkpoint(**sizes("fp8-block"))).model_config
    assert model.quantization == "fp8" and stored_config(model) == model.hf_config.to_dict()


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("fp8_per_tensor", "split"),
        ("fp8_per_block", "split"),
        ("fp8_per_channel", "contiguous"),
        ("int8_per_channel_weight_only", "contiguous"),
    ],
)
def test_memory_is_that_of_the_view_that_they_will_have(name: str, view: str, checkpoint: Callable[..., Path]) -> None:
    config = vllm_config(checkpoint(**SIZES), quantization=name)
    found = {
        each: memory_of(config, DwdpLaunch(DwdpConfig.parse({"weight_view": each}), 2, "", ()), CUDA, GIB)
        for each in ("auto", "split", "contiguous")
    }
    assert found["split"] != found["contiguous"] and found["auto"] == found[view]
