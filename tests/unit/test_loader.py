"""Which tensors of a checkpoint are read by rows of the share, and what the model's loader is shown."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import base_loader

from tests.unit.leftovers import TINY
from tests.unit.whole_model import as_bytes, load, vllm_groups
from vllm_dwdp.engine.loader import ShareOnlyLoader, _fused_names, _runs, logger
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.read_stats import READ, ReadStats

EXPERTS = 8
TENSORS = {
    "layers.0.mlp.experts.gate_up_proj": torch.arange(EXPERTS * 6.0).view(EXPERTS, 2, 3),
    "layers.0.mlp.experts.gate_up_proj_bias": torch.arange(EXPERTS * 2.0).view(EXPERTS, 2),
    # Read by every rank's router for all experts, whatever its share.
    "layers.0.mlp.experts.e_score_correction_bias": torch.arange(EXPERTS * 1.0) + 1,
    "layers.0.mlp.experts.latent.weight": torch.ones(16, 4),
    "layers.0.mlp.experts.3.down_proj.weight": torch.ones(2, 2),
    "layers.0.mlp.experts.6.down_proj.weight": torch.ones(2, 2),
    "layers.0.attention.weight": torch.ones(EXPERTS, 4),
}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    return str(path)


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> ShareOnlyLoader:
    monkeypatch.setattr(READ, "__dict__", ReadStats().__dict__)
    loader = ShareOnlyLoader(LoadConfig(load_format="auto", use_tqdm_on_load=False))
    loader.local_expert_ids = {0, 1, 2, 3, 7}
    loader._expert_by_expert = False
    return loader


def test_only_rows_of_experts_count_as_fused(file: str) -> None:
    assert _fused_names(file, {EXPERTS}) == {
        "layers.0.mlp.experts.gate_up_proj",
        "layers.0.mlp.experts.gate_up_proj_bias",
    }
    assert _fused_names(file, {EXPERTS - 1}) == set()


def test_rows_of_the_share_are_read_and_the_rest_is_whole(file: str, loader: ShareOnlyLoader) -> None:
    shown = dict(loader._share_of([file], {EXPERTS}))
    assert "layers.0.mlp.experts.6.down_proj.weight" not in shown
    for name, tensor in shown.items():
        assert tensor.shape == TENSORS[name].shape
        rows = sorted(loader.local_expert_ids or ()) if "gate_up" in name else slice(None)
        assert torch.equal(tensor[rows], TENSORS[name][rows])
    # Five of eight rows of 24 and 8 bytes, then the whole tensors under `.experts.`.
    assert READ.expert_bytes == 5 * (24 + 8) + 32 + 256 + 16
    assert READ.other_bytes == EXPERTS * 4 * 4


def test_expert_by_expert(file: str, loader: ShareOnlyLoader) -> None:
    loader._expert_by_expert = True
    loader.local_expert_ids = {1, 7, 9}
    shown = dict(loader._share_of([file], {EXPERTS}))
    assert torch.equal(shown["layers.0.mlp.experts.7.gate_up_proj"], TENSORS["layers.0.mlp.experts.gate_up_proj"][7])
    # Another layer may have more experts: there is no ninth row here.
    assert not any(".experts.9." in name for name in shown)


def test_runs() -> None:
    assert _runs([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 6), (7, 9)]
    assert _runs([]) == []


@pytest.mark.parametrize("expert_by_expert", [False, True])
def test_files_of_torch_save_are_read_whole_with_one_warning(
    expert_by_expert: bool,
    tmp_path: Path,
    loader: ShareOnlyLoader,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *words: warned.append(text % words))
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    layer = SimpleNamespace(placement=SimpleNamespace(num_experts=EXPERTS))
    for rank in (0, 1):
        monkeypatch.setattr(ModelBuild, "_current", SimpleNamespace(layers=[layer], rank=rank, apart=None))
        loader._expert_by_expert = expert_by_expert
        shown = dict(loader._get_weights_iterator(ShareOnlyLoader.Source(str(tmp_path), None)))
        for name, whole in TENSORS.items():
            if expert_by_expert and "gate_up" in name:
                assert name not in shown
                for expert in (0, 1, 2, 3, 7):
                    part = shown.pop(name.replace(".experts.", f".experts.{expert}."))
                    assert torch.equal(part, whole[expert])
            else:
                assert torch.equal(shown.pop(name), whole)
        assert not shown
    assert READ.expert_bytes > 2 * EXPERTS * (24 + 8)
    assert len(warned) == 1 and "every rank reads the whole checkpoint (pytorch_model.bin)" in warned[0]


@pytest.mark.parametrize(("family", "fused"), [("gpt_oss", False), ("qwen3_moe", False), ("qwen3_moe", True)])
def test_files_of_torch_save_give_the_bytes_of_safetensors(
    family: str, fused: bool, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts one by one, fused ones, and those of a loader that is shown single experts, in vLLM's own models."""
    monkeypatch.setattr(ModelBuild, "_current", None)
    # It packs dense weights, and empties their parameters.
    monkeypatch.setattr(base_loader, "process_weights_after_loading", lambda *_: None)
    whole = checkpoint(**{**TINY, "family": family, "num_layers": 2, "num_experts": 5, "fused": fused})
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(whole / "model.safetensors"), copy / "pytorch_model.bin")
    with vllm_groups():
        one, other = (dict(load(path, 1, 2).model.named_parameters()) for path in (whole, copy))
    assert one.keys() == other.keys() and len(one) > 20
    for name, parameter in one.items():
        assert torch.equal(as_bytes(parameter), as_bytes(other[name])), name
