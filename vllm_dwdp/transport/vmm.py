"""CUDA's virtual memory management: slabs are made of pieces that peers map apart, and that every rank can put next to each
other in ranges of addresses of its own.

cuda_vmm.py    the calls               vmm_memory.py  ranges made of pieces
vmm_socket.py  descriptors for peers   cuda_peers.py  what a peer's handle must fit
vmm_kept.py    descriptors kept for others

cuMemMap maps whole allocations only, so that what is mapped apart is allocated apart. A mapping outlives its owner, as with
CUDA IPC.
"""

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

from vllm_dwdp.errors import DOCTOR, DwdpError, PeerLost
from vllm_dwdp.transport.base import Handle, PeerSlab, Slab, Slot
from vllm_dwdp.transport.cuda_copy import CopyOptions
from vllm_dwdp.transport.cuda_device import CudaDevice, CudaError
from vllm_dwdp.transport.cuda_memory import require_free, too_little
from vllm_dwdp.transport.cuda_peers import CudaTransport
from vllm_dwdp.transport.cuda_vmm import INSTEAD, VmmCalls
from vllm_dwdp.transport.limits import require_descriptors
from vllm_dwdp.transport.mapping import round_up
from vllm_dwdp.transport.process import ProcessId, is_gone
from vllm_dwdp.transport.vmm_kept import ANSWER_S, KeptPieces, has_ended, no_answer, sizes_in
from vllm_dwdp.transport.vmm_memory import (
    ComposedRange,
    VmmMemory,
    VmmPeerSlab,
    VmmRange,
    VmmSlab,
    VmmSlot,
    Wanted,
    build,
)
from vllm_dwdp.transport.vmm_socket import DescriptorServer, fetch

logger = logging.getLogger(__name__)

TRANSPORT: Final = "vmm"
_OTHERWISE: Final = f"{INSTEAD}{DOCTOR}"


class Part(NamedTuple):
    """A piece of memory of this transport, by its number in there."""

    memory: Slab | Slot | PeerSlab
    piece: int


