"""Loads the share of one rank from safetensors and from a file of torch.save, and prints what differs.

A process of its own, since vLLM's models need its process groups.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_dwdp.checkpoints import CheckpointSpec, write_checkpoint
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine.loader import ShareOnlyLoader
from vllm_dwdp.layers.build import ModelBuild

_UNTOUCHED = -77


def load(path: Path, store: Path) -> dict[str, torch.Tensor]:
    """The parameters of rank 1 of 2, by name."""
    config = EngineArgs(model=str(path), enforce_eager=True, max_model_len=128).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        ModelBuild(DwdpConfig(), 1, 2, on_cpu=True).open()
        loader = ShareOnlyLoader(config.load_config)
        model = loader.create_model(config, config.model_config)
        for parameter in model.parameters():
            parameter.data.fill_(_UNTOUCHED)
        loader._init_ep_weight_filter(config.model_config)
        loader.load_weights(model, config.model_config)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def main(folder: Path) -> None:
    for family, fused in (("gpt_oss", False), ("qwen3_moe", False), ("qwen3_moe", True)):
        made = write_checkpoint(CheckpointSpec(family=family, num_layers=2, fused=fused), folder / f"{family}-{fused}")
        copy = folder / f"{family}-{fused}-bin"
        shutil.copytree(made, copy, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(load_file(made / "model.safetensors"), copy / "pytorch_model.bin")
        one, other = (load(path, folder / "store") for path in (made, copy))
        wrong = [name for name in one if not torch.equal(one[name], other[name])]
        wrong += [name for name in other if bool((other[name] == _UNTOUCHED).any())]
        print("LOADED", family, fused, len(other), wrong, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
