"""The CUDA IPC transport on simulated CUDA: mapping, life of memory, and what is refused with which words."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.cuda_rank import process_id
from tests.unit.fake_cuda import GIB, Machine
from vllm_dwdp.errors import DOCTOR, DwdpError, PeerLost
from vllm_dwdp.transport.base import Copy, Handle
from vllm_dwdp.transport.cuda_memory import BLOCK
from vllm_dwdp.transport.cupy_ipc import CupyIpcTransport
from vllm_dwdp.transport.process import ProcessId, is_gone, this_process

SIZE = 5000
LIMIT_S = 30.0


class Pair:
    """An owner and a reader, on devices 0 and 1 of three."""

    def __init__(self) -> None:
        self.machine = Machine(num_devices=3)
        self.mine, self.theirs = self.machine.process(0), self.machine.process(1)
        self.owner = CupyIpcTransport(self.mine, process=process_id(0))
        self.reader = CupyIpcTransport(self.theirs, process=process_id(1))

    def handle(self) -> Handle:
        return self.owner.export_handle(self.owner.allocate_slab(SIZE))


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    for transport in (made.reader, made.owner):
        transport.close()
        transport.close()
    gc.collect()
    assert made.mine.clean() and made.theirs.clean()
    assert made.machine.used == [0, 0, 0] and made.machine.freed_while_mapped == 0


def with_payload(handle: Handle, **changes: object) -> Handle:
    return replace(handle, payload=handle.payload | changes)


def one_line(transport: CupyIpcTransport, handle: Handle, kind: type[DwdpError] = DwdpError) -> str:
    """What mapping `handle` is refused with."""
    with pytest.raises(DwdpError) as caught:
        transport.map_peer(handle)
    assert type(caught.value) is kind and "\n" not in str(caught.value) and ": " in str(caught.value)
    return str(caught.value)


def test_a_slab_is_zeroed_and_seen_by_the_peer(pair: Pair) -> None:
    slab = pair.owner.allocate_slab(SIZE)
    assert slab.nbytes == SIZE and slab.address % 256 == 0 and not slab.tensor().any()
    handle = Handle.from_dict(json.loads(json.dumps(pair.owner.export_handle(slab).to_dict())))
    assert (handle.transport, handle.device, handle.nbytes) == ("cupy_ipc", "cuda:GPU-0000-uuid", SIZE)
    slab.tensor()[7] = 9
    peer = pair.reader.map_peer(handle)
    assert peer.tensor().shape == (SIZE,) and peer.tensor()[7] == 9
    slab.tensor()[8] = 5
    assert peer.tensor()[8] == 5
    pair.reader.unmap_peer(peer)
    pair.reader.unmap_peer(peer)
    assert not pair.theirs.mapped
    with pytest.raises(DwdpError, match="let go of"):
        peer.tensor()
    pair.owner.close()
    pair.owner.close()
    assert not pair.mine.blocks
    with pytest.raises(DwdpError, match="only a live slab"):
        pair.owner.export_handle(slab)


def test_memory_lives_as_long_as_its_tensors(pair: Pair) -> None:
    slab = pair.owner.allocate_slab(SIZE)
    peer = pair.reader.map_peer(pair.owner.export_handle(slab))
    view, peer_view = slab.tensor()[3:], peer.tensor()
    pair.reader.close()
    assert pair.theirs.mapped
    del peer_view
    assert not pair.theirs.mapped
    pair.owner.close()
    assert pair.mine.blocks
    del view
    assert not pair.mine.blocks


def test_slabs_share_no_block(pair: Pair) -> None:
    pair.owner.allocate_slab(1)
    pair.owner.allocate_slab(BLOCK + 1)
    assert pair.machine.used[0] == 3 * BLOCK


def test_close_unmaps_before_it_frees(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    order: list[str] = []
    for name in ("free", "ipc_close"):
        original: Callable[[int], None] = getattr(pair.theirs, name)
        monkeypatch.setattr(
            pair.theirs, name, lambda address, name=name, original=original: (order.append(name), original(address))
        )
    pair.reader.allocate_slab(SIZE)
    pair.reader.map_peer(pair.handle())
    pair.reader.allocate_slot(SIZE)
    pair.reader.close()
    assert order == ["ipc_close", "free", "free"]


def test_too_little_memory_is_refused_beforehand(pair: Pair) -> None:
    pair.machine.total = 2 * GIB
    for allocate in (pair.owner.allocate_slab, pair.owner.allocate_slot):
        with pytest.raises(DwdpError, match=r"needs 3.00 GiB but GPU 0 has 2.00 of 2.00 GiB free: free memory"):
            allocate(3 * GIB)
        with pytest.raises(DwdpError, match="must have at least one"):
            allocate(0)
    assert not pair.mine.calls["malloc"]
    pair.mine.fail["malloc"] = "cudaErrorMemoryAllocation"
    with pytest.raises(DwdpError, match=r"0.00 GiB but GPU 0 .* GiB free \(cudaErrorMemoryAllocation\)"):
        pair.owner.allocate_slab(SIZE)


def test_memory_that_torch_keeps_is_asked_back(pair: Pair) -> None:
    pair.machine.total = pair.mine.cached = 4 * BLOCK
    pair.owner.allocate_slab(BLOCK)
    assert pair.mine.cached == 0


def test_a_failure_after_malloc_frees(pair: Pair) -> None:
    pair.mine.fail["zero"] = "cudaErrorLaunchFailure"
    with pytest.raises(DwdpError, match="cudaErrorLaunchFailure"):
        pair.owner.allocate_slab(SIZE)


def test_the_same_process_is_told_by_its_pid(pair: Pair) -> None:
    handle = pair.handle()
    assert "slab of this very process (1000)" in one_line(pair.owner, handle)
    twin = CupyIpcTransport(pair.theirs, process=process_id(0)._replace(namespace="another container"))
    twin.unmap_peer(twin.map_peer(handle))


def test_no_peer_access_names_both_devices(pair: Pair) -> None:
    pair.machine.unreachable.add((1, 0))
    text = one_line(pair.reader, pair.handle())
    assert "GPU 1 (Fake H200, GPU-0001-uuid) has no peer access to GPU 0 (Fake H200, GPU-0000-uuid)" in text
    assert "it reaches GPUs: 2:" in text and not pair.theirs.calls["ipc_open"] and text.endswith(DOCTOR)
    pair.machine.unreachable.add((1, 2))
    assert "it reaches GPUs: none:" in one_line(pair.reader, pair.handle())


def test_ranks_of_one_device_need_no_peer_access(pair: Pair) -> None:
    pair.machine.unreachable.add((0, 0))
    third = CupyIpcTransport(pair.machine.process(0), process=process_id(2))
    third.unmap_peer(third.map_peer(pair.handle()))


def test_devices_go_by_uuid(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = pair.handle()
    # The reader sees the devices in another order: its own is number 1 there, the owner's number 2.
    infos = [replace(pair.machine.infos[i], index=n) for n, i in enumerate((2, 1, 0))]
    monkeypatch.setattr(pair.theirs, "devices", lambda: tuple(infos))
    asked: list[int] = []
    monkeypatch.setattr(pair.theirs, "can_access_peer", lambda index: not asked.append(index))
    reader = CupyIpcTransport(pair.theirs, process=process_id(1))
    reader.unmap_peer(reader.map_peer(handle))
    assert asked == [2]
    monkeypatch.setattr(pair.theirs, "devices", lambda: tuple(infos[:2]))
    text = one_line(CupyIpcTransport(pair.theirs, process=process_id(1)), handle)
    assert "GPU-0000-uuid is not among the 2 visible here (GPU-0002-uuid, GPU-0001-uuid)" in text


def test_handles_of_elsewhere_are_refused(pair: Pair) -> None:
    handle = pair.handle()
    other_host = replace(handle, host="faraway|0123456789")
    assert "slab of host faraway (boot 01234567) cannot be mapped on" in one_line(pair.reader, other_host)
    assert "is version 12040 but this one 13000" in one_line(pair.reader, with_payload(handle, driver=12040))
    assert "transport 'shm' reached cupy_ipc" in one_line(pair.reader, replace(handle, transport="shm"))
    # Containers of one host may have names of their own.
    other_name = replace(handle, host="container|" + handle.host.rpartition("|")[2])
    pair.reader.unmap_peer(pair.reader.map_peer(other_name))


def test_what_cuda_refuses_says_what_to_enable(pair: Pair) -> None:
    handle = pair.handle()
    pair.theirs.fail["ipc_open"] = "cudaErrorMapBufferObjectFailed"
    text = one_line(pair.reader, handle)
    for word in ("5000 bytes", "process 1000", "--ipc=host", "--pid=host", "MIG", "cudaErrorMapBufferObjectFailed"):
        assert word in text
    assert text.endswith(DOCTOR)
    pair.mine.fail["ipc_handle"] = "cudaErrorNotSupported"
    with pytest.raises(
        DwdpError, match=r"GPU 0 .* gives no IPC handle \(cudaErrorNotSupported\).* run `vllm-dwdp doctor`$"
    ):
        pair.handle()


def test_a_gone_owner_is_told(pair: Pair) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stat = Path(f"/proc/{gone.pid}/stat").read_text().rpartition(")")[2].split()
    process = ProcessId(gone.pid, int(stat[19]), this_process().namespace)
    handle = with_payload(pair.handle(), process=process._asdict())
    assert not is_gone(process) and is_gone(process._replace(started=process.started - 1))
    pair.reader.unmap_peer(pair.reader.map_peer(handle))
    gone.kill()
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(process), "a zombie counts as gone"
    assert f"(process {gone.pid}) is gone" in one_line(pair.reader, handle, PeerLost)
    gone.communicate()
    assert is_gone(process) and not is_gone(process._replace(namespace="elsewhere"))


def test_this_process_is_not_gone() -> None:
    assert not is_gone(this_process()) and this_process().pid == os.getpid()


def test_a_killed_owner_leaves_readers_right(pair: Pair) -> None:
    slab = pair.owner.allocate_slab(SIZE)
    slab.tensor().fill_(7)
    peer, slot = pair.reader.map_peer(pair.owner.export_handle(slab)), pair.reader.allocate_slot(SIZE)
    engine = pair.reader.copy_engine()
    block = pair.mine.blocks.pop(slab.address)  # its process is gone, the memory is not
    engine.finish(engine.submit(engine.bind([Copy(slot.address, peer.address, SIZE)])), LIMIT_S)
    assert (slot.tensor() == 7).all()
    engine.close(LIMIT_S)
    pair.reader.close()
    pair.mine.blocks[slab.address] = block


@pytest.mark.parametrize("step", ["malloc", "zero", "ipc_open", "make_stream", "make_event", "begin_capture"])
def test_a_failed_start_leaves_nothing(step: str) -> None:
    pair = Pair()
    handle = pair.handle()
    pair.theirs.fail[step] = "cudaErrorUnknown"
    engine = None
    try:
        slot = pair.reader.allocate_slot(SIZE)
        peer = pair.reader.map_peer(handle)
        engine = pair.reader.copy_engine()
        engine.submit(engine.bind([Copy(slot.address, peer.address, SIZE)]))
        raise AssertionError("nothing failed")
    except DwdpError as error:
        assert "cudaErrorUnknown" in str(error)
    if engine is not None:
        engine.close(LIMIT_S)
    pair.reader.close()
    del engine
    gc.collect()
    assert pair.theirs.clean()
    pair.owner.close()


def test_cupy_is_imported_only_when_a_device_is_opened() -> None:
    code = (
        "import sys, vllm_dwdp.transport.cupy_ipc, vllm_dwdp.transport.cuda_pinned, vllm_dwdp.prefetch.prefetcher\n"
        "assert not {'cupy', 'torch', 'vllm'} & set(sys.modules), sorted(sys.modules)\n"
        "sys.modules['cupy'] = None\n"
        "from vllm_dwdp.transport.cuda_cupy import CupyDevice\n"
        "CupyDevice(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    assert "DwdpError: CuPy cannot be imported" in done.stderr and "cuda13" in done.stderr and DOCTOR in done.stderr
