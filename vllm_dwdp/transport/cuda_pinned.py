"""Slabs in pinned host memory, for tests and benchmarks on one GPU: readers pull them through the copy engine over PCIe.

Copies within one device do not overlap with compute; copies from pinned memory do, as those from a peer over NVLink. Slots
are on the device. Owner and readers each pin the shared memory for themselves, which needs it mapped writable.
"""

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport import memfd
from vllm_dwdp.transport.base import Handle, PeerSlab, Slab
from vllm_dwdp.transport.cuda_copy import CopyOptions, CudaCopyEngine
from vllm_dwdp.transport.cuda_device import CudaDevice, CudaError
from vllm_dwdp.transport.cuda_memory import DeviceSlot, allocate
from vllm_dwdp.transport.live import LiveTransport
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


class PinnedTransport(LiveTransport):
    """See Transport, and this file's head."""

    name = TRANSPORT

    def __init__(self, device: CudaDevice, options: CopyOptions | None = None) -> None:
        super().__init__()
        self._device = device
        self._options = options or CopyOptions()

    def allocate_slab(self, nbytes: int) -> PinnedSlab:
        """See Transport."""
        file = memfd.create_file(nbytes, "a pinned slab", shared_writes=True)
        try:
            return self._keep(PinnedSlab(PinnedRange(self._device, file.mapping), file))
        except BaseException:
            file.close()
            raise

    def export_handle(self, slab: Slab) -> Handle:
        """See Transport."""
        return self._checked(slab, PinnedSlab).handle

    def map_peer(self, handle: Handle) -> PinnedPeerSlab:
        """See Transport; raises as ShmTransport's."""
        handle.check_transport(TRANSPORT)
        as_file = replace(handle, transport=memfd.TRANSPORT)
        mapping = memfd.map_handle(as_file, "a peer's pinned slab", writable=True)
        return self._keep(PinnedPeerSlab(PinnedRange(self._device, mapping)))

    def allocate_slot(self, nbytes: int) -> DeviceSlot:
        """See Transport."""
        return self._keep(DeviceSlot(allocate(self._device, nbytes, "a slot")))

    def copy_engine(self) -> CudaCopyEngine:
        """See Transport."""
        return CudaCopyEngine(self._device, self._options)


def _unpin(device: CudaDevice, mapping: Mapping) -> None:
    device.host_unregister(mapping.address)
