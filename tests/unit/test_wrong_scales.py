"""A rank that returns with another checkpoint, whose experts are in quantised forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch

from tests.unit.leftovers import check_message, refusal
from tests.unit.quantised import sizes
from tests.unit.test_whole_adopted_forms import Life
from tests.unit.whole_model import edited

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
