"""vLLM's GPU worker with the experts of its group."""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from vllm_dwdp.engine.graphs import captured_tokens, limit_graphs
from vllm_dwdp.engine.worker import DwdpWorkerMixin, in_engine, in_ray
from vllm_dwdp.group.launch import launch_of
from vllm_dwdp.kernels.launching import watch
from vllm_dwdp.layers.warm_up import compile_at, warm_up_sizes

logger = init_logger("vllm.dwdp")


class DwdpGPUWorker(DwdpWorkerMixin, Worker):
    """`Worker` of vllm.v1.worker.gpu_worker, holding one rank's share."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        if in_ray() and not in_engine(vllm_config):
            # vLLM takes any other executor for one whose ranks index all devices (gpu_worker.py, `init_device`); Ray has
            # chosen this worker's already. The config is this process's own copy.
            vllm_config.parallel_config.distributed_executor_backend = "ray"
        super().__init__(vllm_config, *args, **kwargs)

    def dwdp_memory_limit(self) -> float:
        """See DwdpWorkerMixin: vLLM's own limit (--gpu-memory-utilization), or what the device has left if that is less."""
        free, _ = torch.accelerator.get_memory_info()
        return min(self.requested_memory, free / self.dwdp_launch.config.ranks_per_device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """See DwdpWorkerMixin; from then on CUDA graphs are those of forwards that read experts directly."""
        super().load_model(*args, **kwargs)
        assert self.dwdp_sharing is not None
        limit_graphs(
            self.vllm_config.compilation_config,
            self.dwdp_sharing.direct_tokens or 0,
            self.dwdp_rank,
            self.vllm_config.uniform_decode_query_len,
        )

    def compile_or_warm_up_model(self) -> Any:
        """See DwdpWorkerMixin; first come forwards that have every kernel of the split view compiled."""
        sharing, config = self.dwdp_sharing, self.vllm_config
        assert sharing is not None
        largest = config.scheduler_config.max_num_batched_tokens
        first = captured_tokens(config.compilation_config) + 1
        sizes = warm_up_sizes(sharing.layers, sharing.direct_tokens or 0, first, largest)
        if sizes:
            self._dwdp_compile(sizes)
        for size in reversed(sizes):
            # As vLLM warms up sizes of its own.
            self.model_runner._dummy_run(
                size, skip_eplb=True, remove_lora=False, randomize_inputs=self.randomize_dummy_inputs
            )
        times = super().compile_or_warm_up_model()
        watch(self._dwdp_compiled)
        return times

    def _dwdp_compile(self, sizes: list[int]) -> None:
        """Compile in threads what the forwards of `sizes` would compile one by one, and say so."""
        assert self.dwdp_sharing is not None
        started = time.monotonic()
        try:
            count = compile_at(self.dwdp_sharing.layers, self.dwdp_sharing.direct_tokens or 0, sizes)
        except Exception as error:  # a compiler's may be of any kind
            logger.warning(
                "dwdp rank %d: kernels are compiled one by one, which takes longer: %s", self.dwdp_rank, repr(error)
            )
            return
        spent = time.monotonic() - started
        logger.info(
            "dwdp rank %d: %d kernels compiled in %.1f s, for %d sizes of steps",
            self.dwdp_rank,
            count,
            spent,
            len(sizes),
        )

    def _dwdp_compiled(self, kernel: str) -> None:
        """A step had `kernel` compiled, which the warm-up should have."""
        assert self.dwdp_sharing is not None
        self.dwdp_sharing.counters.fields.kernels_compiled_after_start += 1
        logger.warning(
            "dwdp rank %d: a step of %d tokens waited while %s was compiled, which the start left out: please report it",
            self.dwdp_rank,
            self.dwdp_step_tokens,
            kernel,
        )

    def determine_available_memory(self) -> int:
        """vLLM's profiling run; ranks that share a GPU take turns, so that their peaks do not add up."""
        launch = launch_of(self.vllm_config)
        assert launch is not None
        before = self.dwdp_rank - 1
        if self.dwdp_rank % launch.config.ranks_per_device:
            self.dwdp_rendezvous.get(before, "profiled")
        try:
            return int(super().determine_available_memory())
        finally:
            self.dwdp_rendezvous.put("profiled", True)
