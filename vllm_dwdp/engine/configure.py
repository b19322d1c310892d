"""From engine arguments that say `dwdp` to a config for independent ranks that share their experts."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_dwdp import BACKEND
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import options
from vllm_dwdp.engine.cores import bind_ranks
from vllm_dwdp.engine.devices import set_devices
from vllm_dwdp.engine.forms import check_form
from vllm_dwdp.engine.kv_caches import check_kv_caches
from vllm_dwdp.engine.model_config import hide_moe
from vllm_dwdp.engine.orphans import value_of_parent, watch_forked
from vllm_dwdp.engine.planner import ask_planner
from vllm_dwdp.engine.popularity import check_popularity, popularity_of, with_hits_file
from vllm_dwdp.engine.rank_pages import watch_ranks
from vllm_dwdp.engine.side_channel import check_ports
from vllm_dwdp.errors import DwdpError, install
from vllm_dwdp.group.environment import set_for_children, sockets_in
from vllm_dwdp.group.launch import RENDEZVOUS_ENV, Apart, DwdpLaunch, attach_launch
from vllm_dwdp.group.launch_folder import make_folder
from vllm_dwdp.group.meeting import check_free, meeting_place
from vllm_dwdp.platform import Platform, platform_of

if TYPE_CHECKING:
    from vllm.config import CompilationConfig, ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.dwdp")

#: Time for a rank's earlier life to end, whose server may have been killed just now.
_ENDING_S = 5.0


def resolve_launcher(launcher: str, platform: Platform) -> str:
    """`uni`, `mp` or `ray`; auto is the platform's."""
    if launcher == "auto":
        return platform.launcher
    if launcher == "ray" and importlib.util.find_spec("ray") is None:
        raise DwdpError(f'launcher "ray" needs Ray: {install("ray")}, or leave launcher out')
    return launcher


def _executor(launcher: str) -> type:
    if launcher == "ray":
        from vllm_dwdp.engine.ray_executor import DwdpRayExecutor

        return DwdpRayExecutor
    from vllm_dwdp.engine.executor import DwdpExecutor, DwdpUniExecutor

    return DwdpUniExecutor if launcher == "uni" else DwdpExecutor


def _is_api_server_of_many(args: EngineArgs) -> bool:
    return args._api_process_count > 1 and args._api_process_rank >= 0


def _named_tokens(args: EngineArgs, compilation: CompilationConfig) -> int:
    """The largest size of CUDA graphs where the user named any, else 0; the config has vLLM's own filled in."""
    own = args.compilation_config
    named = (
        args.cudagraph_capture_sizes,
        args.max_cudagraph_capture_size,
        own.cudagraph_capture_sizes,
        own.max_cudagraph_capture_size,
    )
    return (compilation.max_cudagraph_capture_size or 0) if any(named) else 0


def _apart(config: DwdpConfig) -> Apart | None:
    if config.group is None:
        return None
    assert config.rank is not None
    return Apart(config.group, config.rank, meeting_place(config.group, config.meet))


def _launch(args: EngineArgs, config: DwdpConfig, owner: VllmConfig) -> DwdpLaunch:
    ranks, apart = config.ranks or args.data_parallel_size, _apart(config)
    if _is_api_server_of_many(args):
        # The launching process made the folder; API servers only read counters through it.
        if (folder := value_of_parent(RENDEZVOUS_ENV)) is None:
            raise DwdpError(
                f"this API server was not started by the front end of a dwdp launch ({RENDEZVOUS_ENV} is "
                f"{os.environ.get(RENDEZVOUS_ENV)!r}): start all servers with vllm serve --api-server-count"
            )
        return DwdpLaunch(config, ranks, folder, (), apart=apart)
    if apart is not None:
        check_free(apart.folder, apart.rank, min(_ENDING_S, config.timeout_s))
    launch = DwdpLaunch(config, ranks, make_folder(owner), tuple(sorted(os.sched_getaffinity(0))), apart=apart)
    set_for_children(owner, RENDEZVOUS_ENV, launch.folder)
    watch_forked()
    return launch


def _environment(vllm_config: VllmConfig, launch: DwdpLaunch, launcher: str, platform: Platform) -> dict[str, str]:
    """What the engines of a launch need in their environment; what the front end needs to start them is set here."""
    values = bind_ranks(launch.num_ranks, launch.ranks_here) if platform.on_cpu else {}
    if launcher == "ray":
        from vllm_dwdp.engine.ray_cluster import join_or_start

        values |= join_or_start(vllm_config)
    # After Ray was started, which outlives the launch where it is the program's.
    return values | sockets_in(launch.folder, vllm_config)


