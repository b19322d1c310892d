"""The same tiles for every system of loads.py: DWDP's own for a model, as files that vLLM reads for its shapes too.

vLLM ships tile tables for some shapes and cards and computes with default tiles elsewhere. With --tiles alike all systems
have the tiles that DWDP's table holds for the whole layer, whatever part of it a system computes on one device: what is
compared is then parallelism and not tuning.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from kernels.configs import LayerShape, nearest
from kernels.tables import FOLDER, chip_of, measured

#: Batches of which vLLM's files name tiles; it takes the nearest.
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_BLOCK = (128, 128)


def shape_of(model: Path) -> LayerShape:
    """Of a model's MoE layers."""
    config = json.loads((model / "config.json").read_text())
    experts = config.get("num_experts") or config.get("n_routed_experts") or config["num_local_experts"]
    width, hidden = config.get("moe_intermediate_size") or config["intermediate_size"], config["hidden_size"]
    quantised = config.get("quantization_config", {})
    if quantised and not quantised.get("weight_block_size"):
        raise ValueError(f"--tiles alike: DWDP has no tiles for experts that {quantised.get('quant_method')} quantises")
    dtype = "fp8_block" if quantised else "bf16"
    return LayerShape(experts, 2 * width, hidden, width, dtype, config["num_experts_per_tok"])


def write(model: Path, device: torch.device, devices: int, folder: Path) -> Path:
    """A folder for VLLM_TUNED_CONFIG_FOLDER, with files for a layer and for its parts on `devices` devices.

    Raises ValueError where DWDP has no table for the model's layers on this device.
    """
    shape, chip = shape_of(model), chip_of(device)
    entries = measured(FOLDER, chip).get(shape.key)
    if not entries:
        raise ValueError(f"--tiles alike: there is no table of {shape.key} for {chip.name}")
    found = {str(tokens): tiles.to_vllm() for tokens in _TOKENS if (tiles := nearest(entries, tokens))}
    for config in found.values():
        config.pop("SPLIT_K")
    folder.mkdir(parents=True)
    kind = f",dtype=fp8_w8a8,block_shape={list(_BLOCK)}".replace(" ", "") if shape.dtype == "fp8_block" else ""
    parts = {
        (shape.experts, shape.width),
        (shape.experts // devices, shape.width),
        (shape.experts, shape.width // devices),
    }
    for experts, width in parts:
        name = f"E={experts},N={width},device_name={chip.name}{kind}.json"
        (folder / name).write_text(json.dumps(found, indent=1))
    return folder
