"""Reads the replicated weights and this rank's share of the experts, and nothing else, from a checkpoint in safetensors.

vLLM's own filter skips experts that are stored one by one; it knows experts only, so that where layers have other shares
than each other ours asks for the layer too. Fused tensors [E, ...] are read by rows of the share through
safetensors' `get_slice` and shown to the model's loader in the shape that it expects: as [E, ...] whose other rows are
memory that is never touched, or expert by expert where the loader would copy all rows at once.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from tqdm.auto import tqdm
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader import (
    DefaultModelLoader,
    DummyModelLoader,
    get_model_architecture,
    register_model_loader,
)
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.weight_utils import enable_tqdm

from vllm_dwdp.compat.versions import used_files
from vllm_dwdp.engine.dummy import draw_firsts, draw_packed
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.group.apart import left_in_memory
from vllm_dwdp.group.launch import launch_of
from vllm_dwdp.layers.block_scales import scaled_layers, share_block_scales
from vllm_dwdp.layers.build import ModelBuild, numbers_in
from vllm_dwdp.layers.coverage import EXPERT_BY_EXPERT, check_coverage, check_memory
from vllm_dwdp.layers.largest import refuse_apart
from vllm_dwdp.layers.online import before_quantised, online_layers, watch_online
from vllm_dwdp.layers.read_stats import READ
from vllm_dwdp.layers.routed_experts import cover_subclasses
from vllm_dwdp.layers.written import check_written, mark_rows

logger = init_logger("vllm.dwdp")

#: The load format that workers are switched to.
LOAD_FORMAT = "dwdp"

_FUSED = re.compile(r"\.experts\.(?!\d)")

#: Under `.experts.` too, but read by every rank's router for all experts.
_ROUTING = frozenset({"e_score_correction_bias", "expert_bias", "bias"})


class _ShareOnlyMixin:
    """Model construction with our MoE layers, for any of vLLM's loaders. _reads: whether weights come from a checkpoint."""

    _reads = True

    def create_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        # Resolving the class imports its module, and with it the RoutedExperts subclasses that it defines.
        get_model_architecture(model_config)
        cover_subclasses()
        model: nn.Module = super().create_model(vllm_config, model_config, prefix)  # type: ignore[misc]
        build = ModelBuild.current()
        check_coverage(model, build)
        if build.platform.on_cpu and not build.memory_checked:
            check_memory(build)
            build.memory_checked = True
            # A rank that loads at once would take away what a slower one is about to ask for.
            build.meet("memory")
        return model

    def get_external_weight_memory(self, vllm_config: VllmConfig) -> int:
        """See BaseModelLoader: bytes of the device that this rank's last life left to it, part of its budget. Loading takes
        little beside them: an expert of each layer."""
        launch = launch_of(vllm_config)
        if launch is None or launch.apart is None:
            return 0
        return left_in_memory(launch.apart, range(launch.num_ranks))

    def _compare(self, files: list[str]) -> None:
        """With what other servers of the group read."""
        build = ModelBuild.current()
        if build.apart is not None and not build.apart.files_checked:
            build.apart.same_files(files)
            build.apart.files_checked = True

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        build = ModelBuild.current()
        holds_experts = _holds_experts(model, build)
        if holds_experts and build.shared:
            # Parameters are views of slots and of peers' pages by now: not even marks may be written.
            raise DwdpError("the loader would replace weights that peers read: restart with the new checkpoint")
        refuse_apart(build)
        marks = mark_rows(build) if holds_experts and self._reads else []
        if holds_experts and self._reads:
            watch_online(build)
        scaled = scaled_layers(build) if holds_experts else []
        super().load_weights(model, model_config)  # type: ignore[misc]
        check_written(marks, build)
        share_block_scales(build, scaled)


