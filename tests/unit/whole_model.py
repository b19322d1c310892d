"""Whole models loaded in this process, without an engine: vLLM's own construction, loading and processing."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.unit.helpers import LIMIT_S
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine.loader import switch_loader
from vllm_dwdp.hits_file import Hits
from vllm_dwdp.layers.build import BuildApart, ModelBuild
from vllm_dwdp.platform import CPU, Platform


class Loaded(NamedTuple):
    """A model as one rank has it before its experts are shared, or a plain one."""

    model: nn.Module
    build: ModelBuild
    vllm_config: Any


@contextlib.contextmanager
def vllm_groups() -> Iterator[None]:
    """vLLM's process groups, of this process alone."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with (
        tempfile.TemporaryDirectory() as folder,
        _registries_kept(),
        set_current_vllm_config(VllmConfig()),
        # As vLLM's CPU worker does.
        mock.patch("torch.accelerator.empty_cache", lambda: None),
    ):
        init_distributed_environment(1, 0, f"file://{folder}/meet", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        cleanup_dist_env_and_memory()


@contextlib.contextmanager
def _registries_kept() -> Iterator[None]:
    """vLLM's replaced layer classes go after each load, so that a plain model is one."""
    from vllm.model_executor import custom_op

    before = dict(custom_op.op_registry_oot)
    try:
        yield
    finally:
        custom_op.op_registry_oot.clear()
        custom_op.op_registry_oot.update(before)


def vllm_config(folder: Path, **arguments: Any) -> Any:
    """vLLM's config of one plain rank."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"enforce_eager": True, "max_model_len": 64, "use_tqdm_on_load": False, **arguments}
    return EngineArgs(model=str(folder), **arguments).create_engine_config()


def load(
    folder: Path,
    rank: int,
    ranks: int,
    settings: dict[str, Any] | None = None,
    popularity: Hits | None = None,
    apart: BuildApart | None = None,
    platform: Platform = CPU,
    gather: Callable[[str, Any], list[Any]] = lambda name, value: [value],
    **arguments: Any,
) -> Loaded:
    """The model of `folder` with the share of `rank`; with `ranks` 1 all of it, from plain vLLM."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    config = vllm_config(folder, **arguments)
    made = DwdpConfig.parse({"timeout_s": LIMIT_S, **(settings or {})})
    build = ModelBuild(made, rank, ranks, platform=platform, gather=gather, popularity=popularity, apart=apart)
    with _registries_kept(), set_current_vllm_config(config):
        if ranks > 1:
            build.open()
            switch_loader(config)
        loader = get_model_loader(config.load_config)
        model = loader.load_model(vllm_config=config, model_config=config.model_config)
    return Loaded(model, build, config)


def expert_layers(model: nn.Module) -> dict[str, Any]:
    """vLLM's RoutedExperts by name."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedExperts)}


def edited(folder: Path, copy: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A checkpoint like that of `folder` with the tensors that `edit` makes of its own."""
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in edit(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, bytes of a row]."""
    return tensor.data.contiguous().view(tensor.shape[0], -1).view(torch.uint8)
