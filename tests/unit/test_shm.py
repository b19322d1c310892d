"""Slabs of shared memory: who may see, write and outlive what, and what is left behind."""

import ctypes
import dataclasses
import gc
import json
import mmap
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.helpers import LIMIT_S, PAGE, dies_of_a_fault, slab_maps
from tests.unit.owner import owner
from vllm_dwdp.errors import DwdpError, PeerLost
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.limits import available_memory, require_memory
from vllm_dwdp.transport.shm import ShmTransport


def changed(handle: Handle, **payload: object) -> Handle:
    return dataclasses.replace(handle, payload=handle.payload | payload)


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
        payload = other.handles[0].payload
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
        other.ask("free")
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
    name, boot, namespace = handle.host.split("|")
    with pytest.raises(DwdpError, match=r"host elsewhere \(boot 01234567\) .* one host only"):
        transport.map_peer(dataclasses.replace(handle, host=f"elsewhere|01234567-89|{namespace}"))
    # Containers have names of their own, and may share the namespace.
    transport.map_peer(dataclasses.replace(handle, host=f"elsewhere|{boot}|{namespace}"))
    with pytest.raises(DwdpError, match=r"PID namespace pid:\[1\] .* one container"):
        transport.map_peer(dataclasses.replace(handle, host=f"{name}|{boot}|pid:[1]"))
    with pytest.raises(DwdpError, match="transport 'cupy_ipc'"):
        transport.map_peer(dataclasses.replace(handle, transport="cupy_ipc"))

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DwdpError, match=r"no permission .* one user"):
        transport.map_peer(handle)


def test_handles_travel(transport: ShmTransport) -> None:
    handle = transport.export_handle(transport.allocate_slab(100))
    assert pickle.loads(pickle.dumps(handle)) == handle
    assert Handle.from_dict(json.loads(json.dumps(handle.to_dict()))) == handle
    assert handle.nbytes == 100 and handle.device == "cpu" and handle.transport == "shm"


@pytest.mark.parametrize(
    "change",
    [{"nbytes": "100"}, {"nbytes": True}, {"payload": "00"}, {"host": None}, {"transport": ["shm"]}, {"more": 1}],
)
def test_what_is_no_handle_is_refused(transport: ShmTransport, change: dict[str, object]) -> None:
    raw = transport.export_handle(transport.allocate_slab(100)).to_dict()
    del raw["device"]
    for wrong in ({**raw, "device": "cpu", **change}, raw, [raw], "two\nlines"):
        with pytest.raises(DwdpError, match=r"a peer's handle cannot be read \(.*\): run one vllm-dwdp") as caught:
            Handle.from_dict(wrong)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"pid": "1"}, {"pid": True}, {"pid": None}])
def test_a_payload_without_its_words_is_refused(transport: ShmTransport, change: dict[str, object]) -> None:
    handle = transport.export_handle(transport.allocate_slab(100))
    with pytest.raises(DwdpError, match=r"a peer's handle cannot be read \(.*\): run one vllm-dwdp"):
        transport.map_peer(changed(handle, **change))
    with pytest.raises(DwdpError, match="cannot be read"):
        transport.map_peer(dataclasses.replace(handle, payload={}))


def test_a_view_keeps_its_memory(transport: ShmTransport) -> None:
    before = slab_maps()  # other tests of this process may have left some
    slab = transport.allocate_slab(PAGE)
    view = slab.tensor().view(torch.bfloat16)[8:].view(4, -1)
    view.fill_(2.0)
    transport.close()
    transport.close()
    del slab
    gc.collect()
    assert slab_maps() == before + 1 and float(view.sum()) == 2.0 * view.numel()
    del view
    gc.collect()
    assert slab_maps() == before


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
    # All that the kernel would give back counts, and memory files do not: "file" has them, the lists of files have not.
    stat = "file 300\nshmem 200\ninactive_anon 200\ninactive_file 50\nactive_file 60\nslab_reclaimable 7\n"
    write(groups / "a", memory__stat=stat)
    assert available_memory(proc, groups).nbytes == 600 + 50 + 60 + 7
    write(proc / "self", cgroup="4:cpu,memory:/x\n")
    write(groups / "memory/x", memory__limit_in_bytes="700\n", memory__usage_in_bytes="800\n")
    assert available_memory(proc, groups).nbytes == 0
    stat = "inactive_file 999\ntotal_shmem 500\ntotal_inactive_file 150\ntotal_active_file 60\n"
    write(groups / "memory/x", memory__stat=stat)
    assert available_memory(proc, groups).nbytes == 700 - 800 + 150 + 60
    # In a container the path is the host's: the root of the mount is what counts.
    write(proc / "self", cgroup="0::/not/there\n")
    write(groups, memory__max="300\n", memory__current="100\n")
    assert available_memory(proc, groups).nbytes == 200
    require_memory(1, "a test")
    with pytest.raises(DwdpError, match="no MemAvailable"):
        available_memory(tmp_path / "nothing", groups)


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
