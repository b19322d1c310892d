"""Settings that experts in some form of a checkpoint cannot have (engine/forms.py)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import configure
from vllm_dwdp.engine.forms import check_form
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.platform import CUDA


def test_settings_that_a_form_cannot_have_are_refused_before_anything_is_loaded() -> None:
    def check(form: str | None, **settings: Any) -> None:
        model: Any = SimpleNamespace(model="m", quantization=form)
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
