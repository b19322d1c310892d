"""Settings that experts in some form of a checkpoint cannot have (engine/forms.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs

from tests.unit.quantised import SIZES, rank_of, sizes
from tests.unit.whole_model import expert_layers, vllm_config
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import configure
from vllm_dwdp.engine.auto_share import memory_of
from vllm_dwdp.engine.forms import check_form
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.group.launch import DwdpLaunch
from vllm_dwdp.platform import CUDA


def test_settings_that_a_form_cannot_have_are_refused_before_anything_is_loaded() -> None:
    def check(form: str | None, **settings: Any) -> None:
        arch = SimpleNamespace(quantization_config={})
        model: Any = SimpleNamespace(model="m", quantization=form, model_arch_config=arch)
        check_form(DwdpConfig(**settings), model, CUDA)

    apart = {"group": "a", "rank": 0, "ranks": 2}
    for form in ("compressed-tensors", "auto_gptq", "modelopt_fp4"):
        said = rf"^m: dwdp.decode is .travel. with quantisation '{form}', .*: leave decode out"
        with pytest.raises(DwdpError, match=said):
            check(form, decode="travel")
        check(form, decode="auto")
    for form in (None, "fp8", "fp8_per_block", "online"):
        check(form, decode="travel")
    with pytest.raises(
        DwdpError, match=r"^m: experts in NVFP4 with dwdp.group, .*: use another quantisation, or one launch"
    ):
        check("modelopt_fp4", **apart)
    check("modelopt_fp4")
    check("compressed-tensors", **apart)


def test_a_form_is_looked_at_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_name="cuda")
    monkeypatch.setattr(configure, "current_platform", platform)
    monkeypatch.setattr(configure.options.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(configure, "hide_moe", lambda config: None)
    model = SimpleNamespace(model="m", quantization="auto_gptq", get_num_experts=lambda: 8)
    monkeypatch.setattr(EngineArgs, "create_model_config", lambda self: model)
    args = EngineArgs(
        model=str(tmp_path),
        distributed_executor_backend="dwdp",
        data_parallel_size=2,
        additional_config={"dwdp": {"decode": "travel"}},
    )
    with pytest.raises(DwdpError, match=r"^m: dwdp\.decode is"):
        configure.create_engine_config(lambda args: args.create_model_config(), args)  # type: ignore[arg-type, return-value]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"quantization": "mxfp4"},
            "--quantization mxfp4 with a checkpoint that is not quantised, .*: use one that is, or ",
        ),
        ({"quantization": "gpt_oss_mxfp4"}, "--quantization gpt_oss_mxfp4 with a checkpoint that is not quantised"),
        ({"quantization": "online", "quantization_config": {"moe": "mxfp4"}}, '"moe" mxfp4, to which dwdp does not'),
        ({"quantization": "online", "quantization_config": {"moe": "nvfp4_per_token"}}, '"moe" nvfp4_per_token, to'),
        ({"quantization": "fp8_per_block", "quantization_config": {"moe": "mxfp8"}}, '"moe" mxfp8, to'),
        (
            {"quantization": "online", "quantization_config": {"moe": {"weight": "int4_per_group_32"}}},
            '"moe" .*QuantKey',
        ),
    ],
)
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_what_a_plain_checkpoint_would_be_taken_for_is_refused(
    given: dict[str, Any], said: str, family: str, checkpoint: Callable[..., Path]
) -> None:
    """By vLLM's own config of such a start, before anything is started."""
    model = vllm_config(checkpoint(**SIZES, family=family), **given).model_config
    with pytest.raises(
        DwdpError, match=rf"^{model.model}: .*{said}.* fp8_per_channel or int8_per_channel_weight_only$"
    ):
        check_form(DwdpConfig(), model, CUDA)


@pytest.mark.usefixtures("hopper")
def test_a_name_that_vllm_cannot_read_from_a_plain_checkpoint_is_refused_before_it_tries(
    checkpoint: Callable[..., Path],
) -> None:
    model = EngineArgs(model=str(checkpoint(**SIZES)), quantization="compressed-tensors").create_model_config()
    with pytest.raises(DwdpError, match="--quantization compressed-tensors with a checkpoint that is not quantised"):
        check_form(DwdpConfig(), model, CUDA)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("form", "given"),
    [
        *(("", {"quantization": name}) for name in ("fp8", *CUDA.online) if name != "online"),
        ("", {"quantization": "online", "quantization_config": {"linear": "mxfp8"}}),
        ("", {"quantization": "online", "quantization_config": {"moe": "fp8_per_block", "linear": "mxfp8"}}),
        ("mxfp4", {"quantization": "mxfp4"}),
        ("mxfp4", {}),
        ("mxfp4-each", {}),
        ("ct-int4", {"quantization": "compressed-tensors"}),
        ("gptq-int4", {}),
    ],
)
def test_forms_that_dwdp_takes(form: str, given: dict[str, Any], checkpoint: Callable[..., Path]) -> None:
    check_form(DwdpConfig(), vllm_config(checkpoint(**sizes(form)), **given).model_config, CUDA)


@pytest.mark.usefixtures("hopper", "no_build_stays")
@pytest.mark.parametrize(
    ("form", "kernels"),
    [("gptq-int4", "marlin"), ("gptq-int8", "marlin"), ("awq-int4", "marlin")]
    + [
        ("ct-int4", "triton"),
        ("ct-int4-zeros", "marlin"),
        ("ct-int8", "marlin"),
        ("nvfp4", "marlin"),
        ("mxfp4", "marlin"),
    ],
)
def test_packed_experts_take_what_was_foreseen(form: str, kernels: str, checkpoint: Callable[..., Path]) -> None:
    """Scales and zero points too, of groups as small as the checkpoint has them."""
    loaded = rank_of(checkpoint(**sizes(form)), 0, kernels, "contiguous", form)
    share = len(loaded.build.layers[0].placement.shares[0])
    built = sum(each.nbytes for layer in expert_layers(loaded.model).values() for each in layer.parameters())
    launch = DwdpLaunch(DwdpConfig.parse({"weight_view": "contiguous"}), 2, "", ())
    assert memory_of(loaded.vllm_config, launch, CUDA, 2**30).expert == pytest.approx(built / share, rel=0.02)
