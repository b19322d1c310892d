"""Whether the KV caches that vLLM gives ranks on CPU can go together, before it starts any."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from vllm_dwdp.errors import DwdpError

if TYPE_CHECKING:
    from vllm.config import CacheConfig

_INSTEAD: Final = "set VLLM_CPU_KVCACHE_SPACE, the whole GiB of a rank's KV cache, or --kv-cache-memory-bytes"


def check_kv_caches(cache: CacheConfig, num_ranks: int, num_here: int) -> None:
    """Refuse KV caches without a size of their own where ranks cannot all have them; raises DwdpError.

    vLLM then has each rank fill `--gpu-memory-utilization` of its memory node, as if it were alone there; it says so only in
    workers, where one alone already finds too little, and never where several do together.
    num_ranks: all on this machine. num_here: those of this launch, which are not there yet.
    """
    if cache.kv_cache_memory_bytes is not None:
        return
    from vllm.utils.cpu_resource_utils import get_cgroup_memory_limit, get_memory_node_info, get_visible_memory_node

    nodes = [get_memory_node_info(node) for node in get_visible_memory_node()]
    if not nodes:
        raise DwdpError(
            f"CPU_VISIBLE_MEMORY_NODES is {os.environ.get('CPU_VISIBLE_MEMORY_NODES')!r}, which leaves no memory node: "
            "unset it, or name some of Mems_allowed_list in /proc/self/status"
        )
    total, free = sum(node.total_memory for node in nodes), sum(node.available_memory for node in nodes)
    each = cache.gpu_memory_utilization * total / len(nodes)
    if (limit := get_cgroup_memory_limit()) is not None:
        total = min(total, limit)  # which each node has as its own, and all have together
    if cache.num_gpu_blocks_override is not None:
        # Caches have that many blocks, whatever there is. vLLM still asks of each rank alone that it could fill its part.
        num_ranks = num_here = 1
    for count, memory, what in ((num_ranks, total, "the machine has"), (num_here, free, "what is free is")):
        if count * each > memory:
            ranks = f"each of {count} ranks" if count > 1 else "this rank"
            raise DwdpError(
                f"on CPU vLLM would give {ranks} {each / 2**30:.2f} GiB (--gpu-memory-utilization "
                f"{cache.gpu_memory_utilization:g}), but {what} {memory / 2**30:.2f} GiB: {_INSTEAD}"
            )
