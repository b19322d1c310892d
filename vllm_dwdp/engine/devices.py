"""GPUs of a launch: which rank computes where, and what several ranks on one GPU need (`ranks_per_device`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms import current_platform

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.devices import device_of_rank

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def set_devices(vllm_config: VllmConfig, config: DwdpConfig, num_ranks: int) -> None:
    """Give every rank its GPU through vLLM's own `--device-ids`; raises DwdpError.

    A rank that is a server of its own has the one that the user names there, or its place among several or all.

    vLLM measures free memory as if it were alone on a device, so ranks that share one need a KV cache of a given size.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    chosen = parallel.assigned_physical_gpu_ids
    if chosen is None:
        chosen = [current_platform.device_id_to_physical_device_id(i) for i in range(current_platform.device_count())]
    if config.rank is not None:
        # One that the user names is this rank's, several are all ranks'.
        named = parallel.assigned_physical_gpu_ids or []
        if len(named) != 1:
            named = [_device_apart(config, config.rank, num_ranks, chosen)]
        devices = parallel.assigned_physical_gpu_ids = named
        num_ranks = 1
    else:
        devices = [device_of_rank(rank, num_ranks, config.ranks_per_device, chosen) for rank in range(num_ranks)]
    if config.ranks_per_device == 1:
        return
    if cache.kv_cache_memory_bytes is None:
        raise DwdpError(
            f"dwdp.ranks_per_device is {config.ranks_per_device}: ranks that share a GPU cannot measure what is free "
            "for them; give each a KV cache of a fixed size with --kv-cache-memory-bytes"
        )
    if parallel.numa_bind and len(parallel.numa_bind_nodes or ()) < num_ranks:
        raise DwdpError(
            f"--numa-bind takes the node of rank i from entry i of its lists, and dwdp.ranks_per_device is "
            f"{config.ranks_per_device}: give one node for each of the {num_ranks} ranks with --numa-bind-nodes"
        )
    parallel.assigned_physical_gpu_ids = devices
    cache.gpu_memory_utilization /= config.ranks_per_device


def _device_apart(config: DwdpConfig, rank: int, num_ranks: int, chosen: list[int]) -> int:
    """By the place of a rank among all; extra ones come behind those that a group needs."""
    if rank >= num_ranks and len(chosen) <= (place := rank // config.ranks_per_device):
        raise DwdpError(
            f"dwdp.rank is {rank} of {num_ranks}, an extra rank, which takes GPU number {place} of the {len(chosen)} "
            "visible here: name its own with --device-ids, or let it see more (CUDA_VISIBLE_DEVICES)"
        )
    return device_of_rank(rank, max(num_ranks, rank + 1), config.ranks_per_device, chosen)
