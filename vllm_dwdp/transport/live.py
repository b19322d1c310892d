"""What all transports do alike: they keep the memory that they gave out until it is let go of, and check what comes in."""

from typing import TypeVar

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.base import PeerSlab, Slab, Transport
from vllm_dwdp.transport.mapping import MappedMemory

_M = TypeVar("_M", bound=MappedMemory)


class LiveTransport(Transport):
    """A transport of which every memory is a MappedMemory."""

    def __init__(self) -> None:
        self._own: set[MappedMemory] = set()
        self._peers: set[MappedMemory] = set()

    def unmap_peer(self, peer: PeerSlab) -> None:
        """See Transport; unmapped at once unless a tensor of it is alive."""
        if isinstance(peer, MappedMemory):
            self._peers.discard(peer)
            peer.close()

    def close(self) -> None:
        """See Transport; peers' slabs first, so that no owner frees memory that is still mapped here."""
        for memories in (self._peers, self._own):
            for memory in memories:
                memory.close()
            memories.clear()

    def _keep(self, memory: _M) -> _M:
        (self._peers if isinstance(memory, PeerSlab) else self._own).add(memory)
        return memory

    def _checked(self, slab: Slab, kind: type[_M]) -> _M:
        """`slab`; raises DwdpError unless it is a `kind` of this transport that is not let go of."""
        if not isinstance(slab, kind) or slab not in self._own:
            raise DwdpError(f"a handle for {type(slab).__name__}: only a live slab of this transport has one")
        return slab
