"""Device memory as the transports keep it: freed, or unmapped, when nobody holds it any more."""

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from vllm_dwdp.errors import DOCTOR, DwdpError
from vllm_dwdp.transport.base import PeerSlab, Slab, Slot
from vllm_dwdp.transport.cuda_device import CudaDevice, CudaError
from vllm_dwdp.transport.mapping import MappedMemory, Range, round_up

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# cudaMalloc cuts smaller allocations out of blocks of this size, and an IPC handle shares the whole block.
BLOCK: Final = 2 << 20


class DeviceRange:
    """Device memory of this process; `release(address)` is called when this object and every tensor of it are gone."""

    def __init__(self, device: CudaDevice, address: int, nbytes: int, release: Callable[[int], None]) -> None:
        self.address = address
        self.nbytes = nbytes
        self._device = device
        # Not at exit: CUDA may be gone by then, and the driver cleans up anyway.
        weakref.finalize(self, _release, release, address).atexit = False

    def tensor(self) -> "torch.Tensor":
        """uint8 [nbytes] on the device, without a copy; it keeps this object alive."""
        return self._device.tensor(self.address, self.nbytes, self)


class DeviceSlab(MappedMemory, Slab):
    """Device memory that peers can map."""


class DeviceSlot(MappedMemory, Slot):
    """Private device memory."""


class DevicePeerSlab(MappedMemory, PeerSlab):
    """A peer's slab. CUDA IPC has no read-only mappings: nothing but convention keeps this from being written."""


def allocate(device: CudaDevice, nbytes: int, purpose: str) -> Range:
    """`nbytes` > 0 zeroed bytes of cudaMalloc, in blocks of their own; refused beforehand where memory does not suffice.

    Raises DwdpError with the numbers.
    """
    if nbytes < 1:
        raise DwdpError(f"{purpose} of {nbytes} bytes: it must have at least one")
    whole = round_up(nbytes, BLOCK)
    require_free(device, whole, purpose)
    try:
        address = device.malloc(whole)
    except CudaError as error:
        raise too_little(device, whole, purpose, error) from error
    made = DeviceRange(device, address, nbytes, device.free)
    device.zero(address, whole)
    return made


def require_free(device: CudaDevice, nbytes: int, purpose: str) -> None:
    """See that `nbytes` are free, if need be without what torch keeps for later; raises DwdpError with the numbers."""
    if device.memory().free < nbytes:
        device.empty_cache()
    if device.memory().free < nbytes:
        raise too_little(device, nbytes, purpose)


def too_little(device: CudaDevice, nbytes: int, purpose: str, error: CudaError | None = None) -> DwdpError:
    """What to raise where memory does not suffice; error: of the call that found out."""
    left, code = device.memory(), f" ({error.code})" if error else ""
    return DwdpError(
        f"{purpose} needs {nbytes / 2**30:.2f} GiB but GPU {device.index} has {left.free / 2**30:.2f} of "
        f"{left.total / 2**30:.2f} GiB free{code}: free memory, use more ranks or fewer slots{DOCTOR}"
    )


def _release(release: Callable[[int], None], address: int) -> None:
    try:
        release(address)
    except CudaError as error:  # in a finalizer nobody could catch it; the device has failed before
        logger.warning("letting go of device memory at %#x: %s", address, error)
