"""The calls of CUDA's virtual memory management that the vmm transport makes, and nothing else: one object per device.

Memory, addresses and access are apart: an allocation is created, a range of addresses reserved, the one mapped into the
other, and access given. Handles of allocations are ints. A mapping, a handle and a descriptor each keep the memory. Every
call raises CudaError; none synchronises unless it says so.
"""

from abc import ABC, abstractmethod
from typing import Final

#: What to do where such memory cannot be had.
INSTEAD: Final = 'set dwdp.transport to "cupy_ipc", without weight_view "composite"'


class VmmCalls(ABC):
    """Of one device; tests put a simulated one in its place."""

    @abstractmethod
    def why_not(self) -> str:
        """Why this device's memory cannot be given to other processes as descriptors; empty where it can."""

    @abstractmethod
    def fabric(self) -> bool:
        """Whether this device makes memory with a fabric handle, which other nodes of an NVLink domain could map: asked of
        the driver, then tried."""

    @abstractmethod
    def granularity(self) -> int:
        """Bytes of which every allocation, and every address of a mapping, is a multiple."""

    @abstractmethod
    def reserve(self, nbytes: int) -> int:
        """A range of addresses, a multiple of the granularity, with nothing behind it."""

    @abstractmethod
    def free_range(self, address: int, nbytes: int) -> None:
        """Give a whole reserved range back; nothing may be mapped in it."""

    @abstractmethod
    def create(self, nbytes: int) -> int:
        """The handle of new memory on this device, not zeroed, that can be exported."""

    @abstractmethod
    def retain(self, address: int) -> int:
        """One more handle of the memory that is mapped at `address`."""

    @abstractmethod
    def release(self, handle: int) -> None:
        """Let go of a handle."""

    @abstractmethod
    def export(self, handle: int) -> int:
        """A new file descriptor of the memory; not of memory that was imported."""

    @abstractmethod
    def import_descriptor(self, descriptor: int) -> int:
        """A handle of the memory behind a descriptor of another process; the descriptor stays the caller's."""

    @abstractmethod
    def map(self, address: int, nbytes: int, handle: int) -> None:
        """Map a whole allocation of `nbytes` at an address of a reserved range; nobody has access yet."""

    @abstractmethod
    def unmap(self, address: int, nbytes: int) -> None:
        """Undo one `map`."""

    @abstractmethod
    def set_access(self, address: int, nbytes: int, writable: bool) -> None:
        """Let this device read, or read and write, a mapped range; drivers may refuse to let it only read."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all work of this device's context: unlike cudaFree, `unmap` does not."""
