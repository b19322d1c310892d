"""Options of vLLM that do not go with DWDP: refused with one line each, before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from vllm_dwdp import BACKEND
from vllm_dwdp.compat.versions import NOT_ON_GPUS, TESTED, vllm_version
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpError, install
from vllm_dwdp.platform import Platform

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

logger = logging.getLogger("vllm.dwdp")

#: Load formats read through vLLM's default loader, which can be asked for single experts, and random weights. With `auto`
#: and `hf` it also takes files of torch.save where a checkpoint has nothing else, and every rank reads them whole.
LOAD_FORMATS = ("auto", "hf", "safetensors", "dummy")

#: All settings, and those of them whose names no other plugin will have.
_ALL_SETTINGS: Final = frozenset(field.name for field in dataclasses.fields(DwdpConfig))
_SETTINGS: Final = _ALL_SETTINGS & {
    "group_size", "experts_per_rank", "weight_view", "num_slots", "slice_bytes", "direct_tokens", "travel_tokens",
    "ranks_per_device", "require_win",
}  # fmt: skip


def _parallel(args: EngineArgs, group: str | None) -> Iterator[str]:
    for name, flag in (
        ("tensor_parallel_size", "--tensor-parallel-size"),
        ("pipeline_parallel_size", "--pipeline-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
    ):
        size = getattr(args, name, 1) or 1
        if size > 1:
            yield f"{flag} {size} does not go with dwdp, each rank is one worker: use 1 and more --data-parallel-size"
    ranks = args.data_parallel_size
    if not isinstance(ranks, int):
        yield f"data_parallel_size is {ranks!r} of type {type(ranks).__name__}: give a whole number >= 2"
    elif group is not None and ranks > 1:
        yield (
            f"--data-parallel-size is {ranks} with dwdp.group {group!r}, of which each server is one rank: leave it out, "
            "and start a server for each rank"
        )
    elif group is None and ranks < 2:
        yield (
            f"dwdp spreads the experts over data-parallel ranks, at least 2, but --data-parallel-size is {ranks}: "
            "raise it, or leave --distributed-executor-backend out; for a server for each rank see dwdp.group"
        )
    for name, flag in (
        ("enable_expert_parallel", "--enable-expert-parallel"),
        ("enable_eplb", "--enable-eplb"),
        ("enable_elastic_ep", "--enable-elastic-ep"),
        ("enable_dbo", "--enable-dbo"),
    ):
        if getattr(args, name, False):
            yield f"{flag} needs ranks that run in lockstep; with dwdp they are independent: leave it out"
    # Of vLLM 0.33: other experts than the router chose, by what a rank holds.
    if getattr(args, "expert_substitution", None):
        yield "expert_substitution changes which experts compute a token; dwdp computes what plain vLLM would: leave it out"
    if (ubatches := getattr(args, "ubatch_size", 0) or 0) > 1:
        yield f"--ubatch-size {ubatches} interleaves parts of a batch, which dwdp's ring cannot follow: leave it out"


def _launch(args: EngineArgs, headless: bool, group: str | None) -> Iterator[str]:
    one_node = "this release of dwdp runs all ranks on one machine behind vLLM's internal load balancing"
    if headless and group is not None:
        yield f"--headless does not go with dwdp.group {group!r}, whose ranks are servers of their own: leave it out"
    if headless:
        yield f"--headless: {one_node}; start one `vllm serve` with --data-parallel-size {args.data_parallel_size}"
    if args.data_parallel_hybrid_lb or args.data_parallel_start_rank is not None:
        yield f"hybrid load balancing (--data-parallel-hybrid-lb, --data-parallel-start-rank): {one_node}; leave it out"
    external = args.data_parallel_external_lb or args.data_parallel_multi_port_external_lb
    if external or args.data_parallel_rank is not None:
        yield (
            "external or multi-port load balancing (--data-parallel-external-lb, --data-parallel-rank, "
            f"--data-parallel-multi-port-external-lb): {one_node}; leave it out"
        )
    local = args.data_parallel_size_local
    if local is not None and local != args.data_parallel_size:
        yield (
            f"--data-parallel-size-local {local} of {args.data_parallel_size} ranks: {one_node}; "
            f"leave it out or set it to {args.data_parallel_size}"
        )
    if args.enable_fault_tolerance:
        # vLLM would ask for external load balancing, which is refused next.
        yield f"--enable-fault-tolerance needs external load balancing, but {one_node}; leave it out"
    if args.nnodes > 1:
        yield f"--nnodes {args.nnodes}: {one_node}; use --nnodes 1"
    if args.data_parallel_backend != "mp":
        yield (
            f"--data-parallel-backend {args.data_parallel_backend}: {one_node}; for workers launched by Ray use "
            '--additional-config \'{"dwdp": {"launcher": "ray"}}\''
        )
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "0":
        yield "VLLM_ENABLE_V1_MULTIPROCESSING=0 runs the engine in this process; dwdp needs one per rank: unset it"


def _features(args: EngineArgs) -> Iterator[str]:
    engram = args.engram_config
    for given, flag, why in (
        (args.enable_sleep_mode, "--enable-sleep-mode", "peers read a rank's experts while it sleeps"),
        (args.enable_lora, "--enable-lora", "adapters on experts are not supported"),
        (
            # The flag lands here too.
            args.aux_output_config.enable_return_routed_experts,
            "--enable-return-routed-experts",
            "its buffers are sized for one replica",
        ),
        (args.weight_transfer_config, "--weight-transfer-config", "experts cannot be replaced while peers read them"),
        (args.mm_encoder_only, "--mm-encoder-only", "there are no experts to share without the language model"),
        (
            engram is not None and (engram.embedding_across_dp or engram.dp_shared_memory),
            "--engram-config with embedding_across_dp or dp_shared_memory",
            "embeddings shared over data-parallel ranks need ranks that wait for each other",
        ),
    ):
        if given:
            yield f"{flag} does not go with dwdp ({why}): leave it out"
    if args.cpu_offload_gb or args.offload_group_size:
        yield "weight offloading (--cpu-offload-gb, --offload-group-size) moves weights that peers read: leave it out"
    if args.worker_cls != "auto":
        # `LLM` pickles a class into bytes.
        name = args.worker_cls if isinstance(args.worker_cls, str) else "(a class)"
        yield f"--worker-cls {name}: dwdp brings its own worker class; use --worker-extension-cls instead"


def _loading(args: EngineArgs) -> Iterator[str]:
    if str(args.load_format) not in LOAD_FORMATS:
        yield (
            f"--load-format {args.load_format} cannot read single experts; dwdp takes {', '.join(LOAD_FORMATS)}: "
            "use one of them, with a checkpoint in safetensors"
        )
    whole = "reads the whole checkpoint on every rank instead of its share: leave it out"
    if args.safetensors_load_strategy == "eager":
        yield f"--safetensors-load-strategy eager {whole}"
    if args.model_loader_extra_config and args.model_loader_extra_config.get("enable_multithread_load"):
        yield f"--model-loader-extra-config with enable_multithread_load {whole}"


def _quantisation(name: str) -> str:
    return (
        f"quantisation {name!r} is not supported by this release of dwdp: use a BF16, FP16 or FP32 checkpoint, or on GPUs "
        "one in FP8, MXFP4 or NVFP4, of GPTQ, AWQ or compressed-tensors, without --quantization, or --quantization "
        "fp8_per_tensor, fp8_per_block, fp8_per_channel or int8_per_channel_weight_only"
    )


def check_quantisation(args: EngineArgs, platform: Platform) -> None:
    """Refuse to quantise while loading in ways that nobody has looked at; raises DwdpError."""
    name = args.quantization
    if name not in (None, *platform.quantisations, *platform.online):
        raise DwdpError(_quantisation(str(name)))
    # For a name of its own vLLM has filled it in.
    if args.quantization_config is not None and name not in platform.online:
        raise DwdpError(
            "--quantization-config quantises while loading, which dwdp supports on GPUs and with --quantization online "
            "or the name of a scheme, such as fp8_per_block, alone: leave it out"
        )


def settings_of(args: EngineArgs) -> DwdpConfig:
    """The settings of dwdp; raises DwdpError where they cannot be read, or stand in the wrong place."""
    if args.additional_config is not None and not isinstance(args.additional_config, dict):
        raise DwdpError(
            f"--additional-config is a {type(args.additional_config).__name__}; dwdp needs a JSON object, such as "
            '{"dwdp": {"num_slots": 2}}'
        )
    for key in set(args.additional_config or {}) - {BACKEND}:
        # Other plugins may have keys of their own.
        if str(key) in _SETTINGS or difflib.get_close_matches(str(key).lower(), [BACKEND], n=1, cutoff=0.75):
            meant = f'{{"{BACKEND}": {{"{key}": ...}}}}' if str(key) in _SETTINGS else f'"{BACKEND}"'
            raise DwdpError(f"--additional-config has the key {key!r}, which nothing reads: did you mean {meant}?")
        if str(key) in _ALL_SETTINGS:
            logger.warning('dwdp: --additional-config has %r beside "dwdp": a setting of dwdp has to be inside', key)
    return DwdpConfig.parse((args.additional_config or {}).get(BACKEND))


def check_arguments(args: EngineArgs, headless: bool, group: str | None = None) -> None:
    """Refuse conflicting options with the first message that applies; raises DwdpError. `group`: as in the settings."""
    for checks in (_parallel(args, group), _launch(args, headless, group), _features(args), _loading(args)):
        for message in checks:
            raise DwdpError(message)


def check_settings(config: DwdpConfig, platform: Platform) -> None:
    """Refuse settings of dwdp that this release, or this platform, does not have; raises DwdpError."""
    for key, known in (("transport", platform.transports), ("weight_view", platform.views)):
        if (told := getattr(config, key)) not in ("auto", *known):
            others, use = "GPUs" if platform.on_cpu else "CPU", ", ".join(("auto", *known[:-1])) + f" or {known[-1]}"
            raise DwdpError(f'dwdp.{key} is "{told}", which is for {others}: use {use} on {platform.name}')
    for message in _on_cpu(config) if platform.on_cpu else _on_gpu(config):
        raise DwdpError(message)


def _on_cpu(config: DwdpConfig) -> Iterator[str]:
    if config.ranks_per_device > 1:
        yield f"dwdp.ranks_per_device is {config.ranks_per_device}, which is for GPUs: leave it out on CPU"
    if config.direct_tokens not in ("auto", 0):
        yield (
            f"dwdp.direct_tokens is {config.direct_tokens}, which is for GPUs: on CPU weight_view inplace reads every "
            "expert where it is; leave it out"
        )
    if config.decode == "travel":
        yield 'dwdp.decode is "travel", which is for GPUs: on CPU every expert is read where it is; leave it out'


def _on_gpu(config: DwdpConfig) -> Iterator[str]:
    if (version := vllm_version()) in NOT_ON_GPUS:
        yield f"dwdp was tried with vLLM {version} on CPU only: use vLLM {TESTED[-1]} on GPUs"
    if (plan := os.environ.get("VLLM_ENABLE_STARTUP_PLAN", "0")) != "0":
        # Its key has neither the rank nor how many experts that holds, and what it keeps is applied unseen.
        yield (
            f"VLLM_ENABLE_STARTUP_PLAN={plan} has vLLM keep one size of the KV cache for all ranks and starts, whatever "
            "each holds beside it: unset it; --kv-cache-memory-bytes gives a size instead"
        )
    if config.group is not None:
        if config.transport not in ("auto", "vmm"):
            yield (
                f'dwdp.transport is "{config.transport}" with dwdp.group, whose ranks hand memory of dead ones on, which '
                'only "vmm" can: leave transport out'
            )
        if config.weight_view == "composite":
            yield (
                'dwdp.weight_view is "composite" with dwdp.group, which has the views split and contiguous: leave one of '
                "them out"
            )
        if config.decode == "travel":
            yield (
                'dwdp.decode is "travel" with dwdp.group, of which a dead rank would not answer: leave decode out, and '
                "experts are read directly"
            )
    if config.direct_tokens not in ("auto", 0) and config.weight_view == "contiguous":
        yield (
            f'dwdp.direct_tokens is {config.direct_tokens} with weight_view "contiguous", which pulls in every forward: use '
            "weight_view split or auto, or leave direct_tokens out"
        )
    if config.weight_view == "composite" and config.transport not in ("auto", "vmm"):
        yield (
            f'dwdp.weight_view is "composite" with transport "{config.transport}", but only "vmm" maps peers\' pages next '
            "to own ones: leave transport out"
        )
    if config.direct_tokens not in ("auto", 0) and config.transport == "cuda_pinned":
        yield (
            f'dwdp.direct_tokens is {config.direct_tokens} with transport "cuda_pinned", over which every forward pulls: '
            "leave one of them out"
        )
    if config.decode == "travel":
        for key, told in (("weight_view", "contiguous"), ("transport", "cuda_pinned"), ("direct_tokens", 0)):
            if getattr(config, key) == told:
                said = json.dumps(told)
                yield f'dwdp.decode is "travel" with {key} {said}, where every forward pulls: leave one of them out'
        if config.weight_view == "composite":
            yield (
                'dwdp.decode is "travel" with weight_view "composite", but owners compute with tables of the split view: '
                "leave one of them out"
            )
        if config.ranks_per_device > 1:
            yield (
                f'dwdp.decode is "travel" with ranks_per_device {config.ranks_per_device}, where ranks that share a GPU '
                "would serve each other in turns: leave one of them out"
            )
    if importlib.util.find_spec("cupy") is None:
        yield f"dwdp needs CuPy on GPUs: {install('cuda13')} (or cuda12, as your vLLM is built)"


def check_model(model_config: ModelConfig, platform: Platform) -> int:
    """Refuse models without routed experts, or with experts dwdp cannot share; returns the number of experts."""
    name = model_config.model
    experts = int(model_config.get_num_experts())
    if experts == 0:
        raise DwdpError(
            f"{name} has no routed experts, {BACKEND} would share nothing: serve it with --data-parallel-size alone"
        )
    if model_config.quantization not in (None, *platform.quantisations, *platform.online):
        raise DwdpError(f"{name}: {_quantisation(str(model_config.quantization))}")
    return experts


def check_config(config: VllmConfig) -> None:
    """Refuse what only shows in the finished config; raises DwdpError."""
    speculative = config.speculative_config
    draft: Any = getattr(speculative, "draft_model_config", None)
    if draft is not None and draft is not config.model_config and int(draft.get_num_experts()) > 0:
        raise DwdpError(
            f"the speculative model {draft.model} has {draft.get_num_experts()} routed experts of its own, which dwdp "
            "does not share: use a dense drafter or ngram"
        )
