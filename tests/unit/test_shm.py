"""The shm transport: who may see, write and outlive what, and what is left behind."""

import ctypes
import dataclasses
import gc
import json
import mmap
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

from tests.unit.owner import LIMIT_S, owner
from vllm_dwdp.errors import DwdpError, DwdpTimeout, PeerLost
from vllm_dwdp.transport import inplace
from vllm_dwdp.transport.base import Copy, Handle
from vllm_dwdp.transport.limits import available_memory, require_memory
from vllm_dwdp.transport.mapping import map_pages
from vllm_dwdp.transport.shm import ShmTransport, SlabRun
from vllm_dwdp.transport.shm_copy import FEW_COPIES, ShmCopyEngine, ShmEvent

PAGE = mmap.PAGESIZE


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def slab_maps() -> int:
    return sum("memfd:dwdp-" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture
def transport() -> Iterator[ShmTransport]:
    """A transport; the test fails if it leaves a descriptor or a mapping behind."""
    resource_tracker.ensure_running()  # multiprocessing's: it keeps a descriptor from the first spawn on
    gc.collect()
    before = descriptors(), slab_maps()
    made = ShmTransport(timeout_s=LIMIT_S)
    yield made
    made.close()
    made.close()
    gc.collect()
    assert (descriptors(), slab_maps()) == before


def changed(handle: Handle, **payload: object) -> Handle:
    return dataclasses.replace(handle, payload=json.dumps(json.loads(handle.payload) | payload).encode())


def dies_of_a_fault(code: str, *handles: Handle) -> bool:
    """Whether `code`, with the handles as `handles`, is ended by SIGSEGV in a process of its own."""
    head = f"import ctypes, pickle\nfrom vllm_dwdp.transport.shm import *\nhandles = pickle.loads({pickle.dumps(handles)!r})\n"
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, timeout=LIMIT_S, text=True)
    assert "before" in done.stdout, done.stderr
    return done.returncode == -11 and "after" not in done.stdout


# Slabs and peers


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_peer_reads_what_the_owner_writes(transport: ShmTransport, method: str) -> None:
    with owner((PAGE + 100, 7), method=method) as other:
        peer = transport.map_peer(other.handles[0])
        seen = peer.tensor()
        assert peer.nbytes == seen.numel() == PAGE + 100 and seen.dtype == torch.uint8
        assert seen.data_ptr() == peer.address
        assert bool((seen == 7).all())
        other.ask("set", 0, PAGE + 99, 9)
        assert seen[PAGE + 99] == 9
        transport.unmap_peer(peer)
        transport.unmap_peer(peer)


def test_no_rank_can_write_a_peers_weights(transport: ShmTransport) -> None:
    with owner((PAGE, 7)) as other:
        code = "peer = ShmTransport().map_peer(handles[0])\nprint('before', flush=True)\n"
        assert dies_of_a_fault(code + "ctypes.memset(peer.address, 1, 1)\nprint('after')", other.handles[0])
        # Nor can a process that goes around the transport.
        payload = json.loads(other.handles[0].payload)
        fd = os.open(f"/proc/{payload['pid']}/fd/{payload['fd']}", os.O_RDWR)
        try:
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(PermissionError):
                mmap.mmap(fd, PAGE)
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)
        assert other.ask("get", 0, 0) == 7


def test_a_mapping_outlives_its_owner(transport: ShmTransport) -> None:
    with owner((3 * PAGE, 7)) as other:
        peer = transport.map_peer(other.handles[0])
        other.process.kill()
        other.process.join(LIMIT_S)
        assert bool((peer.tensor() == 7).all())
        with pytest.raises(PeerLost, match=rf"process {other.process.pid}, descriptor \d+\) is gone"):
            transport.map_peer(other.handles[0])


def test_a_freed_slab_stays_with_those_who_mapped_it(transport: ShmTransport) -> None:
    with owner((PAGE, 7)) as other:
        peer = transport.map_peer(other.handles[0])
        other.ask("free", 0)
        with pytest.raises(PeerLost):
            transport.map_peer(other.handles[0])
        assert bool((peer.tensor() == 7).all())


def test_reused_numbers_are_noticed(transport: ShmTransport) -> None:
    slab = transport.allocate_slab(PAGE)
    handle = transport.export_handle(slab)
    for wrong in (changed(handle, inode=1), changed(handle, token="0" * 32), dataclasses.replace(handle, nbytes=1)):
        with pytest.raises(PeerLost, match="number reused"):
            transport.map_peer(wrong)
    read, write = os.pipe()  # opening its read end anew would block
    try:
        for fd in (read, write):
            with pytest.raises(PeerLost, match="number reused"):
                transport.map_peer(changed(handle, fd=fd))
    finally:
        os.close(read)
        os.close(write)


