"""ci/bench/weights.py: what is written is a checkpoint as the hub has it, in which no two experts are alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("vllm")
from ci.bench.models import write_model
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


def test_quantised_weights_are_not_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model qwen3-fp8: only weights of one type"):
        write_weights("qwen3-fp8", tmp_path)
