"""KV caches of ranks on CPU that vLLM would size as if each were alone: one line, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.utils import cpu_resource_utils
from vllm.utils.cpu_resource_utils import MemoryNodeInfo

from tests.unit.leftovers import build, check_message, refusal
from vllm_dwdp.engine.kv_caches import check_kv_caches

GIB = 1 << 30


def nodes(monkeypatch: pytest.MonkeyPatch, *known: Sequence[int], limit: int | None = None) -> None:
    """Memory nodes of (total, free) GiB, with a number that is not their place; limit: of the cgroup, GiB."""
    by_number = {3 + i: MemoryNodeInfo(total * GIB, free * GIB) for i, (total, free) in enumerate(known)}
    monkeypatch.setattr(cpu_resource_utils, "get_visible_memory_node", lambda: list(by_number))
    monkeypatch.setattr(cpu_resource_utils, "get_memory_node_info", by_number.__getitem__)
    monkeypatch.setattr(cpu_resource_utils, "get_cgroup_memory_limit", lambda: limit and limit * GIB)


def cache(share: float, nbytes: int | None = None, blocks: int | None = None) -> Any:
    return SimpleNamespace(gpu_memory_utilization=share, kv_cache_memory_bytes=nbytes, num_gpu_blocks_override=blocks)


def test_ranks_that_cannot_all_be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, (20, 20))
    told = refusal(lambda: check_kv_caches(cache(0.92), 2, 2))
    check_message(
        told, ["each of 2 ranks 18.40 GiB", "0.92", "machine has 20.00 GiB", "VLLM_CPU_KVCACHE_SPACE", "memory-bytes"]
    )
    check_kv_caches(cache(0.92, GIB), 2, 2)
    check_kv_caches(cache(0.5), 2, 2)  # all of it, and no more
    nodes(monkeypatch, (20, 20), (20, 20))
    check_kv_caches(cache(0.92), 2, 2)
    check_message(
        refusal(lambda: check_kv_caches(cache(0.92), 3, 3)), ["each of 3 ranks 18.40", "machine has 40.00 GiB"]
    )


def test_memory_that_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, (20, 9))
    check_message(refusal(lambda: check_kv_caches(cache(0.5), 2, 2)), ["each of 2 ranks 10.00", "free is 9.00 GiB"])
    # A server for each rank: what is not free may be the other one's, which has its own already.
    check_kv_caches(cache(0.4), 2, 1)
    check_message(refusal(lambda: check_kv_caches(cache(0.5), 2, 1)), ["this rank 10.00", "free is 9.00 GiB"])
    check_message(
        refusal(lambda: check_kv_caches(cache(0.6), 2, 1)), ["each of 2 ranks 12.00", "machine has 20.00 GiB"]
    )


def test_caches_of_a_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM allocates no more than these, and still asks of each rank alone that it could fill its part of the memory."""
    nodes(monkeypatch, (20, 19))
    check_kv_caches(cache(0.92, blocks=9), 2, 2)
    nodes(monkeypatch, (20, 18))
    check_message(
        refusal(lambda: check_kv_caches(cache(0.92, blocks=9), 2, 2)), ["this rank 18.40", "free is 18.00 GiB"]
    )


def test_nodes_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes the limit of all for the size of each."""
    nodes(monkeypatch, (20, 20), (20, 20), limit=20)
    refused = refusal(lambda: check_kv_caches(cache(0.92), 2, 2))
    check_message(refused, ["each of 2 ranks 18.40 GiB", "machine has 20.00 GiB"])
    check_kv_caches(cache(0.5), 2, 2)
    nodes(monkeypatch, (20, 20), limit=90)
    check_message(refusal(lambda: check_kv_caches(cache(0.92), 2, 2)), ["machine has 20.00 GiB"])


def test_no_memory_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch)
    monkeypatch.setenv("CPU_VISIBLE_MEMORY_NODES", "7")
    told = refusal(lambda: check_kv_caches(cache(0.92), 2, 2))
    check_message(told, ["CPU_VISIBLE_MEMORY_NODES is '7'", "unset it", "Mems_allowed_list"])


@pytest.mark.usefixtures("nothing_left")
def test_a_launch_is_refused_before_anything_starts(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("on GPUs vLLM measures each rank's own")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    nodes(monkeypatch, (20, 20))
    check_message(refusal(lambda: build(tiny_moe)), ["each of 2 ranks 18.40 GiB"])
    apart = {"dwdp": {"group": "a", "rank": 0, "ranks": 2}}
    refused = refusal(
        lambda: build(tiny_moe, data_parallel_size=1, additional_config=apart, gpu_memory_utilization=0.6)
    )
    check_message(refused, ["each of 2 ranks 12.00 GiB"])
    nodes(monkeypatch, (20, 9))  # the other server has its own already
    build(tiny_moe, data_parallel_size=1, additional_config=apart, gpu_memory_utilization=0.4)
    build(tiny_moe, kv_cache_memory_bytes=GIB)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    build(tiny_moe)
