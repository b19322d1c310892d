"""CUDA's virtual memory management in host memory: allocations are memory files, mapped with MAP_FIXED, so that two ranges
of one allocation hold the same bytes, read-only mappings fault when written, and descriptors travel over real sockets.

Refuses what the driver refuses: parts of allocations, odd sizes and addresses, access to what is not mapped, exports of
imported memory.
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vllm_dwdp.transport.cuda_device import CudaError
from vllm_dwdp.transport.cuda_vmm import VmmCalls
from vllm_dwdp.transport.mapping import MAP_FIXED, MAP_NORESERVE, PROT_NONE, _libc, map_pages

if TYPE_CHECKING:
    from tests.unit.fake_cuda import FakeCuda

PAGE: Final = 1 << 16
_NAME: Final = "fake-vmm"
_EMPTY: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
INVALID: Final = "CUDA_ERROR_INVALID_VALUE"


@dataclass(eq=False)
class Allocation:
    """Memory of a device; it goes with the last handle and the last mapping, of whatever process."""

    descriptor: int
    nbytes: int
    device: int
    holders: int = 0


@dataclass(eq=False)
class Held:
    """A handle of a process."""

    allocation: Allocation
    imported: bool
    count: int = 0


@dataclass(eq=False)
class Mapped:
    """writable: None before access was given."""

    nbytes: int
    handle: int
    allocation: Allocation
    imported: bool
    writable: bool | None = None


def open_descriptors() -> int:
    """Descriptors of simulated allocations that are open in this process, the simulation's own among them."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found += _NAME in os.readlink(descriptor)
        except FileNotFoundError:  # the one that lists them
            continue
    return found


