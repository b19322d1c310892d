"""CUDA IPC: slabs lie in device memory, peers of the same host map them, a copy stream per rank pulls over NVLink or PCIe.

cuda_device.py  the CUDA calls         cuda_memory.py  life of device memory
cuda_copy.py    the copy engine        devices.py      which device a rank uses, devices by UUID

A mapping outlives its owner: readers of a rank that was killed go on with the right bytes (measured). Peer access comes
with opening a handle; enabling it separately would make a context, and take memory, on every peer's device.
"""

from typing import Final

from vllm_dwdp.errors import DOCTOR, DwdpError, PeerLost
from vllm_dwdp.transport.base import Handle, Slab
from vllm_dwdp.transport.cuda_copy import CopyOptions, CudaCopyEngine
from vllm_dwdp.transport.cuda_device import CudaDevice, CudaError, DeviceInfo
from vllm_dwdp.transport.cuda_memory import DevicePeerSlab, DeviceRange, DeviceSlab, DeviceSlot, allocate
from vllm_dwdp.transport.devices import find_device
from vllm_dwdp.transport.live import LiveTransport
from vllm_dwdp.transport.memfd import this_host
from vllm_dwdp.transport.process import ProcessId, is_gone, this_process

TRANSPORT: Final = "cupy_ipc"
_PREFIX: Final = "cuda:"


class CupyIpcTransport(LiveTransport):
    """The cupy_ipc transport of one rank on one device; see Transport."""

    name = TRANSPORT

    def __init__(
        self, device: CudaDevice, options: CopyOptions | None = None, process: ProcessId | None = None
    ) -> None:
        """options: of the copy engines. process: of the rank; this one unless a test says otherwise."""
        super().__init__()
        self.device = self._device = device
        self._options = options or CopyOptions()
        self._process = process or this_process()
        self._devices = device.devices()

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
        host = this_host()
        payload = {
            "process": self._process._asdict(),
            "driver": self._device.driver_version(),
            "ipc": opened_with.hex(),
        }
        device = _PREFIX + self._here().uuid
        return Handle(TRANSPORT, f"{host.name}|{host.boot_id}", device, mine.nbytes, payload)

    def map_peer(self, handle: Handle) -> DevicePeerSlab:
        """See Transport; raises DwdpError where the handle cannot work here, checked before CUDA is asked."""
        owner, driver, opened_with = self._read(handle)
        if owner == self._process:
            raise DwdpError(
                f"a slab of this very process ({owner.pid}) cannot be mapped over CUDA IPC: run every rank in a process of "
                "its own, and use the own slab's address directly"
            )
        if driver != self._device.driver_version():
            raise DwdpError(
                f"the peer's CUDA driver is version {driver} but this one {self._device.driver_version()}: use one image, "
                "with the same CUDA compatibility package, for all ranks"
            )
        self._check_access(find_device(handle.device.removeprefix(_PREFIX), self._devices))
        if is_gone(owner):
            raise PeerLost(f"the owner of a slab (process {owner.pid}) is gone: look at that rank's log")
        try:
            address = self._device.ipc_open(opened_with)
        except CudaError as error:
            raise self._refused(handle, owner, error) from error
        mapped = DeviceRange(self._device, address, handle.nbytes, self._device.ipc_close)
        return self._keep(DevicePeerSlab(mapped))

    def allocate_slot(self, nbytes: int) -> DeviceSlot:
        """See Transport."""
        return self._keep(DeviceSlot(allocate(self._device, nbytes, "a slot")))

    def copy_engine(self) -> CudaCopyEngine:
        """See Transport."""
        return CudaCopyEngine(self._device, self._options)

    def _here(self) -> DeviceInfo:
        return self._devices[self._device.index]

    def _read(self, handle: Handle) -> tuple[ProcessId, int, bytes]:
        """The payload of a handle of this host; raises DwdpError for another transport or host."""
        handle.check_transport(TRANSPORT)
        here = this_host()
        name, _, boot_id = handle.host.rpartition("|")
        if boot_id != here.boot_id:
            raise DwdpError(
                f"a slab of host {name} (boot {boot_id[:8]}) cannot be mapped on {here.name} (boot {here.boot_id[:8]}): "
                "CUDA IPC joins ranks of one host only; choose dwdp.group_size so that a group fits on a host"
            )
        payload = handle.words(process=dict, driver=int, ipc=str)
        return ProcessId(**payload["process"]), payload["driver"], bytes.fromhex(payload["ipc"])

    def _check_access(self, peer: DeviceInfo) -> None:
        if peer.index == self._device.index or self._device.can_access_peer(peer.index):
            return
        others = [device.index for device in self._devices if device.index != self._device.index]
        reachable = ", ".join(str(index) for index in others if self._device.can_access_peer(index)) or "none"
        raise DwdpError(
            f"{self._here()} has no peer access to {peer}; it reaches GPUs: {reachable}: choose devices joined by NVLink or "
            f"one PCIe switch (nvidia-smi topo -p2p r shows them), or a dwdp.group_size that fits them{DOCTOR}"
        )

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
