"""Maps the slabs of the peers, layer by layer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from vllm_dwdp.errors import DwdpError, DwdpTimeout, PeerLost
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.slabs import LayerSlab
from vllm_dwdp.transport.base import Handle, PeerSlab, Transport

if TYPE_CHECKING:
    from vllm_dwdp.group.rendezvous import Rendezvous
    from vllm_dwdp.transport.kept import KeptPeer

_PAUSE_S: Final = 0.05


def map_peers(
    slabs: list[LayerSlab], build: ModelBuild, transport: Transport, rendezvous: Rendezvous, group: list[int]
) -> None:
    """Exchange the handles of all slabs over `group` and map every peer's.

    A rank with a copy of another's share offers it to nobody, and has that other's slabs open for others.
    """
    mine = [transport.export_handle(layer.slab).to_dict() for layer in slabs]
    rendezvous.put("slabs", mine)
    copies = build.apart is not None and build.apart.copies
    held = {} if copies else {group[build.rank]: mine}
    if build.apart is not None:
        build.apart.hold(held)
    for peer in range(len(group)):
        if peer == build.rank and not copies:
            continue
        # Each as soon as it is there: it may be gone by the time that the last one is.
        mapped = _map_peer(group[peer], len(slabs), build, transport, rendezvous)
        if peer != build.rank:
            for layer, slab in zip(slabs, mapped, strict=True):
                layer.peers[peer] = slab
        if build.apart is not None:
            # With handles of this process's own.
            held[group[peer]] = [cast("KeptPeer", slab).handle.to_dict() for slab in mapped]
            build.apart.hold(held)


def _map_peer(rank: int, count: int, build: ModelBuild, transport: Transport, rendezvous: Rendezvous) -> list[PeerSlab]:
    """The slabs of a rank of the launch, of as many layers.

    One that is a server of its own may die meanwhile, or be stopped: then somebody else may have its slabs open, or its next
    life has others. All who have them are asked once before the limit `timeout_s` counts.
    """
    left_s = rendezvous.timeout_s
    deadline = time.monotonic() + left_s
    while True:
        failure: PeerLost | DwdpTimeout | None = None
        for handles in rendezvous.offers(rank, "slabs", left_s):
            if len(handles) != count:
                raise DwdpError(
                    f"rank {rank} has {len(handles)} MoE layers, rank {rendezvous.rank} {count}: start all ranks with the "
                    "same checkpoint"
                )
            try:
                return _map_all(handles, transport)
            except (PeerLost, DwdpTimeout) as error:
                if build.apart is None:
                    raise
                failure = error
        left_s = round(deadline - time.monotonic(), 1)
        if failure is not None and left_s <= 0:
            raise failure
        time.sleep(_PAUSE_S)


def _map_all(handles: Sequence[dict[str, Any]], transport: Transport) -> list[PeerSlab]:
    with contextlib.ExitStack() as undo:
        mapped: list[PeerSlab] = []
        for handle in handles:
            mapped.append(transport.map_peer(Handle.from_dict(handle)))
            undo.callback(mapped[-1].forget)
            undo.callback(transport.unmap_peer, mapped[-1])
        undo.pop_all()
        return mapped
