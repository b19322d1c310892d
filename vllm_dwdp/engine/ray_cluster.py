"""The Ray cluster of a launch: joined where there is one, started with a small object store where there is none."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.group.environment import is_users, set_for_start

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: vLLM talks to its workers through its own queues; Ray only starts and watches them.
OBJECT_STORE_BYTES = 80 * 1024 * 1024

START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
USAGE_STATS = "RAY_USAGE_STATS_ENABLED"


def _init(ray: Any, **options: Any) -> None:
    from vllm.utils.system_utils import set_env_var

    with set_env_var(USAGE_STATS, os.environ.get(USAGE_STATS, "0")):
        ray.init(log_to_driver=True, logging_level=logging.WARNING, **options)


def join_or_start(vllm_config: VllmConfig) -> dict[str, str]:
    """Have every engine of this launch share one cluster; returns what engines need for it.

    Joins what RAY_ADDRESS, an initialised Ray or a cluster on this machine gives; otherwise starts one that ends with
    this process. Raises DwdpError where the user asks for forked engines.
    """
    import ray

    spawn_engines(vllm_config)
    if not ray.is_initialized():
        runtime_env = vllm_config.parallel_config.ray_runtime_env
        try:
            _init(ray, address="auto", runtime_env=runtime_env)
        except ConnectionError:
            _init(
                ray,
                address="local",
                runtime_env=runtime_env,
                include_dashboard=False,
                # Ray starts an idle Python process for each of these at once, by default for every core.
                num_cpus=vllm_config.parallel_config.data_parallel_size,
                object_store_memory=OBJECT_STORE_BYTES,
            )
    return {} if is_users("RAY_ADDRESS") else {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def spawn_engines(vllm_config: object) -> None:
    """Have vLLM spawn the engines of this launch; raises DwdpError where the user asks for another method."""
    # A forked child has this process's Ray client without its threads: its first call to the cluster never returns.
    # vLLM spawns on CPU, and forks on CUDA unless told otherwise.
    if is_users(START_METHOD, default="spawn"):
        raise DwdpError(
            f"{START_METHOD}={os.environ[START_METHOD]} does not work with Ray: set it to spawn, or leave dwdp.launcher out"
        )
    if START_METHOD not in os.environ:
        set_for_start(vllm_config, START_METHOD, "spawn")