def test_other_hosts_namespaces_and_users_are_told_apart(
    transport: ShmTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = transport.export_handle(transport.allocate_slab(PAGE))
    name, boot, _ = handle.host.split("|")
    with pytest.raises(DwdpError, match="host elsewhere .* one host only"):
        transport.map_peer(dataclasses.replace(handle, host=f"elsewhere|{boot}|pid:[1]"))
    with pytest.raises(DwdpError, match=r"PID namespace pid:\[1\] .* one container"):
        transport.map_peer(dataclasses.replace(handle, host=f"{name}|{boot}|pid:[1]"))
    with pytest.raises(DwdpError, match="transport 'cupy_ipc'"):
        transport.map_peer(dataclasses.replace(handle, transport="cupy_ipc"))

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DwdpError, match="no permission .* one user"):
        transport.map_peer(handle)


def test_handles_travel(transport: ShmTransport) -> None:
    handle = transport.export_handle(transport.allocate_slab(100))
    assert pickle.loads(pickle.dumps(handle)) == handle
    assert Handle.from_dict(msgpack.unpackb(msgpack.packb(handle.to_dict()))) == handle
    assert handle.nbytes == 100 and handle.device == "cpu" and handle.transport == "shm"


def test_a_view_keeps_its_memory(transport: ShmTransport) -> None:
    slab = transport.allocate_slab(PAGE)
    view = slab.tensor().view(torch.bfloat16)[8:].view(4, -1)
    view.fill_(2.0)
    transport.free_slab(slab)
    transport.free_slab(slab)
    del slab
    gc.collect()
    assert slab_maps() == 1 and float(view.sum()) == 2.0 * view.numel()
    del view
    gc.collect()
    assert slab_maps() == 0


def test_memory_that_was_let_go_of_is_refused(transport: ShmTransport) -> None:
    slab, slot = transport.allocate_slab(PAGE), transport.allocate_slot(PAGE)
    transport.close()
    for use in (lambda: slab.address, lambda: slab.nbytes, slot.tensor, lambda: transport.export_handle(slab)):
        with pytest.raises(DwdpError):
            use()


def test_tensors_made_in_inference_mode_can_be_written_outside(transport: ShmTransport) -> None:
    with torch.inference_mode():
        view = transport.allocate_slot(PAGE).tensor()
    view.fill_(3)
    assert not view.is_inference()


# Limits


def test_memory_is_checked_before_it_is_touched(transport: ShmTransport) -> None:
    for allocate in (transport.allocate_slab, transport.allocate_slot):
        with pytest.raises(DwdpError, match=r"needs 1048576.00 GiB but .* leaves \d+\.\d\d GiB: raise"):
            allocate(1 << 50)
        with pytest.raises(DwdpError, match="0 bytes"):
            allocate(0)


