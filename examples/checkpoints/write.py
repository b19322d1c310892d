"""Write a checkpoint folder, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dwdp.errors import DwdpError

from .families import make_config
from .fp8 import FP8_CONFIG, as_fp8
from .quantised import quantise_experts
from .spec import CheckpointSpec
from .tokenizer import make_tokenizer, special_ids, unreadable_ids
from .weights import as_on_disk, mute, random_weights

if TYPE_CHECKING:
    import torch

SPEC_FILE = "spec.json"


def write_checkpoint(spec: CheckpointSpec, path: str | os.PathLike[str]) -> Path:
    """Make the checkpoint of `spec` at `path`, unless it is there. Safe to call from several processes at once."""
    path = Path(path)
    if _is_written(spec, path):
        return path
    if path.exists() and not (path / SPEC_FILE).exists() and (not path.is_dir() or any(path.iterdir())):
        raise DwdpError(f"{path} holds something else than a made checkpoint: choose another folder, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        made = scratch / "made"
        made.mkdir()
        _fill(spec, made)
        _put_in_place(spec, made, path, scratch / "old")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def _is_written(spec: CheckpointSpec, path: Path) -> bool:
    try:
        return bool(json.loads((path / SPEC_FILE).read_text()) == spec.as_json())
    except (OSError, ValueError):
        return False


def _put_in_place(spec: CheckpointSpec, made: Path, path: Path, old: Path) -> None:
    try:
        if path.exists():
            path.rename(old)
        made.rename(path)
    except OSError:
        # Another process was faster: fine if it wrote the same.
        if not _is_written(spec, path):
            raise


def _fill(spec: CheckpointSpec, folder: Path) -> None:
    tokenizer = make_tokenizer()
    ids = special_ids(tokenizer)
    config = make_config(spec, ids)
    architecture, weights = random_weights(config, spec)
    mute(weights, unreadable_ids(tokenizer))
    config.architectures = [architecture]

    config.save_pretrained(folder)
    _name_as_on_hub(folder / "config.json", spec)
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    on_disk = as_on_disk(weights, spec)
    if spec.fp8:
        on_disk = as_fp8(on_disk)
        _edit_config(folder / "config.json", quantization_config=FP8_CONFIG)
    if spec.experts:
        on_disk, quantisation = quantise_experts(on_disk, spec.experts)
        _edit_config(folder / "config.json", quantization_config=quantisation)
    _save_weights(on_disk, folder, spec.shard_mib)
    # Last: a folder with this file is complete.
    (folder / SPEC_FILE).write_text(json.dumps(spec.as_json(), indent=2) + "\n")


def _name_as_on_hub(file: Path, spec: CheckpointSpec) -> None:
    """transformers renames Qwen3-MoE's expert count when it saves; real checkpoints have the old name."""
    if spec.family == "qwen3_moe":
        number = json.loads(file.read_text()).get("num_local_experts", spec.num_experts)
        _edit_config(file, num_local_experts=None, num_experts=number)


def _edit_config(file: Path, **changes: object) -> None:
    """Set keys, or remove those that are None."""
    values = {**json.loads(file.read_text()), **changes}
    values = {key: value for key, value in values.items() if key not in changes or value is not None}
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _save_weights(weights: dict[str, torch.Tensor], folder: Path, shard_mib: float | None) -> None:
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    size = int(shard_mib * 2**20) if shard_mib else 5 * 10**9
    # Parts of one tensor share storage and would be counted as one: save copies.
    weights = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    split = split_torch_state_dict_into_shards(weights, max_shard_size=size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
