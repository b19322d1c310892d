"""The dwdp worker on vLLM's CPU platform."""

from __future__ import annotations

import psutil
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_dwdp.engine.worker import DwdpWorkerMixin
from vllm_dwdp.transport.limits import available_memory


class DwdpCPUWorker(DwdpWorkerMixin, CPUWorker):
    """`CPUWorker` for one rank; peers' experts over shared memory."""

    def dwdp_memory_limit(self) -> float:
        """See DwdpWorkerMixin: an equal part of what the host has left, within vLLM's own limit where that holds."""
        limit = available_memory().nbytes / self.dwdp_launch.num_ranks
        if self.cache_config.kv_cache_memory_bytes is None:
            limit = min(limit, self.requested_cpu_memory - psutil.Process().memory_info().rss)
        return limit
