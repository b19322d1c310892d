"""Slabs that a process holds for others, by either transport whose memory outlives its owner: memory files and device memory
by descriptors."""

from typing import Any, Protocol

from vllm_dwdp.transport.base import Handle, Slab
from vllm_dwdp.transport.memfd import keep_file
from vllm_dwdp.transport.vmm import TRANSPORT
from vllm_dwdp.transport.vmm_kept import keep_pieces


class KeptSlab(Protocol):
    """Another process's slab, held here: a MemoryFile or KeptPieces."""

    @property
    def handle(self) -> Handle:
        """By which it can be told which slab it is."""

    def close(self) -> None:
        """Let go of it; idempotent."""


class KeptPeer(Protocol):
    """A mapped slab of a transport that keeps what peers gave it; `handle` names this process."""

    @property
    def handle(self) -> Handle:
        """For others, also once the owner is gone."""


class Adopting(Protocol):
    """A transport that can take over what others have kept: ShmTransport, VmmTransport."""

    def adopt_slab(self, kept: Any) -> Slab:
        """The same memory as a slab of this process; the transport closes `kept`."""


def keep_slab(handle: Handle, purpose: str, timeout_s: float) -> KeptSlab:
    """Hold a slab that the process named by `handle` has open. Raises PeerLost where it is gone or has it no longer,
    DwdpTimeout, DwdpError."""
    return keep_pieces(handle, timeout_s) if handle.transport == TRANSPORT else keep_file(handle, purpose)


def memory_of(handle: Handle) -> int:
    """Bytes of memory behind a handle, its pieces' pages whole."""
    return sum(handle.words(pieces=list)["pieces"]) if handle.transport == TRANSPORT else handle.nbytes
