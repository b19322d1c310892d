"""Which cores the CPU workers of a launch compute on."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence

from vllm_dwdp.group.environment import is_users

logger = logging.getLogger("vllm.dwdp")

_BIND = "VLLM_CPU_OMP_THREADS_BIND"
_SIMULATED_NODES = "VLLM_CPU_SIM_MULTI_NUMA"


def split_cores(cores: list[int], num_ranks: int) -> list[list[int]]:
    """Disjoint runs of `cores`, one per rank and as even as can be; every rank gets all where there are too few."""
    if len(cores) < num_ranks:
        return [list(cores) for _ in range(num_ranks)]
    bounds = [rank * len(cores) // num_ranks for rank in range(num_ranks + 1)]
    return [cores[low:high] for low, high in itertools.pairwise(bounds)]


def physical_cores() -> list[int]:
    """One logical CPU of each physical core that this process may use, node by node, as vLLM's own binding takes them.

    Nodes that numactl or `CPU_VISIBLE_MEMORY_NODES` leaves out are left out here.
    """
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_visible_memory_node

    allowed, nodes = get_allowed_cpu_list(), set(get_visible_memory_node())
    by_core: dict[tuple[int, int], int] = {}
    # On machines whose groups of cores are no memory nodes, none is in `nodes`.
    for cpu in [cpu for cpu in allowed if cpu.numa_node in nodes] or allowed:
        key = (cpu.numa_node, cpu.physical_core)
        by_core[key] = max(cpu.id, by_core.get(key, cpu.id))
    return [by_core[key] for key in sorted(by_core)]


def reserve_cores(cores: list[int], reserved: int) -> list[int]:
    """`cores` of a rank without the last `reserved`; all of them where none would be left, as vLLM does."""
    if len(cores) > reserved:
        return cores[: len(cores) - reserved]
    logger.warning("dwdp: VLLM_CPU_NUM_OF_RESERVED_CPU is %d, but a rank has only the cores %s", reserved, cores)
    return cores


def bind_ranks(num_ranks: int, here: Sequence[int] | None = None) -> dict[str, str]:
    """What engines need so that each rank computes on cores of its own; nothing where the user bound them.

    here: the ranks of this launch, where others of the group have servers of their own; None for all. An extra rank has the
        cores of the rank whose share it has.
    vLLM's automatic binding gives every independent engine the same first cores.
    """
    if is_users(_BIND, default="auto"):
        return {}
    from vllm import envs

    cores = physical_cores()
    lists = split_cores(cores, num_ranks)
    if len(cores) < num_ranks:
        logger.warning(
            "dwdp: %d ranks share %d cores; give the machine more cores or bind them with %s",
            num_ranks,
            len(cores),
            _BIND,
        )
    if (reserved := envs.VLLM_CPU_NUM_OF_RESERVED_CPU) is not None:
        lists = [reserve_cores(part, reserved) for part in lists]
    if here is not None:
        lists = [lists[rank % num_ranks] for rank in here]
    bound = {_BIND: "|".join(",".join(map(str, part)) for part in lists)}
    # It asks for parts of the cores per rank, which these are; vLLM refuses it beside a list.
    return {**bound, _SIMULATED_NODES: "0"} if _SIMULATED_NODES in os.environ else bound
