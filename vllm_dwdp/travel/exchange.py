"""The memory through which a rank asks and is asked: mailboxes, answers and flags in its device's memory, which peers write,
and bells in its host's, which its own thread reads and peers' kernels write.

    slab of a rank    a mailbox from each rank | rows of an answer from each rank | flags, int32 by owner
    bells of a rank   int64 by requester

Places are by rank in the group; a rank's own stay unused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vllm_dwdp.transport.base import Handle, Memory, PeerSlab, Slab
from vllm_dwdp.transport.mapping import PAGE
from vllm_dwdp.transport.mapping import Mapping as HostMapping
from vllm_dwdp.transport.memfd import create_file, map_handle

if TYPE_CHECKING:
    import numpy as np

    from vllm_dwdp.transport.cuda_device import CudaDevice
    from vllm_dwdp.transport.cuda_peers import CudaTransport

#: Bytes at the end of a slab; a flag per rank.
_FLAGS: Final = 4096


@dataclass(frozen=True)
class Places:
    """Offsets in every rank's slab. mail_bytes, rows_bytes: of one mailbox, and of the rows of one answer."""

    ranks: int
    mail_bytes: int
    rows_bytes: int

    def mail(self, requester: int) -> int:
        """The mailbox from `requester`."""
        return requester * self.mail_bytes

    def rows(self, owner: int) -> int:
        """The rows that `owner` writes."""
        return self.ranks * self.mail_bytes + owner * self.rows_bytes

    @property
    def flags(self) -> int:
        """Of all owners, side by side."""
        return self.rows(self.ranks)

    @property
    def nbytes(self) -> int:
        """Of the whole slab."""
        return self.flags + _FLAGS


class Exchange:
    """One rank's; `close` once nothing is launched any more that writes to peers."""

    def __init__(self, transport: CudaTransport, device: CudaDevice, places: Places) -> None:
        self.places = places
        self._transport, self._device = transport, device
        self.own: Slab = transport.allocate_slab(places.nbytes)
        self._bells = create_file(PAGE, "the bells of a rank", shared_writes=True)
        self.peers: dict[int, PeerSlab] = {}
        self._bells_of: dict[int, HostMapping] = {}

    def handles(self) -> dict[str, Any]:
        """What peers need, JSON-able."""
        return {"slab": self._transport.export_handle(self.own).to_dict(), "bells": self._bells.handle.to_dict()}

    def map(self, handles: Mapping[int, dict[str, Any]]) -> None:
        """Map what the others' `handles` gave, by rank in the group; raises as `CudaTransport.map_writable`."""
        for rank, given in handles.items():
            self.peers[rank] = self._transport.map_writable(Handle.from_dict(given["slab"]))
            page = map_handle(Handle.from_dict(given["bells"]), f"the bells of rank {rank}", writable=True)
            self._device.host_register(page.address, PAGE)
            self._bells_of[rank] = page

    def memory(self, rank: int) -> Memory:
        """The slab of `rank`, own or mapped."""
        return self.peers.get(rank, self.own)

    def bell(self, owner: int, requester: int) -> int:
        """Address at which `requester` rings for `owner`, as this process's device sees it."""
        return self._bells_of[owner].address + 8 * requester

    def bells(self) -> np.ndarray[Any, Any]:
        """int64 [ranks] of this rank, by requester, without a copy; it keeps the page mapped."""
        import torch

        return self._bells.mapping.tensor().view(torch.int64)[: self.places.ranks].numpy()

    def close(self) -> None:
        """Let go of the others' bells and withdraw the own; slabs are the transport's. Idempotent."""
        while self._bells_of:
            _, page = self._bells_of.popitem()
            self._device.host_unregister(page.address)
        self._bells.close()
