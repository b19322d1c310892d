"""ci/bench/weights.py: what is written is a checkpoint as the hub has it, in which no two experts are alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("vllm")
from ci.bench.models import MODELS, write_model
from ci.bench.weights import parts, write_weights
from examples.checkpoints import CheckpointSpec, write_checkpoint


def tensors(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_names_shapes_and_values(tmp_path: Path) -> None:
    model = write_model("tiny", None, tmp_path / "fast")
    nbytes = write_weights("tiny", model)
    found = tensors(model / "model.safetensors")
    assert nbytes == (model / "model.safetensors").stat().st_size
    slow = tensors(write_checkpoint(CheckpointSpec(), tmp_path / "slow") / "model.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in slow.items()}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, tensor in found.items():
        if tensor.ndim == 2 and name != "lm_head.weight":  # some of its rows are muted there
            assert torch.isfinite(tensor).all() and abs(tensor.float().std() / slow[name].float().std() - 1) < 0.1, name
    experts = [tensor.view(torch.int16) for name, tensor in found.items() if ".experts." in name and "down" not in name]
    # Not even row by row.
    assert len({tuple(row.tolist()) for expert in experts for row in expert}) == sum(map(len, experts))
    again = write_model("tiny", None, tmp_path / "again")
    write_weights("tiny", again)
    assert (again / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_parts_cover_a_tensor_within_the_pool() -> None:
    found = list(parts("a", 1000, 64))
    assert sum(last - first for first, last in found) == 1000
    assert all(0 <= first < last <= 64 and last - first <= 16 for first, last in found)
    assert found == list(parts("a", 1000, 64)) != list(parts("b", 1000, 64))
    assert len({first for first, _ in found}) > 10


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_fp8_blocks(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CheckpointSpec(family=family, hidden=256, intermediate=128, fp8=True)
    monkeypatch.setitem(MODELS, "small-fp8", (spec, 512))
    model = write_model("small-fp8", None, tmp_path / "fast")
    write_weights("small-fp8", model)
    found = tensors(model / "model.safetensors")
    slow = tensors(write_checkpoint(spec, tmp_path / "slow") / "model.safetensors")
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}
    assert described == {name: (tensor.shape, tensor.dtype) for name, tensor in slow.items()}
    scales = {name for name in found if name.endswith("_scale_inv")}
    assert len(scales) > 3 * spec.num_experts

    def whole(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        values = tensors[name.removesuffix("_scale_inv")].float()
        scale = tensors[name].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return values * scale[: values.shape[0], : values.shape[1]]

    for name in scales:
        values = whole(found, name)
        assert torch.isfinite(values).all() and found[name].min() > 0, name
        assert abs(values.std() / whole(slow, name).std() - 1) < 0.2, name
    assert len({tuple(found[name].flatten().tolist()) for name in scales}) == len(scales)


@pytest.mark.parametrize("name", ["qwen3-int4", "gpt-oss"])
def test_other_forms_are_not_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"model {name}: only weights of one type or in FP8 blocks"):
        write_weights(name, tmp_path)
