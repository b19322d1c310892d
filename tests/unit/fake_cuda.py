"""CUDA in host memory: several devices and processes in one, with streams, events, captures and graphs.

Stream work runs only when the machine is stepped, one piece at a time, each time from a stream picked at random among
those that may go on: whatever order CUDA could choose, a seed chooses, so that a missing wait shows as wrong bytes. Times
are those of the streams alone (a wait moves a stream to the time it waited for), whatever the order of execution.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch

from tests.unit.fake_streams import FakeStreams, Piece, Scheduler
from tests.unit.fake_vmm import Allocation, FakeVmm
from vllm_dwdp.transport.cuda_device import CudaError, DeviceInfo, DeviceMemory

GIB = 1 << 30
RATE = 1e9  # bytes per second of a copy


@dataclass(eq=False)
class Block:
    """An allocation; other processes see it at addresses of their own."""

    real: int
    nbytes: int
    keeps: object
    mapped: int = 0


class Machine(Scheduler):
    """A host with `num_devices` devices."""

    def __init__(self, seed: int = 0, num_devices: int = 1, total: int = 80 * GIB) -> None:
        super().__init__(seed)
        self.infos = tuple(DeviceInfo(i, f"GPU-{i:04d}-uuid", "Fake H200") for i in range(num_devices))
        self.used = [0] * num_devices
        self.total = total
        self.exports: dict[bytes, Block] = {}
        self.allocations: dict[int, Allocation] = {}  # by the inode of their memory file
        self.unreachable: set[tuple[int, int]] = set()
        self.driver = 13000
        self.freed_while_mapped = 0

    def process(self, index: int = 0) -> "FakeCuda":
        made = FakeCuda(self, index, len(self.processes))
        self.processes.append(made)
        return made


class FakeCuda(FakeStreams):
    """One process's view of one device."""

    machine: Machine

    def __init__(self, machine: Machine, index: int, number: int) -> None:
        super().__init__(machine)
        self.index, self.number = index, number
        self.blocks: dict[int, Block] = {}  # by the address this process sees
        self.mapped: dict[int, Block] = {}
        self.pinned: dict[int, int] = {}
        self.cached = 0  # bytes torch keeps
        self.vmm = FakeVmm(self)
        self._maps = iter(range((1 << 46) + (number << 40), 1 << 60, 1 << 32))

    def clean(self) -> bool:
        """Whether nothing of CUDA is left in this process."""
        left = self.blocks or self.mapped or self.pinned or self.events or self.graphs
        return not left and len(self.streams) == 1 and self.vmm.clean()

    # CudaDevice

    def devices(self) -> tuple[DeviceInfo, ...]:
        return self.machine.infos

    def driver_version(self) -> int:
        return self.machine.driver

    def can_access_peer(self, peer: int) -> bool:
        return (self.index, peer) not in self.machine.unreachable

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self.machine.total - self.machine.used[self.index] - self.cached, self.machine.total)

    def empty_cache(self) -> None:
        self.cached = 0

    def malloc(self, nbytes: int) -> int:
        self._call("malloc", forbidden_in_capture=True)
        buffer = np.empty(nbytes + 256, np.uint8)
        buffer[: 1 << 16] = 0xEE  # never zero by chance
        address = buffer.ctypes.data + -buffer.ctypes.data % 256
        self.blocks[address] = Block(address, nbytes, buffer)
        self.machine.used[self.index] += nbytes
        return address

    def free(self, address: int) -> None:
        self._call("free")
        block = self.blocks.pop(address)
        self.machine.used[self.index] -= block.nbytes
        self.machine.freed_while_mapped += block.mapped
        self.machine.exports = {key: value for key, value in self.machine.exports.items() if value is not block}

    def zero(self, address: int, nbytes: int) -> None:
        self._call("zero")
        ctypes.memset(self.real(address, nbytes), 0, nbytes)

    def tensor(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        buffer = (ctypes.c_ubyte * nbytes).from_address(self.real(address, nbytes))
        buffer.owner = owner  # type: ignore[attr-defined]
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def local_tensor(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        return self.tensor(address, nbytes, owner)

    def ipc_handle(self, address: int) -> bytes:
        self._call("ipc_handle")
        handle = f"{self.number}:{address}".encode().ljust(64, b"\0")
        self.machine.exports[handle] = self.blocks[address]
        return handle

    def ipc_open(self, handle: bytes) -> int:
        self._call("ipc_open")
        if handle not in self.machine.exports:
            raise CudaError("ipc_open", "cudaErrorInvalidValue", "made up")
        block = self.machine.exports[handle]
        block.mapped += 1
        address = next(self._maps)
        self.mapped[address] = block
        return address

    def ipc_close(self, address: int) -> None:
        self._call("ipc_close")
        self.mapped.pop(address).mapped -= 1

    def host_register(self, address: int, nbytes: int) -> None:
        self._call("host_register")
        self.pinned[address] = nbytes

    def host_unregister(self, address: int) -> None:
        self._call("host_unregister")
        del self.pinned[address]

    def copy_async(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        self._call("copy_async")
        half = nbytes // 2
        pieces = [self._mover(dst, src, half), self._mover(dst + half, src + half, nbytes - half)]
        self._give(stream, pieces, nbytes / RATE)

    def real(self, address: int, nbytes: int) -> int:
        """The host memory behind an address of this process; an access outside of live memory is an error."""
        for base, block in (*self.blocks.items(), *self.mapped.items()):
            if base <= address and address + nbytes <= base + block.nbytes:
                return block.real + address - base
        for base, size in self.pinned.items():
            if base <= address and address + nbytes <= base + size:
                return address
        if self.vmm.covers(address, nbytes):
            return address
        raise AssertionError(f"illegal address {address:#x}, {nbytes} bytes")

    def _mover(self, dst: int, src: int, nbytes: int) -> Piece:
        return lambda: ctypes.memmove(self.real(dst, nbytes), self.real(src, nbytes), nbytes) and None
