"""Memory files that a rank does not map: of another user, or such that somebody could cut or change them."""

import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.helpers import PAGE
from vllm_dwdp.errors import DwdpError, PeerLost
from vllm_dwdp.transport import memfd
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.memfd import this_host
from vllm_dwdp.transport.shm import ShmTransport

F_SEAL_FUTURE_WRITE = 0x10


def changed(handle: Handle, **payload: object) -> Handle:
    return dataclasses.replace(handle, payload=handle.payload | payload)


def offer(nbytes: int, *seals: int) -> tuple[int, Handle]:
    """A memory file of this process with `seals`, and a handle that describes it truly; the caller closes it."""
    fd = os.memfd_create("dwdp-offer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    for seal in seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    payload = {"pid": os.getpid(), "fd": fd, "inode": os.fstat(fd).st_ino, "token": "dwdp-offer"}
    return fd, Handle("shm", "|".join(this_host()), "cpu", nbytes, payload)


@pytest.mark.parametrize(
    ("seals", "missing"),
    [
        ((), "shrink, grow, future-write"),
        ((fcntl.F_SEAL_GROW, F_SEAL_FUTURE_WRITE), "shrink"),
        ((fcntl.F_SEAL_SHRINK, F_SEAL_FUTURE_WRITE), "grow"),
        ((fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW), "future-write"),
    ],
)
def test_memory_that_others_could_cut_or_change_is_refused(
    transport: ShmTransport, seals: tuple[int, ...], missing: str
) -> None:
    """A reader of a file that is cut dies of SIGBUS."""
    fd, handle = offer(PAGE, *seals)
    try:
        with pytest.raises(
            DwdpError, match=rf"descriptor {fd} offers memory without the seals {missing}, which .*run "
        ):
            transport.map_peer(handle)
    finally:
        os.close(fd)


def test_memory_that_all_ranks_write_needs_no_seal_against_it() -> None:
    for writable in (True, False):
        fd, handle = offer(PAGE, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW)
        try:
            if writable:
                os.close(memfd.open_file(handle, writable))
            else:
                with pytest.raises(DwdpError, match="seals future-write"):
                    memfd.open_file(handle, writable)
        finally:
            os.close(fd)


def test_a_kernel_without_that_seal_needs_none(transport: ShmTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    fd, handle = offer(PAGE, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW)
    assert memfd._kernel_seals_future_writes()
    monkeypatch.setattr(memfd, "_kernel_seals_future_writes", lambda: False)
    transport.unmap_peer(transport.map_peer(handle))
    os.close(fd)


def test_what_is_no_memory_file_is_refused(transport: ShmTransport, tmp_path: Path) -> None:
    path = tmp_path / "dwdp-offer"
    path.write_bytes(bytes(PAGE))
    fd, handle = offer(PAGE)
    with path.open("rb") as file:
        os.dup2(file.fileno(), fd)
    try:
        with pytest.raises(DwdpError, match="without the seals shrink, grow, future-write"):
            transport.map_peer(changed(handle, inode=path.stat().st_ino))
    finally:
        os.close(fd)


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENFILE, "raise fs.file-max"), (errno.EMFILE, "raise ulimit -n")])
def test_an_owner_is_not_blamed_for_what_this_machine_lacks(
    transport: ShmTransport, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    handle = transport.export_handle(transport.allocate_slab(PAGE))

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        DwdpError, match=rf"opening the memory of process \d+.*{os.strerror(number)}.*: {remedy}"
    ) as caught:
        memfd.open_file(handle)
    assert not isinstance(caught.value, PeerLost), "which would be waited for"


def test_memory_of_another_user_is_refused(transport: ShmTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = transport.export_handle(transport.allocate_slab(PAGE))
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(DwdpError, match=rf"memory of user {me} to a rank of user {me + 1}: run all ranks as one user"):
        transport.map_peer(handle)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, and open any user's memory")
def test_root_does_not_map_what_another_user_forged(transport: ShmTransport) -> None:
    """Sealed, of the right size and under the right token, as somebody could who has read a handle."""
    code = """
import fcntl, json, os, sys
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
fd = os.memfd_create("dwdp-" + sys.argv[1], os.MFD_ALLOW_SEALING)
os.pwrite(fd, bytes(int(sys.argv[2])), 0)
for seal in (fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, 16):
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
print(json.dumps({"pid": os.getpid(), "fd": fd, "inode": os.fstat(fd).st_ino}), flush=True)
sys.stdin.read()
"""
    handle = transport.export_handle(transport.allocate_slab(PAGE))
    token = handle.payload["token"]
    command = [sys.executable, "-c", code, token, str(PAGE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        forged = changed(handle, **json.loads(other.stdout.readline()))
        with pytest.raises(
            DwdpError, match=rf"process {other.pid}, .* offers memory of user 65534 to a rank of user 0"
        ):
            transport.map_peer(forged)
        other.kill()
