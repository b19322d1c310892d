"""What the transports of device memory do alike: one device, its copy engine, and what a peer's handle must fit before CUDA
is asked."""

from abc import abstractmethod
from typing import Any, ClassVar, Final, NamedTuple

from vllm_dwdp.errors import DOCTOR, DwdpError, PeerLost
from vllm_dwdp.transport.base import Handle, PeerSlab
from vllm_dwdp.transport.cuda_copy import CopyOptions, CudaCopyEngine
from vllm_dwdp.transport.cuda_device import CudaDevice, DeviceInfo
from vllm_dwdp.transport.devices import find_device
from vllm_dwdp.transport.live import LiveTransport
from vllm_dwdp.transport.memfd import this_host
from vllm_dwdp.transport.process import ProcessId, is_gone, this_process

_PREFIX: Final = "cuda:"


class Owned(NamedTuple):
    """A peer's handle that fits: whose it is, and the transport's own words."""

    owner: ProcessId
    words: dict[str, Any]


class CudaTransport(LiveTransport):
    """A transport of one rank on one device, over which peers of the same host map device memory."""

    #: As users call what is behind it.
    means: ClassVar[str]

    def __init__(
        self, device: CudaDevice, options: CopyOptions | None = None, process: ProcessId | None = None
    ) -> None:
        """options: of the copy engines. process: of the rank; this one unless a test says otherwise."""
        super().__init__()
        self.device = self._device = device
        self._options = options or CopyOptions()
        self._process = process or this_process()
        self._devices = device.devices()

    @abstractmethod
    def map_writable(self, handle: Handle) -> PeerSlab:
        """As `map_peer`, of a slab that its readers write, such as one of mailboxes."""

    def copy_engine(self) -> CudaCopyEngine:
        """See Transport."""
        return CudaCopyEngine(self._device, self._options)

    def _here(self) -> DeviceInfo:
        return self._devices[self._device.index]

    def _handle(self, nbytes: int, **words: object) -> Handle:
        """Of memory of this device; `words` are the transport's own."""
        host = this_host()
        payload = {"process": self._process._asdict(), "driver": self._device.driver_version(), **words}
        return Handle(self.name, f"{host.name}|{host.boot_id}", _PREFIX + self._here().uuid, nbytes, payload)

    def _owned(self, handle: Handle, **kinds: type) -> Owned:
        """What a peer's handle says, its own words of these types; raises DwdpError where it cannot work here, PeerLost
        where its owner is gone."""
        handle.check_transport(self.name)
        here = this_host()
        name, _, boot_id = handle.host.rpartition("|")
        if boot_id != here.boot_id:
            raise DwdpError(
                f"a slab of host {name} (boot {boot_id[:8]}) cannot be mapped on {here.name} (boot {here.boot_id[:8]}): "
                f"{self.means} joins ranks of one host only; choose dwdp.group_size so that a group fits on a host"
            )
        words = handle.words(process=dict, driver=int, **kinds)
        owner, driver = ProcessId(**words["process"]), words["driver"]
        if owner == self._process:
            raise DwdpError(
                f"a slab of this very process ({owner.pid}) cannot be mapped over {self.means}: run every rank in a process "
                "of its own, and use the own slab's address directly"
            )
        if driver != self._device.driver_version():
            raise DwdpError(
                f"the peer's CUDA driver is version {driver} but this one {self._device.driver_version()}: use one image, "
                "with the same CUDA compatibility package, for all ranks"
            )
        self._check_access(find_device(handle.device.removeprefix(_PREFIX), self._devices))
        if is_gone(owner):
            raise PeerLost(f"the owner of a slab (process {owner.pid}) is gone: look at that rank's log")
        return Owned(owner, words)

    def _check_access(self, peer: DeviceInfo) -> None:
        if peer.index == self._device.index or self._device.can_access_peer(peer.index):
            return
        others = [device.index for device in self._devices if device.index != self._device.index]
        reachable = ", ".join(str(index) for index in others if self._device.can_access_peer(index)) or "none"
        raise DwdpError(
            f"{self._here()} has no peer access to {peer}; it reaches GPUs: {reachable}: choose devices joined by NVLink or "
            f"one PCIe switch (nvidia-smi topo -p2p r shows them), or a dwdp.group_size that fits them{DOCTOR}"
        )
