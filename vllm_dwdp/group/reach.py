"""Whether ranks on GPUs that are servers of their own can hand memory to each other; asked before any takes some.

Descriptors of device memory pass through sockets of the network namespace (transport/vmm_socket.py), and a rank maps memory
of GPUs alone that it sees. Containers may differ in both.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.devices import find_device

if TYPE_CHECKING:
    from vllm_dwdp.group.apart import ApartRendezvous
    from vllm_dwdp.transport.cuda_device import DeviceInfo

_REACH: Final = "reach"


class Reach(NamedTuple):
    """Of one process: its network namespace, and the UUID of the GPU that it computes on."""

    network: str
    gpu: str


def this_network() -> str:
    """The network namespace of this process; empty where the system does not tell."""
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:
        return ""


def check_reach(rendezvous: ApartRendezvous, gpu: str, visible: Sequence[DeviceInfo]) -> None:
    """Raise DwdpError where another rank is in another network namespace, or on a GPU that is not among `visible`.

    gpu: the UUID of this rank's. Waits for the others of the group as `get` does; of a rank that is dead, and whose memory
    another one has, there is nothing to ask. Extra ranks are asked where they are there: they may hand memory on.
    """
    mine = Reach(this_network(), gpu)
    rendezvous.put(_REACH, mine)
    for rank in (*rendezvous.ranks, *rendezvous.extras()):
        if rank == rendezvous.rank:
            continue
        of_group = rank in rendezvous.ranks
        told = rendezvous.get(rank, _REACH) if of_group else rendezvous.meeting.said(rank, _REACH)
        if told is None:
            continue
        there = Reach(*told)
        if "" not in (mine.network, there.network) and mine.network != there.network:
            raise DwdpError(
                f"rank {rank} of the group in {rendezvous.meeting.path} runs in network namespace {there.network}, this "
                f"server in {mine.network}: ranks hand descriptors of device memory to each other over sockets there; run "
                "their containers with --network=host, or in one pod"
            )
        if of_group:
            try:
                find_device(there.gpu, visible)
            except DwdpError as error:
                raise DwdpError(f"rank {rank} of the group in {rendezvous.meeting.path}: {error}") from error
