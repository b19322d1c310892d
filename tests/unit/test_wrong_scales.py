"""Ranks that come and go: one that returns with another checkpoint, whose experts are in quantised forms; static scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from tests.unit.leftovers import check_message, refusal
from tests.unit.quantised import rank_of, sizes
from tests.unit.test_whole_adopted_forms import Life
from tests.unit.whole_model import edited
from vllm_dwdp.layers.largest import share_largest

pytestmark = pytest.mark.usefixtures("hopper", "no_build_stays")


@pytest.mark.parametrize(
    ("form", "kernels", "part", "said"),
    [
        ("gptq-int4", "marlin", "2.down_proj.scales", "w2_scales"),
        ("fp8-tensor", "triton", "2.up_proj.weight_scale", "w13_weight"),
        ("ct-int4-zeros", "marlin", "2.gate_proj.weight_zero_point", "w13_weight_zero_point"),
    ],
)
def test_scales_of_another_checkpoint_are_seen(
    form: str,
    kernels: str,
    part: str,
    said: str,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Of one expert, in the form that kernels want; the second rank's is the third of all."""

    def other(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = {name: tensor for name, tensor in tensors.items() if name.endswith(f"layers.1.mlp.experts.{part}")}
        assert len(changed) == 1
        return {
            **tensors,
            **{name: tensor * 2 if tensor.is_floating_point() else ~tensor for name, tensor in changed.items()},
        }

    folder = checkpoint(**sizes(form))
    life = Life(folder, form, kernels, monkeypatch)
    adopted = life.kill()
    one = life.load(1, adopted, edited(folder, tmp_path / "other", other))
    told = refusal(lambda: life.share([one]))
    check_message(
        told, [f"layers.1.mlp.experts.{said}", "is not what the group holds", "start all ranks of the group again"]
    )
    for slab in adopted:
        slab.close()
    life.group.ranks[0].sharing.close()


@pytest.mark.parametrize(
    ("form", "kernels"),
    [("fp8-tensor-static", "triton"), ("fp8-tensor-static", "marlin"), ("ct-fp8-tensor-static", "cutlass")],
)
def test_static_scales_are_refused_before_weights_load(
    form: str, kernels: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an adopted share one expert is read, and the largest of all is not known."""
    monkeypatch.setattr("vllm_dwdp.engine.loader.mark_rows", lambda build: pytest.fail("weights are loaded"))
    apart: Any = SimpleNamespace(adopted=None, files_checked=True)
    told = refusal(lambda: rank_of(checkpoint(**sizes(form)), 0, kernels, form=form, apart=apart))
    check_message(told, ["4 static scales of activations with dwdp.group", "dynamic ones"])


def test_a_rank_that_comes_and_goes_shares_no_static_scales() -> None:
    """Nor where a method makes them while weights are processed."""
    module = torch.nn.Module()
    module.quant_method = type("Fp8MoEMethod", (), {})()  # type: ignore[assignment]
    build: Any = SimpleNamespace(apart=SimpleNamespace(), layers=[SimpleNamespace(module=module)])
    assert share_largest(build, None, [0, 1]) == 0  # type: ignore[arg-type]
    module.register_parameter("w2_input_scale", torch.nn.Parameter(torch.tensor(0.5), requires_grad=False))
    check_message(refusal(lambda: share_largest(build, None, [0, 1])), ["1 static scales"])  # type: ignore[arg-type]
