"""Which cores the CPU workers of a launch compute on."""

from __future__ import annotations

import itertools
import logging

from vllm_dwdp.engine.environment import is_users, set_for_launch

logger = logging.getLogger("vllm.dwdp")

_BIND = "VLLM_CPU_OMP_THREADS_BIND"


def split_cores(cores: list[int], num_ranks: int) -> list[list[int]]:
    """Disjoint runs of `cores`, one per rank and as even as can be; every rank gets all where there are too few."""
    if len(cores) < num_ranks:
        return [list(cores) for _ in range(num_ranks)]
    bounds = [rank * len(cores) // num_ranks for rank in range(num_ranks + 1)]
    return [cores[low:high] for low, high in itertools.pairwise(bounds)]


def physical_cores() -> list[int]:
    """One logical CPU of each physical core that this process may use, node by node, as vLLM's own binding takes them."""
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    by_core: dict[tuple[int, int], int] = {}
    for cpu in get_allowed_cpu_list():
        key = (cpu.numa_node, cpu.physical_core)
        by_core[key] = max(cpu.id, by_core.get(key, cpu.id))
    return [by_core[key] for key in sorted(by_core)]


def bind_ranks(owner: object, num_ranks: int) -> None:
    """Set `VLLM_CPU_OMP_THREADS_BIND` for the ranks of the launch of `owner`, unless the user did.

    vLLM's automatic binding gives every independent engine the same first cores.
    """
    if is_users(_BIND, default="auto"):
        return
    cores = physical_cores()
    lists = split_cores(cores, num_ranks)
    if len(cores) < num_ranks:
        logger.warning(
            "dwdp: %d ranks share %d cores; give the machine more cores or bind them with %s",
            num_ranks,
            len(cores),
            _BIND,
        )
    set_for_launch(owner, _BIND, "|".join(",".join(map(str, part)) for part in lists))
