"""What the front end tells every process of one launch: travels on the parallel config, outside of any config hash."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_dwdp.config import DwdpConfig, Rendezvous

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_ATTRIBUTE = "dwdp_launch"

#: The same address for API servers, which build a config of their own: `pid:host:port/launch-id`, with the id of the
#: process whose children it is for. Not a VLLM_ name: vLLM warns of those that it does not know, and refuses them with
#: --fail-on-environ-validation.
RENDEZVOUS_ENV = "DWDP_RENDEZVOUS"


@dataclass(frozen=True)
class DwdpLaunch:
    """One launch of `num_ranks` independent ranks; `rendezvous` is where they meet.

    vLLM's own number of ranks is reset to 1 in each of them (`reconfigure_for_independent_dp_rank`). `cores` are those
    the launch may use: a worker is bound to its own, and its copy thread should not be. `environment` is set in engines.
    """

    config: DwdpConfig
    num_ranks: int
    rendezvous: Rendezvous
    cores: tuple[int, ...]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        """Ranks that share one copy of the experts, N."""
        return self.config.resolve_group_size(self.num_ranks)

    def group_of(self, rank: int) -> list[int]:
        """The ranks of the group that `rank` belongs to, ascending."""
        first = rank // self.group_size * self.group_size
        return list(range(first, first + self.group_size))


def format_address(rendezvous: Rendezvous) -> str:
    """`host:port/launch-id`, which `Rendezvous.parse` reads."""
    return f"{rendezvous.host}:{rendezvous.port}/{rendezvous.group_id}"


def attach_launch(vllm_config: VllmConfig, launch: DwdpLaunch) -> None:
    """Put `launch` on the config; it is pickled with it to engines and workers."""
    object.__setattr__(vllm_config.parallel_config, _ATTRIBUTE, launch)


def launch_of(vllm_config: VllmConfig | Any) -> DwdpLaunch | None:
    """The launch that a config belongs to; None where the executor is not dwdp."""
    return getattr(vllm_config.parallel_config, _ATTRIBUTE, None)
