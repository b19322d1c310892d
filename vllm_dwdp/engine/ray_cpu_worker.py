"""vLLM's Ray worker on a platform without Ray devices, bound to its rank's cores."""

from __future__ import annotations

import os

import ray
from vllm.v1.executor.ray_executor_v2 import RayWorkerProc


class RayCpuWorkerProc(RayWorkerProc):
    """`RayWorkerProc` without a device to look up."""

    def worker_busy_loop(self) -> None:
        """vLLM's loop, after unlinking the segment of the response queue: the engine has mapped it by now, and Ray kills
        workers without a chance to unlink."""
        assert self.worker_response_mq is not None
        buffer = self.worker_response_mq.buffer
        if buffer.is_creator:
            buffer.shared_memory.unlink()
            buffer.is_creator = False
        super().worker_busy_loop()

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """(node id, no devices)."""
        return ray.get_runtime_context().get_node_id(), []

    def initialize_worker(
        self,
        local_rank: int,
        env_vars: dict[str, str],
        distributed_init_method: str,
        driver_env_vars: dict[str, str] | None = None,
        assigned_physical_gpu_ids: list[int] | None = None,
    ) -> None:
        """As vLLM's, after binding this process to the cores of its rank (vLLM binds process-launched workers only)."""
        lists = (driver_env_vars or {}).get("VLLM_CPU_OMP_THREADS_BIND", "nobind").split("|")
        rank = self._parallel_config.data_parallel_rank_local or 0
        if lists[0] not in ("nobind", "auto", ""):
            from vllm.utils.cpu_resource_utils import parse_id_list

            cores = parse_id_list(lists[rank % len(lists)])
            os.sched_setaffinity(0, cores)
            os.environ["OMP_NUM_THREADS"] = str(len(cores))
            import torch

            torch.set_num_threads(len(cores))
        super().initialize_worker(
            local_rank, env_vars, distributed_init_method, driver_env_vars, assigned_physical_gpu_ids=None
        )
