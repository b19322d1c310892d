"""The dwdp worker on vLLM's CPU platform."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_dwdp.engine.worker import DwdpWorkerMixin


class DwdpCPUWorker(DwdpWorkerMixin, CPUWorker):
    """`CPUWorker` for one rank; peers' experts over shared memory."""