class FakeVmm(VmmCalls):
    """One process's calls of one device. reads_only: False has the driver refuse read-only access."""

    def __init__(self, cuda: "FakeCuda") -> None:
        self._cuda = cuda
        self.handles: dict[int, Held] = {}
        self.ranges: dict[int, int] = {}
        self.mappings: dict[int, Mapped] = {}
        self.missing = ""
        self.reads_only = True
        self._numbers = iter(range(7000 + 100_000 * cuda.number, 1 << 40))

    def clean(self) -> bool:
        """Whether nothing is held, mapped or reserved."""
        return not (self.handles or self.mappings or self.ranges)

    def covers(self, address: int, nbytes: int) -> bool:
        """Whether all of these bytes are mapped, with access."""
        end = address + nbytes
        for base, mapped in sorted(self.mappings.items()):
            if base <= address < base + mapped.nbytes and mapped.writable is not None:
                address = base + mapped.nbytes
        return address >= end

    # VmmCalls

    def why_not(self) -> str:
        return self.missing

    def fabric(self) -> bool:
        return False

    def granularity(self) -> int:
        return PAGE

    def reserve(self, nbytes: int) -> int:
        self._call("reserve", nbytes % PAGE == 0 and nbytes > 0)
        found = map_pages(0, nbytes + PAGE, PROT_NONE, _EMPTY, -1, 0, "a simulated range")
        address = found + -found % PAGE
        _libc.munmap(found, address - found)
        _libc.munmap(address + nbytes, PAGE - (address - found))
        self.ranges[address] = nbytes
        return address

    def free_range(self, address: int, nbytes: int) -> None:
        inside = any(address <= base < address + nbytes for base in self.mappings)
        self._call("free_range", self.ranges.get(address) == nbytes and not inside)
        del self.ranges[address]
        _libc.munmap(address, nbytes)

    def create(self, nbytes: int) -> int:
        self._call("create", nbytes % PAGE == 0 and nbytes > 0)
        machine, device = self._cuda.machine, self._cuda.index
        if machine.used[device] + nbytes > machine.total:
            raise CudaError("create", "CUDA_ERROR_OUT_OF_MEMORY", "made up")
        descriptor = os.memfd_create(_NAME)
        os.ftruncate(descriptor, nbytes)
        os.pwrite(descriptor, b"\xee" * PAGE, 0)  # never zero by chance
        machine.used[device] += nbytes
        made = Allocation(descriptor, nbytes, device)
        machine.allocations[os.fstat(descriptor).st_ino] = made
        return self._hold(next(self._numbers), made, False)

    def retain(self, address: int) -> int:
        found = [m for base, m in self.mappings.items() if base <= address < base + m.nbytes]
        self._call("retain", bool(found))
        return self._hold(found[0].handle, found[0].allocation, found[0].imported)

    def release(self, handle: int) -> None:
        self._call("release", handle in self.handles)
        held = self.handles[handle]
        held.count -= 1
        if not held.count:
            del self.handles[handle]
        self._drop(held.allocation)

    def export(self, handle: int) -> int:
        self._call("export", handle in self.handles and not self.handles[handle].imported)
        return os.dup(self.handles[handle].allocation.descriptor)

    def import_descriptor(self, descriptor: int) -> int:
        found = self._cuda.machine.allocations.get(os.fstat(descriptor).st_ino)
        self._call("import_descriptor", found is not None)
        assert found is not None
        return self._hold(next(self._numbers), found, True)

    def map(self, address: int, nbytes: int, handle: int) -> None:
        reserved = any(base <= address and address + nbytes <= base + size for base, size in self.ranges.items())
        free = all(address + nbytes <= base or base + m.nbytes <= address for base, m in self.mappings.items())
        whole = handle in self.handles and self.handles[handle].allocation.nbytes == nbytes
        self._call("map", reserved and free and whole and address % PAGE == 0)
        held = self.handles[handle]
        self.mappings[address] = Mapped(nbytes, handle, held.allocation, held.imported)
        held.allocation.holders += 1

    def unmap(self, address: int, nbytes: int) -> None:
        self._call("unmap", address in self.mappings and self.mappings[address].nbytes == nbytes)
        map_pages(address, nbytes, PROT_NONE, _EMPTY | MAP_FIXED, -1, 0, "a simulated range")
        self._drop(self.mappings.pop(address).allocation)

    def set_access(self, address: int, nbytes: int, writable: bool) -> None:
        mapped = self.mappings.get(address)
        self._call("set_access", mapped is not None and mapped.nbytes == nbytes and (writable or self.reads_only))
        assert mapped is not None
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        flags = mmap.MAP_SHARED | MAP_FIXED
        map_pages(address, nbytes, prot, flags, mapped.allocation.descriptor, 0, "a simulated allocation")
        mapped.writable = writable

    def synchronize(self) -> None:
        self._call("synchronize", True)

    def _call(self, name: str, allowed: bool) -> None:
        self._cuda._call(name)
        if not allowed:
            raise CudaError(name, INVALID, "made up")

    def _hold(self, number: int, allocation: Allocation, imported: bool) -> int:
        self.handles.setdefault(number, Held(allocation, imported)).count += 1
        allocation.holders += 1
        return number

    def _drop(self, allocation: Allocation) -> None:
        allocation.holders -= 1
        if not allocation.holders:
            del self._cuda.machine.allocations[os.fstat(allocation.descriptor).st_ino]
            self._cuda.machine.used[allocation.device] -= allocation.nbytes
            os.close(allocation.descriptor)


def fail_at(vmm: FakeVmm, call: str, turn: int) -> Callable[[], None]:
    """Have the `turn`-th call from now on fail, counted from 0, and no other; returns what undoes that."""
    original, left = getattr(vmm, call), turn

    def counted(*arguments: int, **more: bool) -> object:
        nonlocal left
        left -= 1
        if left == -1:
            raise CudaError(call, "CUDA_ERROR_UNKNOWN", "made to fail")
        return original(*arguments, **more)

    setattr(vmm, call, counted)
    return lambda: delattr(vmm, call)


def bytes_at(address: int, nbytes: int) -> bytes:
    """What a mapped range holds."""
    return ctypes.string_at(address, nbytes)
