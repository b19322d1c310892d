"""CUDA IPC: slabs lie in device memory, peers of the same host map them, a copy stream per rank pulls over NVLink or PCIe.

cuda_device.py  the CUDA calls         cuda_memory.py  life of device memory
cuda_copy.py    the copy engine        cuda_peers.py   what a peer's handle must fit
devices.py      which device a rank uses, devices by UUID

A mapping outlives its owner: readers of a rank that was killed go on with the right bytes (measured). Peer access comes
with opening a handle; enabling it separately would make a context, and take memory, on every peer's device.
"""

from typing import Final

from vllm_dwdp.errors import DOCTOR, DwdpError, PeerLost
from vllm_dwdp.transport.base import Handle, Slab
from vllm_dwdp.transport.cuda_device import CudaError
from vllm_dwdp.transport.cuda_memory import DevicePeerSlab, DeviceRange, DeviceSlab, DeviceSlot, allocate
from vllm_dwdp.transport.cuda_peers import CudaTransport
from vllm_dwdp.transport.process import ProcessId, is_gone

TRANSPORT: Final = "cupy_ipc"


class CupyIpcTransport(CudaTransport):
    """The cupy_ipc transport of one rank on one device; see Transport."""

    name = TRANSPORT
    means = "CUDA IPC"

    def allocate_slab(self, nbytes: int) -> DeviceSlab:
        """See Transport."""
        return self._keep(DeviceSlab(allocate(self._device, nbytes, "a slab")))

    def export_handle(self, slab: Slab) -> Handle:
        """See Transport. Raises DwdpError where the device or the container does not allow CUDA IPC."""
        mine = self._checked(slab, DeviceSlab)
        try:
            opened_with = self._device.ipc_handle(mine.address)
        except CudaError as error:
            raise DwdpError(
                f"{self._here()} gives no IPC handle ({error.code}): CUDA IPC needs Linux on bare metal or in a container, "
                f"not WSL, and a whole GPU or one MIG instance for all ranks{DOCTOR}"
            ) from error
        return self._handle(mine.nbytes, ipc=opened_with.hex())

    def map_peer(self, handle: Handle) -> DevicePeerSlab:
        """See Transport; raises DwdpError where the handle cannot work here, checked before CUDA is asked."""
        owner, words = self._owned(handle, ipc=str)
        try:
            address = self._device.ipc_open(bytes.fromhex(words["ipc"]))
        except CudaError as error:
            raise self._refused(handle, owner, error) from error
        mapped = DeviceRange(self._device, address, handle.nbytes, self._device.ipc_close)
        return self._keep(DevicePeerSlab(mapped))

    def map_writable(self, handle: Handle) -> DevicePeerSlab:
        """See CudaTransport; CUDA IPC has no other mappings."""
        return self.map_peer(handle)

    def allocate_slot(self, nbytes: int) -> DeviceSlot:
        """See Transport."""
        return self._keep(DeviceSlot(allocate(self._device, nbytes, "a slot")))

    def _refused(self, handle: Handle, owner: ProcessId, error: CudaError) -> DwdpError:
        if is_gone(owner):
            return PeerLost(
                f"the owner of a slab (process {owner.pid}) is gone ({error.code}): look at that rank's log"
            )
        return DwdpError(
            f"mapping {handle.nbytes} bytes of process {owner.pid} on {handle.device} for {self._here()} was refused "
            f"({error.code}): check that the owner still holds them; containers need --ipc=host and --pid=host (or one "
            f"container for all ranks), all GPUs in each, and no MIG{DOCTOR}"
        )
