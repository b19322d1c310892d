"""ci/bench/tiles.py: the tiles of DWDP's table, in files that vLLM looks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ci.bench import tiles
from ci.bench.models import write_model
from kernels.tables import FOLDER, Chip, measured


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("qwen3", ["E=128,N=384", "E=128,N=768", "E=64,N=768"]),
        ("qwen3-fp8", [f"E={part},block" for part in ("128,N=384", "128,N=768", "64,N=768")]),
    ],
)
def test_files_for_the_shapes_of_all_systems(
    model: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = Chip("NVIDIA_H200", (9, 0), 132)
    monkeypatch.setattr(tiles, "chip_of", lambda device: chip)
    folder = tmp_path / "model"
    write_model(model, 1, folder)
    shape = tiles.shape_of(folder)
    if not measured(FOLDER, chip).get(shape.key):
        with pytest.raises(ValueError, match="no table"):
            tiles.write(folder, torch.device("cpu"), 2, tmp_path / "tiles")
        return
    written = tiles.write(folder, torch.device("cpu"), 2, tmp_path / "tiles")
    files = {path.name: json.loads(path.read_text()) for path in written.iterdir()}
    kind = ",dtype=fp8_w8a8,block_shape=[128,128]" if model == "qwen3-fp8" else ""
    assert set(files) == {f"{name.removesuffix(',block')},device_name=NVIDIA_H200{kind}.json" for name in names}
    entries = measured(FOLDER, chip)[shape.key]
    for found in files.values():
        assert found["8192"]["BLOCK_SIZE_M"] == entries[8192].block_m and "SPLIT_K" not in found["8192"]


def test_vllm_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe import fused_moe

    monkeypatch.setattr(tiles, "chip_of", lambda device: Chip("NVIDIA_H200", (9, 0), 132))
    monkeypatch.setattr(fused_moe, "get_device_name_as_file_name", lambda: "NVIDIA_H200")
    folder = tmp_path / "model"
    write_model("qwen3", 1, folder)
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tiles.write(folder, torch.device("cpu"), 2, tmp_path / "tiles")))
    for experts, width in ((64, 768), (128, 384), (128, 768)):
        name = fused_moe.get_config_file_name(experts, width, None)
        assert (tmp_path / "tiles" / name).exists()
        fused_moe.get_moe_configs.cache_clear()
        found = fused_moe.get_moe_configs(experts, width, None)
        assert found is not None and set(found[8192]) >= {"BLOCK_SIZE_M", "num_warps"}
    fused_moe.get_moe_configs.cache_clear()


def test_experts_of_which_there_are_no_tiles_are_refused(tmp_path: Path) -> None:
    write_model("qwen3-int4", 1, tmp_path / "model")
    with pytest.raises(ValueError, match="no tiles for experts that compressed-tensors quantises"):
        tiles.shape_of(tmp_path / "model")
