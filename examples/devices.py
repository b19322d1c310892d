"""What the examples tell vLLM on a machine with GPUs: nothing where every rank has a GPU of its own, and nothing on CPU.

Ranks that share a GPU cannot measure what memory is free for them, so each gets a KV cache of a fixed size, which is
enough for small models.
"""

from __future__ import annotations

import json
import os
from typing import Any

SMALL_CACHE = {"kv_cache_memory_bytes": 256 << 20, "gpu_memory_utilization": 0.5}


def count_gpus() -> int:
    """GPUs that vLLM sees here, told without using one; 0 where vLLM is built for CPU. Exits if it finds none."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return 0
    if current_platform.is_unspecified() or not (count := int(current_platform.device_count())):
        raise SystemExit(
            "no GPU is visible, but vLLM is built for GPUs: check `nvidia-smi -L` and CUDA_VISIBLE_DEVICES"
        )
    return count


def ranks_per_gpu(ranks: int) -> int:
    """How many of the ranks share a GPU; 1 on CPU."""
    gpus = count_gpus()
    return -(-ranks // gpus) if gpus else 1


def engine_options(ranks: int) -> dict[str, Any]:
    """Keyword arguments of `LLM(...)` for DWDP on `ranks` ranks, and for a plain vLLM that is compared with it."""
    options: dict[str, Any] = {}
    if ranks_per_gpu(ranks) > 1:
        options.update(SMALL_CACHE)
    backend = os.environ.get("DWDP_ATTENTION_BACKEND")
    if backend and count_gpus():
        options["attention_backend"] = backend
    return options


def dwdp_settings(ranks: int) -> dict[str, Any]:
    """What `additional_config["dwdp"]` needs."""
    shared = ranks_per_gpu(ranks)
    return {"ranks_per_device": shared} if shared > 1 else {}


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Keyword arguments of `LLM(...)` as words for `vllm serve`."""
    words: list[str] = []
    for name, value in options.items():
        words += ["--" + name.replace("_", "-"), json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def dwdp_arguments(ranks: int) -> list[str]:
    """The words after `vllm serve MODEL` that start DWDP on `ranks` ranks."""
    options: dict[str, Any] = {"distributed_executor_backend": "dwdp", "data_parallel_size": ranks}
    if settings := dwdp_settings(ranks):
        options["additional_config"] = {"dwdp": settings}
    return as_arguments({**options, **engine_options(ranks)})
