"""Ray executor of one rank: vLLM's `RayExecutorV2` with one worker, also on a platform without Ray devices."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import ray
from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

from vllm_dwdp.engine.executor import TriesPort, enter_engine
from vllm_dwdp.engine.ray_cluster import OBJECT_STORE_BYTES
from vllm_dwdp.engine.ray_cpu_worker import RayCpuWorkerProc
from vllm_dwdp.errors import DwdpTimeout
from vllm_dwdp.group.launch import launch_of
from vllm_dwdp.patches.ray_worker import cpu_workers

#: What a CPU worker asks of Ray: enough to be placed, little enough that ranks may outnumber cores.
_CPU_SHARE = 0.001

_STOP_TIMEOUT_S = 2.0


class DwdpRayExecutor(TriesPort, RayExecutorV2):
    """One Ray actor per rank; several engines share the cluster that RAY_ADDRESS names."""

    supports_pp: bool = False

    def _init_executor(self) -> None:
        enter_engine(self.vllm_config)
        rank = self.parallel_config.data_parallel_index
        # vLLM builds actor names from this id: engines of one cluster must not share them.
        self.vllm_config.instance_id = f"{self.vllm_config.instance_id}_dwdp{rank}"
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS")
            options: dict[str, Any] = {} if address else {"object_store_memory": OBJECT_STORE_BYTES}
            ray.init(address=address, runtime_env=self.parallel_config.ray_runtime_env, **options)
        share = {"CPU": _CPU_SHARE} if current_platform.is_cpu() else {"GPU": self._gpu_share()}
        group = ray.util.placement_group([share], strategy="PACK")
        try:
            ray.get(group.ready(), timeout=self._timeout_s())
        except ray.exceptions.GetTimeoutError as error:
            ray.util.remove_placement_group(group)
            raise DwdpTimeout(
                f"Ray did not give rank {rank} {share} within {self._timeout_s():.0f} s; the cluster has "
                f"{ray.cluster_resources()}: free some, or start it with more"
            ) from error
        self.parallel_config.placement_group = group
        with cpu_workers(RayCpuWorkerProc) if current_platform.is_cpu() else contextlib.nullcontext():
            super()._init_executor()

    def _gpu_share(self) -> float:
        launch = launch_of(self.vllm_config)
        return envs.VLLM_RAY_PER_WORKER_GPUS / (launch.config.ranks_per_device if launch else 1)

    def _post_init_executor(self) -> None:
        super()._post_init_executor()
        # vLLM's error about a dead worker prints this number: let it be the rank of the launch.
        for handle in self.ray_worker_handles:
            handle.rank = self.parallel_config.data_parallel_index

    def _timeout_s(self) -> float:
        launch = launch_of(self.vllm_config)
        return launch.config.timeout_s if launch else 60.0

    def shutdown(self) -> None:
        """vLLM's shutdown, which kills the worker, after asking it to let go by itself."""
        if getattr(self, "rpc_broadcast_mq", None) is not None and not self.is_failed and not self.shutting_down:
            with contextlib.suppress(Exception):
                self.collective_rpc("shutdown", timeout=_STOP_TIMEOUT_S)
        super().shutdown()

    def _get_actor_resource_kwargs(self) -> dict[str, Any]:  # type: ignore[override]
        return {"num_gpus": 0 if current_platform.is_cpu() else self._gpu_share()}
