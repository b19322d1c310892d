"""Both transports of device memory on simulated CUDA: mapping, life of memory, and what is refused with which words."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.cuda_pair import KINDS, LIMIT_S, SIZE, Pair, one_line, with_payload
from tests.unit.cuda_rank import process_id, transport_of
from tests.unit.fake_cuda import GIB
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DOCTOR, DwdpError, PeerLost
from vllm_dwdp.platform import CUDA
from vllm_dwdp.transport.base import Copy, Handle
from vllm_dwdp.transport.cuda_memory import BLOCK
from vllm_dwdp.transport.process import ProcessId, is_gone, this_process


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.close()


def test_a_slab_is_zeroed_and_seen_by_the_peer(pair: Pair) -> None:
    slab = pair.owner.allocate_slab(SIZE)
    assert slab.nbytes == SIZE and slab.address % 256 == 0 and not slab.tensor().any()
    handle = Handle.from_dict(json.loads(json.dumps(pair.owner.export_handle(slab).to_dict())))
    assert (handle.transport, handle.device, handle.nbytes) == (pair.kind, "cuda:GPU-0000-uuid", SIZE)
    slab.tensor()[7] = 9
    peer = pair.reader.map_peer(handle)
    assert peer.tensor().shape == (SIZE,) and peer.tensor()[7] == 9
    slab.tensor()[8] = 5
    assert peer.tensor()[8] == 5
    pair.reader.unmap_peer(peer)
    pair.reader.unmap_peer(peer)
    assert not pair.opened()
    with pytest.raises(DwdpError, match="let go of"):
        peer.tensor()
    pair.owner.close()
    pair.owner.close()
    assert not pair.held()
    with pytest.raises(DwdpError, match="only a live slab"):
        pair.owner.export_handle(slab)


def test_memory_lives_as_long_as_its_tensors(pair: Pair) -> None:
    slab = pair.owner.allocate_slab(SIZE)
    peer = pair.reader.map_peer(pair.owner.export_handle(slab))
    view, peer_view = slab.tensor()[3:], peer.tensor()
    pair.reader.close()
    assert pair.opened()
    del peer_view
    assert not pair.opened()
    pair.owner.close()
    assert pair.held()
    del view
    assert not pair.held()


def test_close_unmaps_before_it_frees(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    order: list[bool] = []
    vmm = pair.kind == "vmm"
    device: Any = pair.theirs.vmm if vmm else pair.theirs
    for name in ("unmap",) if vmm else ("free", "ipc_close"):
        original: Callable[..., None] = getattr(device, name)

        def noted(address: int, *more: int, name: str = name, original: Callable[..., None] = original) -> None:
            order.append(device.mappings[address].imported if vmm else name == "ipc_close")
            original(address, *more)

        monkeypatch.setattr(device, name, noted)
    pair.reader.allocate_slab(SIZE)
    pair.reader.map_peer(pair.handle())
    pair.reader.allocate_slot(SIZE)
    pair.reader.close()
    assert order == [True, False, False]


def test_too_little_memory_is_refused_beforehand(pair: Pair) -> None:
    pair.machine.total = 2 * GIB
    before = pair.mine.calls[pair.calls.get]
    for allocate in (pair.owner.allocate_slab, pair.owner.allocate_slot):
        with pytest.raises(DwdpError, match=r"needs 3.00 GiB but GPU 0 has 2.00 of 2.00 GiB free: free memory"):
            allocate(3 * GIB)
        with pytest.raises(DwdpError, match="must have at least one"):
            allocate(0)
    assert pair.mine.calls[pair.calls.get] == before
    pair.mine.fail[pair.calls.get] = pair.calls.out_of_memory
    with pytest.raises(DwdpError, match=rf"0.00 GiB but GPU 0 .* GiB free \({pair.calls.out_of_memory}\)"):
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
    twin = transport_of(pair.kind, pair.theirs, process=process_id(0)._replace(namespace="another container"))
    twin.unmap_peer(twin.map_peer(handle))


def test_no_peer_access_names_both_devices(pair: Pair) -> None:
    pair.machine.unreachable.add((1, 0))
    text = one_line(pair.reader, pair.handle())
    assert "GPU 1 (Fake H200, GPU-0001-uuid) has no peer access to GPU 0 (Fake H200, GPU-0000-uuid)" in text
    assert "it reaches GPUs: 2:" in text and not pair.theirs.calls[pair.calls.open] and text.endswith(DOCTOR)
    pair.machine.unreachable.add((1, 2))
    assert "it reaches GPUs: none:" in one_line(pair.reader, pair.handle())


def test_ranks_of_one_device_need_no_peer_access(pair: Pair) -> None:
    pair.machine.unreachable.add((0, 0))
    third = pair.transport(pair.machine.process(0))
    third.unmap_peer(third.map_peer(pair.handle()))


def test_devices_go_by_uuid(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = pair.handle()
    # The reader sees the devices in another order: its own is number 1 there, the owner's number 2.
    infos = [replace(pair.machine.infos[i], index=n) for n, i in enumerate((2, 1, 0))]
    monkeypatch.setattr(pair.theirs, "devices", lambda: tuple(infos))
    asked: list[int] = []
    monkeypatch.setattr(pair.theirs, "can_access_peer", lambda index: not asked.append(index))
    reader = pair.transport(pair.theirs)
    reader.unmap_peer(reader.map_peer(handle))
    assert asked == [2]
    monkeypatch.setattr(pair.theirs, "devices", lambda: tuple(infos[:2]))
    text = one_line(pair.transport(pair.theirs), handle)
    assert "GPU-0000-uuid is not among the 2 visible here (GPU-0002-uuid, GPU-0001-uuid)" in text


def test_handles_of_elsewhere_are_refused(pair: Pair) -> None:
    handle = pair.handle()
    other_host = replace(handle, host="faraway|0123456789")
    assert "slab of host faraway (boot 01234567) cannot be mapped on" in one_line(pair.reader, other_host)
    assert "is version 12040 but this one 13000" in one_line(pair.reader, with_payload(handle, driver=12040))
    assert f"transport 'shm' reached {pair.kind}" in one_line(pair.reader, replace(handle, transport="shm"))
    # Containers of one host may have names of their own.
    other_name = replace(handle, host="container|" + handle.host.rpartition("|")[2])
    pair.reader.unmap_peer(pair.reader.map_peer(other_name))


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
    # Its process is gone, the memory is not.
    block = pair.mine.blocks.pop(slab.address, None)
    if block is None:
        pair.owner.close()
    engine.finish(engine.submit(engine.bind([Copy(slot.address, peer.address, SIZE)])), LIMIT_S)
    assert (slot.tensor() == 7).all()
    engine.close(LIMIT_S)
    pair.reader.close()
    if block is not None:
        pair.mine.blocks[slab.address] = block


def test_what_peers_write_is_seen(pair: Pair) -> None:
    slab = pair.owner.allocate_slab(SIZE)
    pair.reader.map_writable(pair.owner.export_handle(slab)).tensor()[5] = 8
    assert slab.tensor()[5] == 8


STEPS = [("cupy_ipc", step) for step in ("malloc", "zero", "ipc_open", "make_stream", "make_event", "begin_capture")]
STEPS += [("vmm", step) for step in ("zero", "make_stream")]


@pytest.mark.parametrize(("kind", "step"), STEPS)
def test_a_failed_start_leaves_nothing(kind: str, step: str) -> None:
    pair = Pair(kind)
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
    pair.close()


def test_ranks_that_are_servers_of_their_own_do_not_ask_for_pages() -> None:
    """They have no composite view, and one of them may be dead."""
    pytest.importorskip("vllm")
    from vllm_dwdp.layers.transports import page_of_group

    apart: Any = SimpleNamespace(apart=object(), platform=CUDA, config=DwdpConfig())
    assert page_of_group(apart, SimpleNamespace(gather=lambda *_: pytest.fail("asked")), [0, 1]) is None  # type: ignore[arg-type]
