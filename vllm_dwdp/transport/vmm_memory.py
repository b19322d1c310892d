"""Ranges of device addresses made of pieces, each an allocation of its own: how they are built, and let go of, step by
step."""

import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from vllm_dwdp.transport.base import Handle, PeerSlab, Slab, Slot
from vllm_dwdp.transport.cuda_device import CudaDevice, CudaError
from vllm_dwdp.transport.cuda_vmm import VmmCalls
from vllm_dwdp.transport.mapping import MappedMemory

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A whole allocation as it is mapped in a range; nbytes is a multiple of the page."""

    address: int
    nbytes: int


class Wanted(NamedTuple):
    """A piece of a range to be built: `take` gives a handle of its memory, `allow(address, nbytes)` gives this device
    access."""

    nbytes: int
    take: Callable[[], int]
    allow: Callable[[int, int], None]


class VmmRange:
    """Mapped pieces, one behind the other; unmapped when this object and every tensor of it are gone. See mapping.Range.

    nbytes: as asked for; the last piece may be longer.
    """

    def __init__(
        self, device: CudaDevice, vmm: VmmCalls, nbytes: int, pieces: tuple[Piece, ...], undo: ExitStack
    ) -> None:
        """undo: of all that was reserved and mapped."""
        self.address = pieces[0].address
        self.nbytes = nbytes
        self.pieces = pieces
        self._device = device
        # Not at exit: CUDA may be gone by then, and the driver cleans up anyway.
        weakref.finalize(self, _let_go, vmm, undo).atexit = False

    def tensor(self) -> "torch.Tensor":
        """uint8 [nbytes] on this device, wherever the pieces lie, without a copy; it keeps this object alive."""
        return self._device.local_tensor(self.address, self.nbytes, self)


def build(device: CudaDevice, vmm: VmmCalls, nbytes: int, wanted: Sequence[Wanted]) -> VmmRange:
    """A range of these pieces in this order. Raises what `take` and `allow` raise, and CudaError; nothing stays then."""
    whole = sum(want.nbytes for want in wanted)
    pieces = []
    with ExitStack() as undo:
        address = vmm.reserve(whole)
        undo.callback(_quietly, vmm.free_range, address, whole)
        for want in wanted:
            handle = want.take()
            try:
                vmm.map(address, want.nbytes, handle)
                undo.callback(_quietly, vmm.unmap, address, want.nbytes)
            finally:
                vmm.release(handle)  # the mapping keeps the memory
            want.allow(address, want.nbytes)
            pieces.append(Piece(address, want.nbytes))
            address += want.nbytes
        return VmmRange(device, vmm, nbytes, tuple(pieces), undo.pop_all())


def _let_go(vmm: VmmCalls, undo: ExitStack) -> None:
    _quietly(vmm.synchronize)
    undo.close()


def _quietly(call: Callable[..., None], *arguments: int) -> None:
    """A step that nobody could be told of, and that must not keep the next ones from being made."""
    try:
        call(*arguments)
    except CudaError as error:
        logger.warning("letting go of device memory: %s", error)


class VmmMemory(MappedMemory):
    """Memory of a VmmRange."""

    def __init__(self, made: VmmRange) -> None:
        super().__init__(made)
        self._pieces = made.pieces

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """In order of addresses; raises DwdpError once let go of."""
        self._mapped()
        return self._pieces


class VmmSlab(VmmMemory, Slab):
    """Device memory that peers can map."""

    def __init__(self, made: VmmRange, withdraw: Callable[[str], None]) -> None:
        """withdraw(token): called for a slab that was exported."""
        super().__init__(made)
        #: With which peers ask for the descriptors; empty before they are exported.
        self.token = ""
        self._withdraw = withdraw

    def close(self) -> None:
        """See MappedMemory; withdraws the handle."""
        super().close()
        if self.token:
            self._withdraw(self.token)
            self.token = ""


class VmmSlot(VmmMemory, Slot):
    """Private device memory."""


class VmmPeerSlab(VmmMemory, PeerSlab):
    """A peer's slab; read-only where the driver has such mappings of device memory. `handle`: the peer's, or this process's
    where it keeps the descriptors."""

    def __init__(self, made: VmmRange, handle: Handle, withdraw: Callable[[str], None]) -> None:
        """withdraw(token): lets go of the descriptors behind a token, if they are this process's."""
        super().__init__(made)
        self.handle = handle
        self._withdraw = withdraw

    def forget(self) -> None:
        """See PeerSlab."""
        self._withdraw(self.handle.payload["token"])


class ComposedRange(VmmMemory):
    """Pieces of slabs, slots and peers' slabs at addresses of their own; it needs none of their mappings."""
