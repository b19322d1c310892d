"""The dwdp worker on vLLM's CUDA platform."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from vllm_dwdp.engine.worker import DwdpWorkerMixin


class DwdpGPUWorker(DwdpWorkerMixin, Worker):
    """`Worker` for one rank; peers' experts over the transport for GPUs."""