def test_a_full_memory_is_an_error_and_not_a_signal(transport: ShmTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DwdpError, match=r"a slab of 4096 bytes failed .*No space left"):
        transport.allocate_slab(PAGE)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_least_limit_counts(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc, meminfo="MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_memory(proc, groups) == (8_192_000, "the host's available memory")
    write(proc / "self", cgroup="0::/a/b\n")
    write(groups / "a/b", memory__max="max\n", memory__current="10\n", memory__stat="inactive_file 5\n")
    assert available_memory(proc, groups).nbytes == 8_192_000
    write(groups / "a", memory__max="1000\n", memory__current="400\n", memory__stat="anon 1\ninactive_file 50\n")
    left = available_memory(proc, groups)
    assert left.nbytes == 650 and str(groups / "a") in left.limit
    write(proc / "self", cgroup="4:cpu,memory:/x\n")
    write(groups / "memory/x", memory__limit_in_bytes="700\n", memory__usage_in_bytes="800\n")
    assert available_memory(proc, groups).nbytes == 0
    # In a container the path is the host's: the root of the mount is what counts.
    write(proc / "self", cgroup="0::/not/there\n")
    write(groups, memory__max="300\n", memory__current="100\n")
    assert available_memory(proc, groups).nbytes == 200
    require_memory(1, "a test")
    with pytest.raises(DwdpError, match="no MemAvailable"):
        available_memory(tmp_path / "nothing", groups)


# In place


def test_pages_of_several_slabs_make_one_range(transport: ShmTransport) -> None:
    with owner((4 * PAGE, 7), (2 * PAGE, 8)) as other:
        own = transport.allocate_slab(3 * PAGE)
        own.tensor().fill_(9)
        first, second = (transport.map_peer(handle) for handle in other.handles)
        made = transport.map_runs(
            [
                SlabRun(own, PAGE, 0, 2 * PAGE),
                SlabRun(first, 3 * PAGE, 2 * PAGE, PAGE),
                SlabRun(second, 0, 3 * PAGE, PAGE + 10),
            ]
        )
        seen = made.tensor()
        assert made.nbytes == seen.numel() == 4 * PAGE + 10 and seen.data_ptr() == made.address
        own.tensor()[PAGE] = 1  # one memory, two addresses
        other.ask("set", 1, PAGE + 9, 2)
        for memory in (first, second):
            transport.unmap_peer(memory)
        transport.free_slab(own)
        other.process.kill()
        other.process.join(LIMIT_S)
        expected = torch.cat(
            [torch.full((n,), value, dtype=torch.uint8) for n, value in [(2 * PAGE, 9), (PAGE, 7), (PAGE + 10, 8)]]
        )
        expected[0], expected[-1] = 1, 2
        assert torch.equal(seen, expected)
        del seen
        made.close()
        made.close()


def test_an_in_place_range_is_read_only(transport: ShmTransport) -> None:
    handle = transport.export_handle(transport.allocate_slab(PAGE))
    code = (
        "t = ShmTransport()\nown = t.allocate_slab(4096)\npeer = t.map_peer(handles[0])\n"
        "made = t.map_runs([SlabRun(own, 0, 0, 4096), SlabRun(peer, 0, 4096, 4096)])\nprint('before', flush=True)\n"
    )
    for offset in (0, PAGE):
        assert dies_of_a_fault(code + f"ctypes.memset(made.address + {offset}, 1, 1)\nprint('after')", handle)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([], "without runs"),
        ([(0, 0, 100), (0, 100, 100)], "off the page size"),
        ([(10, 0, PAGE)], "off the page size"),
        ([(0, PAGE, PAGE)], f"offset {PAGE}, not 0"),
        ([(0, 0, PAGE), (0, 2 * PAGE, PAGE)], f"offset {2 * PAGE}, not {PAGE}"),
        ([(0, 0, 0)], "no bytes"),
        ([(PAGE, 0, 2 * PAGE)], f"ends at byte {3 * PAGE} of a slab of {2 * PAGE}"),
    ],
)
def test_runs_that_do_not_fit_are_refused(
    transport: ShmTransport, runs: list[tuple[int, int, int]], words: str
) -> None:
    slab = transport.allocate_slab(2 * PAGE)
    with pytest.raises(DwdpError, match=words):
        transport.map_runs([SlabRun(slab, *run) for run in runs])


