"""What the front end tells every process of one launch: travels on the parallel config, outside of any config hash."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.hits_file import Hits

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_ATTRIBUTE = "dwdp_launch"

#: The launch's folder for processes that have no config of it yet, and for API servers, which build one of their own:
#: `pid:folder`, with the id of the process whose children it is for. Not a VLLM_ name: vLLM warns of those that it does not
#: know, and refuses them with --fail-on-environ-validation.
RENDEZVOUS_ENV = "DWDP_RENDEZVOUS"


@dataclass(frozen=True)
class Apart:
    """The place of a launch of one rank in a group of servers: its `rank` there, and the folder in which they meet.

    A rank from the number of ranks on is an extra one: it has the share of rank modulo that number, and nobody needs it.
    """

    group: str
    rank: int
    folder: str


@dataclass(frozen=True)
class DwdpLaunch:
    """One launch of `num_ranks` independent ranks; `folder` is the path of the one in which they meet (launch_folder.py).

    vLLM's own number of ranks is reset to 1 in each of them (`reconfigure_for_independent_dp_rank`). `cores` are those
    the launch may use: a worker is bound to its own, and its copy thread should not be. `environment` is set in engines.
    `captured_tokens` is the largest size of CUDA graphs that the user named, or 0.
    `popularity` is what the front end read of the file of that name: the same on all ranks, whatever becomes of it.
    `apart` where this launch is one rank of a group of servers; `num_ranks` are then those of the group.
    """

    config: DwdpConfig
    num_ranks: int
    folder: str
    cores: tuple[int, ...]
    environment: dict[str, str] = field(default_factory=dict)
    captured_tokens: int = 0
    popularity: Hits | None = None
    apart: Apart | None = None

    @property
    def ranks_here(self) -> list[int]:
        """The ranks that this launch runs."""
        return list(range(self.num_ranks)) if self.apart is None else [self.apart.rank]

    def rank_of(self, vllm_config: VllmConfig) -> int:
        """The rank of an engine of this launch."""
        return self.ranks_here[vllm_config.parallel_config.data_parallel_index]

    @property
    def name(self) -> str:
        """The same for all ranks of a group, and for no other launch."""
        return os.path.basename(self.folder if self.apart is None else self.apart.folder)

    @property
    def group_size(self) -> int:
        """Ranks that share one copy of the experts, N."""
        return self.config.resolve_group_size(self.num_ranks)

    def group_of(self, rank: int) -> list[int]:
        """The ranks of the group that `rank` belongs to, ascending; an extra rank is none of them."""
        first = rank % self.num_ranks // self.group_size * self.group_size
        return list(range(first, first + self.group_size))


def attach_launch(vllm_config: VllmConfig, launch: DwdpLaunch) -> None:
    """Put `launch` on the config; it is pickled with it to engines and workers."""
    object.__setattr__(vllm_config.parallel_config, _ATTRIBUTE, launch)


def launch_of(vllm_config: VllmConfig | Any) -> DwdpLaunch | None:
    """The launch that a config belongs to; None where the executor is not dwdp."""
    return getattr(vllm_config.parallel_config, _ATTRIBUTE, None)
