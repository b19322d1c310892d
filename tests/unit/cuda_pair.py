"""An owner and a reader over simulated CUDA, by either transport of device memory."""

import gc
from dataclasses import replace
from typing import NamedTuple

import pytest

from tests.unit.cuda_rank import process_id, transport_of
from tests.unit.fake_cuda import FakeCuda, Machine
from tests.unit.fake_vmm import open_descriptors
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.cuda_peers import CudaTransport

SIZE = 5000
LIMIT_S = 30.0


class Calls(NamedTuple):
    """What a transport calls to get memory, to open a peer's, and to let go of each; out_of_memory: CUDA's code."""

    get: str
    open: str
    out_of_memory: str


CALLS = {
    "cupy_ipc": Calls("malloc", "ipc_open", "cudaErrorMemoryAllocation"),
    "vmm": Calls("create", "import_descriptor", "CUDA_ERROR_OUT_OF_MEMORY"),
}
KINDS = tuple(CALLS)


class Pair:
    """On devices 0 and 1 of three."""

    def __init__(self, kind: str) -> None:
        self.kind, self.calls = kind, CALLS[kind]
        self.machine = Machine(num_devices=3)
        self.mine, self.theirs = self.machine.process(0), self.machine.process(1)
        self.owner, self.reader = self.transport(self.mine), self.transport(self.theirs)

    def transport(self, device: FakeCuda, number: int | None = None) -> CudaTransport:
        """Of a process of its own."""
        return transport_of(self.kind, device, process=process_id(device.number if number is None else number))

    def handle(self) -> Handle:
        """Of a new slab of the owner."""
        return self.owner.export_handle(self.owner.allocate_slab(SIZE))

    def held(self) -> int:
        """Allocations that the owner holds."""
        return len(self.mine.blocks) + len(self.mine.vmm.mappings)

    def opened(self) -> int:
        """Peers' allocations that the reader has mapped."""
        return len(self.theirs.mapped) + sum(mapped.imported for mapped in self.theirs.vmm.mappings.values())

    def close(self) -> None:
        """Twice each, and look for what is left."""
        for transport in (self.reader, self.owner):
            transport.close()
            transport.close()
        gc.collect()
        assert self.mine.clean() and self.theirs.clean()
        assert self.machine.used == [0, 0, 0] and self.machine.freed_while_mapped == 0
        assert not self.machine.allocations and not open_descriptors()


def with_payload(handle: Handle, **changes: object) -> Handle:
    """Other words of the transport."""
    return replace(handle, payload=handle.payload | changes)


def one_line(transport: CudaTransport, handle: Handle, kind: type[DwdpError] = DwdpError) -> str:
    """What mapping `handle` is refused with."""
    with pytest.raises(DwdpError) as caught:
        transport.map_peer(handle)
    assert type(caught.value) is kind and "\n" not in str(caught.value) and ": " in str(caught.value)
    return str(caught.value)