def test_a_failing_map_leaves_nothing_mapped(transport: ShmTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    slab = transport.allocate_slab(2 * PAGE)
    mapped: list[int] = []

    def fail_at_the_second_run(*arguments: Any) -> int:
        if len(mapped) == 2:
            raise DwdpError("made to fail")
        mapped.append(map_pages(*arguments))
        return mapped[-1]

    monkeypatch.setattr(inplace, "map_pages", fail_at_the_second_run)
    failed = False
    try:
        transport.map_runs([SlabRun(slab, 0, 0, PAGE), SlabRun(slab, PAGE, PAGE, PAGE)])
    except DwdpError:
        failed = True
    gc.collect()
    assert failed and mapped[0] == mapped[1] and slab_maps() == 1


# The copy engine


@pytest.fixture
def start_engine() -> Iterator[Callable[..., ShmCopyEngine]]:
    engines: list[ShmCopyEngine] = []

    def start(**options: object) -> ShmCopyEngine:
        engines.append(ShmCopyEngine(**options))  # type: ignore[arg-type]
        return engines[-1]

    yield start
    for engine in engines:
        engine.close(LIMIT_S)
        engine.close(LIMIT_S)


@pytest.mark.parametrize("count", [1, FEW_COPIES, FEW_COPIES + 1, 40])
@pytest.mark.parametrize("odd", [0, 1, 8])
def test_copies_arrive(
    transport: ShmTransport, start_engine: Callable[..., ShmCopyEngine], count: int, odd: int
) -> None:
    size = 700_000 + odd  # more than one chunk of torch's
    source, slot = transport.allocate_slab(count * size), transport.allocate_slot(2 * count * size)
    source.tensor().random_()
    copies = [Copy(slot.address + 2 * i * size, source.address + i * size, size) for i in range(count)]
    engine = start_engine()
    with torch.inference_mode():  # as in a worker's start-up
        program = engine.bind(copies[:1], copies[1:])
    assert (program.pulled_bytes, program.local_bytes, program.copies) == (size, (count - 1) * size, count)
    assert (program.batch is None) == (count <= FEW_COPIES or odd % 16 != 0)
    event = engine.submit(program)
    engine.wait(event, LIMIT_S)
    assert engine.ready(event) and engine.wait(event, LIMIT_S) == 0.0
    span = event.span()
    assert span is not None and span.end_ns > span.begin_ns
    rows = slot.tensor().view(count, 2, size)
    assert torch.equal(rows[:, 0].flatten(), source.tensor()) and not rows[:, 1].any()


def test_neighbours_are_joined_and_order_is_kept(start_engine: Callable[..., ShmCopyEngine]) -> None:
    copies = [Copy(100, 1000, 10), Copy(110, 1010, 5), Copy(115, 2000, 5), Copy(120, 2005, 5), Copy(0, 2010, 1)]
    assert start_engine().bind(copies).moves == (Copy(100, 1000, 15), Copy(115, 2000, 10), Copy(0, 2010, 1))


def test_programs_and_slices_run_in_order(transport: ShmTransport, start_engine: Callable[..., ShmCopyEngine]) -> None:
    seen: list[Copy] = []
    engine = start_engine(before_copy=seen.append)
    slot = transport.allocate_slot(PAGE).address
    copies = [[Copy(slot + 10 * i + j, slot + 2000, 1) for j in range(10)] for i in range(20)]
    programs = [engine.bind(part) for part in copies]
    events = [engine.submit(program, engine.record()) for program in programs]
    engine.wait(events[-1], LIMIT_S)
    assert seen == [copy for part in copies for copy in part]
    assert all(engine.ready(event) for event in events)


def test_a_copy_waits_for_the_release_of_its_slot(
    transport: ShmTransport, start_engine: Callable[..., ShmCopyEngine]
) -> None:
    engine = start_engine()
    slot = transport.allocate_slot(PAGE)
    program = engine.bind([Copy(slot.address, slot.address + 100, 1)])
    slot.tensor()[100] = 5
    release = ShmEvent()
    event = engine.submit(program, release)
    with pytest.raises(DwdpTimeout, match=r"not done after 0.05 s"):
        engine.wait(event, 0.05)
    assert not engine.ready(event) and slot.tensor()[0] == 0
    with engine._ended:
        release.done = True
        engine._ended.notify_all()
    assert engine.wait(event, LIMIT_S) >= 0.0
    assert slot.tensor()[0] == 5


def test_errors_of_the_thread_reach_wait_and_the_thread_goes_on(
    transport: ShmTransport, start_engine: Callable[..., ShmCopyEngine]
) -> None:
    def fail(copy: Copy) -> None:
        if copy.nbytes == 13:
            raise RuntimeError("made to fail")

    engine = start_engine(before_copy=fail, timeout_s=0.05)
    slot = transport.allocate_slot(PAGE).address
    bad, good = engine.bind([Copy(slot, slot + 100, 13)]), engine.bind([Copy(slot, slot + 100, 14)])
    first, second, third = engine.submit(bad), engine.submit(good, ShmEvent()), engine.submit(good)
    with pytest.raises(DwdpError, match="failed: made to fail"):
        engine.wait(first, LIMIT_S)
    with pytest.raises(DwdpError, match="the release of a slot is not done after 0.05 s"):
        engine.wait(second, LIMIT_S)
    engine.wait(third, LIMIT_S)
    assert first.span() is None and engine.ready(first)


def test_closing_finishes_what_was_submitted(transport: ShmTransport) -> None:
    engine = transport.copy_engine()
    slot = transport.allocate_slot(PAGE)
    slot.tensor()[100] = 5
    program = engine.bind([Copy(slot.address, slot.address + 100, 1)])
    events = [engine.submit(program) for _ in range(50)]
    engine.close(LIMIT_S)
    assert all(engine.ready(event) for event in events) and slot.tensor()[0] == 5
    with pytest.raises(DwdpError, match="closed engine"):
        engine.submit(program)


def test_closing_has_a_time_limit(transport: ShmTransport) -> None:
    release = ShmEvent()
    engine = ShmCopyEngine(LIMIT_S)
    slot = transport.allocate_slot(PAGE).address
    engine.submit(engine.bind([Copy(slot, slot + 100, 1)]), release)
    with pytest.raises(DwdpTimeout, match="still running after 0.05 s"):
        engine.close(0.05)
    with engine._ended:
        release.done = True
        engine._ended.notify_all()
    engine.close(LIMIT_S)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; import vllm_dwdp.transport.shm, vllm_dwdp.prefetch.prefetcher, vllm_dwdp.config; "
        "print([name for name in ('torch', 'numpy', 'vllm', 'cupy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=LIMIT_S, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_slots_and_slabs_are_zeroed_and_aligned(transport: ShmTransport) -> None:
    for memory in (transport.allocate_slab(5000), transport.allocate_slot(5000)):
        assert memory.address % PAGE == 0 and memory.nbytes == 5000
        assert ctypes.string_at(memory.address, 5000) == bytes(5000)
