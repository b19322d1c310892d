"""Which device a rank uses (pure). Devices are named by UUID between processes: indices differ with what each one sees."""

from collections.abc import Sequence
from typing import TypeVar

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.cuda_device import DeviceInfo

_D = TypeVar("_D")


def devices_needed(num_ranks: int, ranks_per_device: int) -> int:
    """Devices for `num_ranks` ranks of one host; raises DwdpError for counts below 1."""
    if num_ranks < 1 or ranks_per_device < 1:
        raise DwdpError(f"{num_ranks} ranks with dwdp.ranks_per_device {ranks_per_device}: both must be >= 1")
    return -(-num_ranks // ranks_per_device)


def device_of_rank(local_rank: int, num_local_ranks: int, ranks_per_device: int, visible: Sequence[_D]) -> _D:
    """The device of the rank that is number `local_rank` of this host's `num_local_ranks`.

    Ranks fill one device after the other. Raises DwdpError where too few devices are visible.
    """
    needed = devices_needed(num_local_ranks, ranks_per_device)
    if not 0 <= local_rank < num_local_ranks:
        raise DwdpError(
            f"local rank {local_rank} of {num_local_ranks} ranks on this host: it must be below that number"
        )
    if len(visible) < needed:
        fits = -(-num_local_ranks // len(visible)) if visible else 0
        advice = f", raise dwdp.ranks_per_device to {fits}" if fits else ""
        raise DwdpError(
            f"{num_local_ranks} ranks with dwdp.ranks_per_device {ranks_per_device} need {needed} GPUs but {len(visible)} "
            f"are visible: give this process more (CUDA_VISIBLE_DEVICES), use fewer ranks{advice}"
        )
    return visible[local_rank // ranks_per_device]


def find_device(uuid: str, visible: Sequence[DeviceInfo]) -> DeviceInfo:
    """The visible device with this UUID; raises DwdpError that lists what is visible."""
    for device in visible:
        if device.uuid == uuid:
            return device
    seen = ", ".join(device.uuid for device in visible) or "none"
    raise DwdpError(
        f"the peer's device {uuid} is not among the {len(visible)} visible here ({seen}): let every worker see the "
        "devices of all ranks of its group (CUDA_VISIBLE_DEVICES)"
    )
