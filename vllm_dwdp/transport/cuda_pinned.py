"""Slabs in pinned host memory, for tests and benchmarks on one GPU: readers pull them through the copy engine over PCIe.

Copies within one device do not overlap with compute; copies from pinned memory do, as those from a peer over NVLink. Slots
are on the device. Owner and readers each pin the shared memory for themselves, which needs it mapped writable.
"""

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport import memfd
from vllm_dwdp.transport.base import Handle, PeerSlab, Slab, Transport
from vllm_dwdp.transport.cuda_copy import CopyOptions, CudaCopyEngine
from vllm_dwdp.transport.cuda_device import CudaDevice, CudaError
from vllm_dwdp.transport.cuda_memory import DeviceSlab, DeviceSlot, allocate
from vllm_dwdp.transport.mapping import MappedMemory, Mapping, round_up

if TYPE_CHECKING:
    import torch

TRANSPORT: Final = "cuda_pinned"


class PinnedRange:
    """A mapping that copy engines can read: pinned as long as this object, mapped as long as it or a tensor of it."""

    def __init__(self, device: CudaDevice, mapping: Mapping) -> None:
        self.address = mapping.address
        self.nbytes = mapping.nbytes
        self._mapping = mapping
        try:
            device.host_register(mapping.address, round_up(mapping.nbytes))
        except CudaError as error:
            raise DwdpError(
                f"pinning {mapping.nbytes} bytes failed ({error.code}): raise ulimit -l or the container's memlock limit"
            ) from error
        # The mapping is an argument, so that it outlives its pinning.
        weakref.finalize(self, _unpin, device, mapping).atexit = False

    def tensor(self) -> "torch.Tensor":
        """uint8 [nbytes] on the CPU, without a copy."""
        return self._mapping.tensor()


class PinnedSlab(MappedMemory, Slab):
    """A memory file of this process, pinned."""

    def __init__(self, pinned: PinnedRange, file: memfd.MemoryFile) -> None:
        super().__init__(pinned)
        self.handle = replace(file.handle, transport=TRANSPORT)
        self._file = file

    def close(self) -> None:
        """See MappedMemory; withdraws the handle."""
        super().close()
        self._file.close()


class PinnedPeerSlab(MappedMemory, PeerSlab):
    """A peer's memory file, pinned; writable, unlike those of shm."""


class PinnedTransport(Transport):
    """See Transport, and this file's head."""

    name = TRANSPORT

    def __init__(self, device: CudaDevice, options: CopyOptions | None = None) -> None:
        self._device = device
        self._options = options or CopyOptions()
        self._live: set[MappedMemory] = set()

    def allocate_slab(self, nbytes: int) -> PinnedSlab:
        """See Transport."""
        file = memfd.create_file(nbytes, "a pinned slab", shared_writes=True)
        try:
            slab = PinnedSlab(PinnedRange(self._device, file.mapping), file)
        except BaseException:
            file.close()
            raise
        self._live.add(slab)
        return slab

    def export_handle(self, slab: Slab) -> Handle:
        """See Transport."""
        if not isinstance(slab, PinnedSlab) or slab not in self._live:
            raise DwdpError(f"a handle for {type(slab).__name__}: only a live slab of this transport has one")
        return slab.handle

    def map_peer(self, handle: Handle) -> PinnedPeerSlab:
        """See Transport; raises as ShmTransport's."""
        if handle.transport != TRANSPORT:
            raise DwdpError(
                f"a handle of transport {handle.transport!r} reached {TRANSPORT}: set one dwdp.transport for all ranks"
            )
        as_file = replace(handle, transport=memfd.TRANSPORT)
        mapping = memfd.map_handle(as_file, "a peer's pinned slab", writable=True)
        peer = PinnedPeerSlab(PinnedRange(self._device, mapping))
        self._live.add(peer)
        return peer

    def unmap_peer(self, peer: PeerSlab) -> None:
        """See Transport."""
        self._drop(peer)

    def free_slab(self, slab: Slab) -> None:
        """See Transport."""
        self._drop(slab)

    def allocate_slot(self, nbytes: int) -> DeviceSlot:
        """See Transport."""
        slot = DeviceSlot(allocate(self._device, nbytes, "a slot"))
        self._live.add(slot)
        return slot

    def copy_engine(self) -> CudaCopyEngine:
        """See Transport."""
        return CudaCopyEngine(self._device, self._options)

    def close(self) -> None:
        """See Transport."""
        for memory in self._live:
            memory.close()
        self._live.clear()

    def _drop(self, memory: object) -> None:
        if isinstance(memory, MappedMemory):
            self._live.discard(memory)
            memory.close()


class MirroredTransport(PinnedTransport):
    """The own slab on the device, where kernels read it; peers read its mirror in pinned memory, made with the handle.

    For whole engines that share one GPU: their pulls take the copy engine and overlap with compute, as over NVLink.
    """

    def allocate_slab(self, nbytes: int) -> DeviceSlab:  # type: ignore[override]
        """See Transport."""
        slab = DeviceSlab(allocate(self._device, nbytes, "a slab"))
        self._live.add(slab)
        return slab

    def export_handle(self, slab: Slab) -> Handle:
        """See Transport: once for each slab, and when nothing writes to it any more."""
        if not isinstance(slab, DeviceSlab) or slab not in self._live:
            raise DwdpError(f"a handle for {type(slab).__name__}: only a live slab of this transport has one")
        mirror = super().allocate_slab(slab.nbytes)
        mirror.tensor().copy_(slab.tensor())
        return mirror.handle


def _unpin(device: CudaDevice, mapping: Mapping) -> None:
    device.host_unregister(mapping.address)
