"""Slabs in pinned host memory, on simulated CUDA."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.fake_cuda import FakeCuda, Machine
from tests.unit.helpers import LIMIT_S
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.base import Copy, Handle
from vllm_dwdp.transport.cuda_pinned import PinnedTransport
from vllm_dwdp.transport.shm import ShmTransport

SIZE = 5000
Processes = tuple[FakeCuda, FakeCuda]


@pytest.fixture
def processes() -> Iterator[Processes]:
    """An owner's and a reader's, on devices 0 and 1."""
    machine = Machine(num_devices=2)
    mine, theirs = machine.process(0), machine.process(1)
    yield mine, theirs
    gc.collect()
    assert mine.clean() and theirs.clean() and machine.used == [0, 0]


def test_pinned_slabs_reach_the_device(processes: Processes) -> None:
    mine, theirs = processes
    owner, reader = PinnedTransport(mine), PinnedTransport(theirs)
    slab = owner.allocate_slab(SIZE)
    slab.tensor().random_()
    peer, slot = reader.map_peer(owner.export_handle(slab)), reader.allocate_slot(SIZE)
    assert len(mine.pinned) == len(theirs.pinned) == 1 and peer.address != slab.address
    engine = reader.copy_engine()
    engine.finish(engine.submit(engine.bind([Copy(slot.address, peer.address, SIZE)])), LIMIT_S)
    assert (slot.tensor() == slab.tensor()).all()
    engine.close(LIMIT_S)
    reader.unmap_peer(peer)
    assert not theirs.pinned
    owner.close()
    with pytest.raises(DwdpError, match="only a live slab"):
        owner.export_handle(slab)
    with pytest.raises(DwdpError, match="transport 'shm' reached cuda_pinned"):
        reader.map_peer(Handle("shm", "", "cpu", 1, {}))
    mine.fail["host_register"] = "cudaErrorMemoryAllocation"
    with pytest.raises(DwdpError, match=r"pinning 5000 bytes failed \(cudaErrorMemoryAllocation\): raise ulimit -l"):
        owner.allocate_slab(SIZE)
    reader.close()
    owner.close()


def test_pinned_slabs_are_writable_and_those_of_shm_still_are_not(
    processes: Processes, transport: ShmTransport
) -> None:
    mine, theirs = processes
    owner, reader = PinnedTransport(mine), PinnedTransport(theirs)
    slab = owner.allocate_slab(SIZE)
    reader.map_peer(owner.export_handle(slab)).tensor()[0] = 3
    assert slab.tensor()[0] == 3
    reader.close()
    owner.close()
    peers = transport.map_peer(transport.export_handle(transport.allocate_slab(SIZE)))
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(f"{peers.address:x}-")]
    assert [line.split()[1] for line in maps] == ["r--s"]
