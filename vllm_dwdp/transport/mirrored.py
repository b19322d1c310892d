"""For trials only: whole engines that share one GPU, with pulls that overlap with compute as those over NVLink do.

The own slab lies on the device, where kernels read it. Peers pull its mirror in pinned host memory, through the copy engine
and over PCIe: copies within one device would not overlap with compute. It is what `transport: cuda_pinned` means to an
engine; ranks with GPUs of their own use cupy_ipc.
"""

from vllm_dwdp.transport.base import Handle, Slab
from vllm_dwdp.transport.cuda_memory import DeviceSlab, allocate
from vllm_dwdp.transport.cuda_pinned import PinnedTransport


class MirroredTransport(PinnedTransport):
    """See Transport, and this file's head."""

    def allocate_slab(self, nbytes: int) -> DeviceSlab:  # type: ignore[override]
        """See Transport."""
        return self._keep(DeviceSlab(allocate(self._device, nbytes, "a slab")))

    def export_handle(self, slab: Slab) -> Handle:
        """See Transport: once for each slab, and when nothing writes to it any more; the mirror is made with it."""
        mine = self._checked(slab, DeviceSlab)
        mirror = super().allocate_slab(mine.nbytes)
        mirror.tensor().copy_(mine.tensor())
        return mirror.handle