def create_engine_config(
    original: Callable[..., VllmConfig], args: EngineArgs, *positional: Any, **keywords: Any
) -> VllmConfig:
    """Build the config of a dwdp launch by delegating to `original` (vLLM's `EngineArgs.create_engine_config`).

    Raises:
        DwdpError: an option, the model or the machine does not go with dwdp; nothing was started.
    """
    headless = bool(keywords.get("headless", positional[1] if len(positional) > 1 else False))
    config = options.settings_of(args)
    options.check_arguments(args, headless, config.group)
    num_ranks = config.ranks or args.data_parallel_size
    platform = platform_of(current_platform)
    if not platform.on_cpu and not current_platform.is_cuda():
        raise DwdpError(
            f"dwdp runs on vLLM's CPU and CUDA platforms, not on {current_platform.device_name}: leave it out"
        )
    options.check_settings(config, platform)
    options.check_quantisation(args, platform)
    config = with_hits_file(config)
    # API servers place nothing, and the file may be another one by now.
    popularity = None if _is_api_server_of_many(args) else popularity_of(config, platform)
    group_size = config.resolve_group_size(num_ranks)
    launcher = resolve_launcher(config.launcher, platform)

    @functools.wraps(args.create_model_config)
    def create_model_config() -> ModelConfig:
        model_config = type(args).create_model_config(args)
        experts = options.check_model(model_config, platform)
        check_form(config, model_config, platform)
        if model_config.quantization not in (None, *platform.split, *platform.online):
            # There is nothing of ours to prefer: vLLM's own choice.
            args.moe_backend = moe_backend
        config.check(num_ranks, experts)
        if popularity is not None:
            check_popularity(popularity, config, num_ranks, experts, model_config)
        if config.group is None:
            hide_moe(model_config)
        return model_config

    # Only this object is changed, and only while vLLM builds the config from it.
    args.create_model_config = create_model_config  # type: ignore[method-assign]
    args.distributed_executor_backend = _executor(launcher)
    # Always present, so that compile caches never mix with those of plain vLLM; what is read is the launch's.
    additional_config, moe_backend = args.additional_config, args.moe_backend
    if not platform.on_cpu and moe_backend == "auto":
        # The kernels whose layout of weights is that of the split view.
        args.moe_backend = "triton"
    args.additional_config = {**(additional_config or {}), BACKEND: config.compiled_by()}
    try:
        vllm_config = original(args, *positional, **keywords)
    finally:
        del args.create_model_config
        args.distributed_executor_backend = BACKEND
        args.additional_config = additional_config
        args.moe_backend = moe_backend
    options.check_config(vllm_config)
    parallel = vllm_config.parallel_config
    worker, ours = platform.worker
    if parallel.worker_cls != worker:
        raise DwdpError(f"dwdp has no worker for {parallel.worker_cls}: it runs on vLLM's CPU and CUDA platforms")
    parallel.worker_cls = ours
    if not platform.on_cpu:
        set_devices(vllm_config, config, num_ranks)
        from vllm_dwdp.engine.graphs import fit_graphs

        fit_graphs(vllm_config.compilation_config, config)
    if not _is_api_server_of_many(args):
        if platform.on_cpu:
            check_kv_caches(vllm_config.cache_config, num_ranks, args.data_parallel_size)
        check_ports(vllm_config, range(args.data_parallel_size))
        ask_planner(vllm_config, config, group_size, platform)
    launch = dataclasses.replace(
        _launch(args, config, vllm_config),
        captured_tokens=_named_tokens(args, vllm_config.compilation_config),
        popularity=popularity,
    )
    if not _is_api_server_of_many(args):
        launch = dataclasses.replace(launch, environment=_environment(vllm_config, launch, launcher, platform))
    attach_launch(vllm_config, launch)
    publishing = not args.disable_log_stats and (args._api_process_count == 1 or args._api_process_rank == 0)
    if publishing or not _is_api_server_of_many(args):
        watch_ranks(vllm_config, launch, publishing, summarise=not _is_api_server_of_many(args))
    if not _is_api_server_of_many(args):
        said = f"{num_ranks} independent ranks in groups of {group_size}"
        if launch.apart is not None:
            apart = launch.apart
            extra = (
                f", an extra one with the share of rank {apart.rank % num_ranks}," if apart.rank >= num_ranks else ""
            )
            said = f"rank {apart.rank}{extra} of {num_ranks} of the group {apart.group}, which meets in {apart.folder}"
        logger.info(
            "dwdp: %s, workers in %s",
            *(said, {"mp": "processes of their own", "uni": "their engines", "ray": "Ray"}[launcher]),
        )
    return vllm_config