class VmmTransport(CudaTransport):
    """The vmm transport of one rank on one device; see Transport.

    page: bytes; every piece is a multiple of it. peers_read_only: whether the driver maps peers' memory read-only, None
    before one was mapped.
    """

    name = TRANSPORT
    means = "CUDA VMM"

    def __init__(
        self,
        device: CudaDevice,
        vmm: VmmCalls,
        options: CopyOptions | None = None,
        process: ProcessId | None = None,
        keep_descriptors: bool = False,
    ) -> None:
        """See CudaTransport. Raises DwdpError where this machine refuses such memory, which is tried.

        keep_descriptors: keep those of peers' slabs until `close`, so that others can have them when their owners are gone.
        """
        super().__init__(device, options, process)
        self._vmm = vmm
        self._keep_descriptors = keep_descriptors
        self._server: DescriptorServer | None = None
        self.peers_read_only: bool | None = None
        if why := vmm.why_not():
            raise DwdpError(f"{self._here()} has no transport vmm ({why}): {_OTHERWISE}")
        self.page = vmm.granularity()
        made = self._allocate([self.page], self.page, "a trial of transport vmm")
        os.close(self._export(made.pieces[0].address))
        logger.info("transport vmm: pages of %d bytes, fabric handles: %s", self.page, "yes" if vmm.fabric() else "no")

    def allocate_slab(self, nbytes: int) -> VmmSlab:
        """See Transport: one piece, rounded up."""
        return self._slab([round_up(nbytes, self.page)], nbytes)

    def allocate_pieces(self, sizes: Sequence[int]) -> VmmSlab:
        """A zeroed slab in one range of addresses, each piece an allocation of its own; sizes are multiples of `page`."""
        return self._slab(sizes, sum(sizes))

    def allocate_slot(self, nbytes: int) -> VmmSlot:
        """See Transport: one piece, rounded up."""
        return self._keep(VmmSlot(self._allocate([round_up(nbytes, self.page)], nbytes, "a slot")))

    def allocate_slot_pieces(self, sizes: Sequence[int]) -> VmmSlot:
        """A slot as `allocate_pieces` makes a slab."""
        return self._keep(VmmSlot(self._allocate(sizes, sum(sizes), "a slot")))

    def export_handle(self, slab: Slab) -> Handle:
        """See Transport; a descriptor for every piece stays open until the slab is let go of."""
        mine = self._checked(slab, VmmSlab)
        if not mine.token:
            require_descriptors(len(mine.pieces), "exporting a slab")
            with contextlib.ExitStack() as undo:
                descriptors = []
                for piece in mine.pieces:
                    descriptors.append(self._export(piece.address))
                    undo.callback(os.close, descriptors[-1])
                mine.token = self._served.offer(descriptors)
                undo.pop_all()
        sizes = [piece.nbytes for piece in mine.pieces]
        return self._handle(mine.nbytes, socket=self._served.name, token=mine.token, pieces=sizes)

    def adopt_slab(self, kept: KeptPieces) -> VmmSlab:
        """A slab of this device that a process which is gone has filled: the same memory, read-only where the driver has it.

        The descriptors are this transport's from now on. Raises DwdpError where the memory is another device's.
        """
        handle, here = kept.handle, self._handle(kept.handle.nbytes)
        if handle.device != here.device:
            raise DwdpError(
                f"this rank's experts are in memory on {handle.device}, and it was started on {here.device}: start it on "
                "the GPU that it had (--device-ids), or start all ranks of the group again"
            )
        sizes = sizes_in(handle, self.page)
        descriptors = iter(kept.descriptors)
        wanted = [
            Wanted(size, lambda: self._vmm.import_descriptor(next(descriptors)), self._allow_adopted) for size in sizes
        ]
        try:
            made = build(self._device, self._vmm, handle.nbytes, wanted)
        except CudaError as error:
            raise DwdpError(
                f"{self._here()} refuses to map experts that other ranks have kept ({error.call}: {error.code}): start all "
                "ranks of the group again"
            ) from error
        slab = VmmSlab(made, self._withdraw)
        slab.token = self._served.offer(kept.descriptors)
        kept.descriptors = []
        return self._keep(slab)

    def map_peer(self, handle: Handle) -> VmmPeerSlab:
        """See Transport: all pieces of the handle next to each other. Raises DwdpError where the handle cannot work here,
        DwdpTimeout where its owner does not answer."""
        return self._map(handle, writable=False, keep=self._keep_descriptors)

    def map_writable(self, handle: Handle) -> VmmPeerSlab:
        """See CudaTransport."""
        return self._map(handle, writable=True)

    def compose(self, parts: Sequence[Part]) -> ComposedRange:
        """A new range of addresses with these pieces in this order: the own ones to read and write, peers' as `map_peer`
        gives them. It outlives what its parts are of."""
        if not parts:
            raise DwdpError("a range composed of no parts: give it at least one")
        wanted, live = [], self._own | self._peers
        for memory, number in parts:
            if not isinstance(memory, VmmMemory) or memory not in live:
                raise DwdpError(
                    f"a range composed of a {type(memory).__name__}: it is made of live memory of this transport"
                )
            if not 0 <= number < len(memory.pieces):
                raise DwdpError(
                    f"piece {number} of {len(memory.pieces)} was to be composed: ranks disagree on the layout"
                )
            address, nbytes = memory.pieces[number]
            allow = self._allow_peer if isinstance(memory, PeerSlab) else self._allow_own
            wanted.append(Wanted(nbytes, partial(self._vmm.retain, address), allow))
        nbytes = sum(want.nbytes for want in wanted)
        return self._keep(ComposedRange(build(self._device, self._vmm, nbytes, wanted)))

    def close(self) -> None:
        """See Transport."""
        super().close()
        if self._server is not None:
            self._server.close()
            self._server = None

    def _slab(self, sizes: Sequence[int], nbytes: int) -> VmmSlab:
        made = self._allocate(sizes, nbytes, "a slab")
        return self._keep(VmmSlab(made, self._withdraw))

    def _withdraw(self, token: str) -> None:
        if self._server is not None:
            self._server.withdraw(token)

    def _allocate(self, sizes: Sequence[int], nbytes: int, purpose: str) -> VmmRange:
        """Zeroed memory of this device in pieces; raises DwdpError where it does not suffice, asked beforehand."""
        if nbytes < 1:
            raise DwdpError(f"{purpose} of {nbytes} bytes: it must have at least one")
        if any(size < 1 or size % self.page for size in sizes):
            raise DwdpError(f"{purpose} of pieces {list(sizes)!r:.80}: each must be a multiple of {self.page} bytes")
        whole = sum(sizes)
        require_free(self._device, whole, purpose)
        wanted = [Wanted(size, partial(self._vmm.create, size), self._allow_own) for size in sizes]
        try:
            made = build(self._device, self._vmm, nbytes, wanted)
        except CudaError as error:
            if error.code == "CUDA_ERROR_OUT_OF_MEMORY":
                raise too_little(self._device, whole, purpose, error) from error
            raise DwdpError(f"{self._here()} refuses {purpose} ({error.call}: {error.code}): {_OTHERWISE}") from error
        self._device.zero(made.address, whole)
        return made

    def _export(self, address: int) -> int:
        """A descriptor of the piece at `address`."""
        try:
            handle = self._vmm.retain(address)
            try:
                descriptor = self._vmm.export(handle)
            finally:
                self._vmm.release(handle)
        except CudaError as error:
            raise DwdpError(
                f"{self._here()} gives no descriptor of its memory ({error.call}: {error.code}): {_OTHERWISE}"
            ) from error
        os.set_inheritable(descriptor, False)
        return descriptor

    @property
    def _served(self) -> DescriptorServer:
        """Made when it is needed first."""
        if self._server is None:
            self._server = DescriptorServer()
        return self._server

    def _map(self, handle: Handle, writable: bool, keep: bool = False) -> VmmPeerSlab:
        owner, words = self._owned(handle, socket=str, token=str, pieces=list)
        sizes, limit_s = sizes_in(handle, self.page), min(self._options.timeout_s, ANSWER_S if keep else float("inf"))
        allow = self._allow_own if writable else self._allow_peer
        if keep:
            require_descriptors(len(sizes), "keeping a peer's slab")
        kept: list[int] = []
        with contextlib.ExitStack() as undo:

            def take() -> int:
                descriptor = next(descriptors)
                if keep:
                    kept.append(os.dup(descriptor))
                    undo.callback(os.close, kept[-1])
                return self._vmm.import_descriptor(descriptor)

            try:
                with contextlib.closing(fetch(words["socket"], words["token"], len(sizes), limit_s)) as descriptors:
                    wanted = [Wanted(size, take, allow) for size in sizes]
                    made = build(self._device, self._vmm, handle.nbytes, wanted)
            except TimeoutError as error:
                raise no_answer(owner, limit_s) from error
            except (CudaError, OSError) as error:
                raise self._refused(handle, owner, error) from error
            if keep:
                here = {
                    "process": self._process._asdict(),
                    "socket": self._served.name,
                    "token": self._served.offer(kept),
                }
                handle = replace(handle, payload=handle.payload | here)
            undo.pop_all()
        return self._keep(VmmPeerSlab(made, handle, self._withdraw))

    def _allow_own(self, address: int, nbytes: int) -> None:
        self._vmm.set_access(address, nbytes, writable=True)

    def _allow_adopted(self, address: int, nbytes: int) -> None:
        """Read-only, unless the driver refuses that for memory of its own device, which says nothing of peers'."""
        try:
            self._vmm.set_access(address, nbytes, writable=False)
        except CudaError:
            self._allow_own(address, nbytes)

    def _allow_peer(self, address: int, nbytes: int) -> None:
        """Read-only, unless the driver has refused that for device memory."""
        if self.peers_read_only is not False:
            try:
                self._vmm.set_access(address, nbytes, writable=False)
            except CudaError:
                if self.peers_read_only:
                    raise
            else:
                self.peers_read_only = True
                return
        self._vmm.set_access(address, nbytes, writable=True)
        self.peers_read_only = False

    def _refused(self, handle: Handle, owner: ProcessId, error: CudaError | OSError) -> DwdpError:
        said = error.code if isinstance(error, CudaError) else error.strerror or str(error)
        if is_gone(owner) if isinstance(error, CudaError) else has_ended(owner):
            return PeerLost(f"the owner of a slab (process {owner.pid}) is gone ({said}): look at that rank's log")
        return (PeerLost if self._keep_descriptors and isinstance(error, ConnectionError) else DwdpError)(
            f"mapping {handle.nbytes} bytes of process {owner.pid} on {handle.device} for {self._here()} was refused "
            f"({said}): check that the owner still holds them; containers need --network=host and --pid=host (or one "
            f"container for all ranks), and all GPUs in each; or {_OTHERWISE}"
        )