class ShareOnlyLoader(_ShareOnlyMixin, DefaultModelLoader):
    """vLLM's default loader for this rank's share; `READ` counts what was asked of the files."""

    #: See ModelBuild.experts_by_layer: what was built, and as much of it as the names in the files tell.
    _built_by_layer: Mapping[tuple[int, ...], set[int]] = MappingProxyType({})
    _by_layer: Mapping[tuple[int, ...], set[int]] = MappingProxyType({})

    def _init_ep_weight_filter(self, model_config: ModelConfig) -> None:
        build = ModelBuild.current()
        self.local_expert_ids = build.local_experts()
        self._built_by_layer = build.experts_by_layer()

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        experts = {cls.__name__ for layer in ModelBuild.current().layers for cls in type(layer.module).__mro__}
        self._expert_by_expert = bool(experts & EXPERT_BY_EXPERT)
        super().load_weights(model, model_config)

    def _get_weights_iterator(
        self, source: DefaultModelLoader.Source
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        _, files, use_safetensors, _ = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        build = ModelBuild.current()
        self._compare(files)
        experts = {layer.placement.num_experts for layer in build.layers}
        self._by_layer = self._built_by_layer if use_safetensors and _layers_in(files, self._built_by_layer) else {}
        if use_safetensors and (self._by_layer or any(_fused_names(path, experts) for path in files)):
            files = used_files(files, source)
            self.counter_before_loading_weights = time.perf_counter()
            for name, tensor in self._share_of(files, experts):
                yield source.prefix + name, tensor
            return
        if not use_safetensors:
            _warn_of_pickles(files)
        for name, tensor in super()._get_weights_iterator(source):
            READ.add(tensor, ".experts." in name)
            if self._expert_by_expert and not use_safetensors and _is_fused(name, tensor.shape, experts):
                for expert in sorted(self._share(name)):
                    yield name.replace(".experts.", f".experts.{expert}."), tensor[expert]
            else:
                yield name, tensor

    def _share(self, name: str) -> set[int]:
        """Experts to read of the layer that a tensor belongs to; those of any layer where its name does not tell."""
        return self._by_layer.get(numbers_in(name), self.local_expert_ids or set())

    def _share_of(self, files: list[str], experts: set[int]) -> Generator[tuple[str, torch.Tensor], None, None]:
        """All tensors of `files`, fused experts by rows of the share; in the order of the files."""
        show = enable_tqdm(self.load_config.use_tqdm_on_load)
        for path in tqdm(sorted(files), desc="Loading this rank's share of the checkpoint", disable=not show):
            fused = _fused_names(path, experts)
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in fused:
                        yield from self._fused(file.get_slice(name), name)
                    elif not should_skip_weight(name, self._share(name)):
                        tensor = file.get_tensor(name)
                        READ.add(tensor, ".experts." in name)
                        yield name, tensor

    def _fused(self, rows: Any, name: str) -> Generator[tuple[str, torch.Tensor], None, None]:
        share = sorted(expert for expert in self._share(name) if expert < rows.get_shape()[0])
        if self._expert_by_expert:
            for expert in share:
                part = rows[expert : expert + 1]
                READ.add(part, expert=True)
                yield name.replace(".experts.", f".experts.{expert}."), part.squeeze(0)
            return
        runs = _runs(share)
        parts = [rows[first:last] for first, last in runs]
        for part in parts:
            READ.add(part, expert=True)
        # Rows of other experts are address space only: the layer skips them by its expert map.
        whole = torch.empty(rows.get_shape(), dtype=parts[0].dtype)
        for (first, last), part in zip(runs, parts, strict=True):
            whole[first:last] = part
        yield name, whole


def _runs(experts: list[int]) -> list[tuple[int, int]]:
    """Ascending ids as half-open runs of consecutive ones."""
    runs: list[tuple[int, int]] = []
    for expert in experts:
        if runs and runs[-1][1] == expert:
            runs[-1] = (runs[-1][0], expert + 1)
        else:
            runs.append((expert, expert + 1))
    return runs


def _fused_names(path: str, experts: set[int]) -> set[str]:
    """Names in a file that hold a row per expert of a layer; `experts` are the numbers of experts that layers have."""
    with safe_open(path, framework="pt") as file:
        return {
            name
            for name in file.keys()  # noqa: SIM118
            if _is_fused(name, file.get_slice(name).get_shape(), experts)
        }


def _layers_in(files: list[str], layers: Collection[tuple[int, ...]]) -> bool:
    """Whether `files` have experts for each of `layers` by its numbers; else the checkpoint may number layers otherwise."""
    if not layers:
        return False
    found: set[tuple[int, ...]] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            found.update(numbers_in(name) for name in file.keys() if ".experts." in name)  # noqa: SIM118
    return found.issuperset(layers)


def _is_fused(name: str, shape: Sequence[int], experts: set[int]) -> bool:
    """Whether a tensor of this name and shape holds a row per expert of a layer."""
    routing = name.rsplit(".", 1)[-1] in _ROUTING
    return bool(_FUSED.search(name)) and not routing and len(shape) >= 2 and shape[0] in experts


def _warn_of_pickles(files: list[str]) -> None:
    """Files of torch.save give no single rows; said once for a group."""
    if ModelBuild.current().rank == 0:
        logger.warning(
            "dwdp: every rank reads the whole checkpoint (%s), since only safetensors can be read in part: convert it, "
            "or expect a start as slow as plain vLLM's on every rank at once",
            os.path.basename(files[0]) + (f" and {len(files) - 1} more files" if len(files) > 1 else ""),
        )


class ShareOnlyDummyLoader(_ShareOnlyMixin, DummyModelLoader):
    """Random weights for this rank's share, for benchmarks (`--load-format dummy`)."""

    _reads = False

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        self._compare([])
        build = ModelBuild.current()
        online = online_layers(build)
        if build.apart is not None:
            for layer in online:
                before_quantised(layer, partial(draw_firsts, [layer]))
        super().load_weights(model, model_config)
        if _holds_experts(model, build):
            others = [layer for layer in build.layers if layer not in online]
            draw_packed(others)
            if build.apart is not None:
                draw_firsts(others)


def _holds_experts(model: nn.Module, build: ModelBuild) -> bool:
    """Whether these are the layers of `build`. A dense drafter comes behind its target, whose rows are written and processed
    by then."""
    return any(module is build.layers[0].module for module in model.modules())


def switch_loader(vllm_config: VllmConfig) -> None:
    """Make this worker load through the classes above; the user's load format stays behind them."""
    load_config = vllm_config.load_config
    base = ShareOnlyDummyLoader if load_config.load_format == "dummy" else ShareOnlyLoader
    wrapped = load_config.load_format

    class Loader(base):  # type: ignore[misc, valid-type]
        def __init__(self, config: LoadConfig) -> None:
            super().__init__(replace(config, load_format=wrapped))

    register_model_loader(LOAD_FORMAT)(Loader)
    load_config.load_format = LOAD_FORMAT
