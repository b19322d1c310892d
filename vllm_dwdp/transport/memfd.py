"""Memory files that peers open by process id and descriptor number: nothing has a name that could leak, no socket
passes anything, and the last process that maps one frees it.

A process id can be reused, so a handle also carries the inode, the size and a random token that is part of the file's
label; a peer compares all three on what it opened. It maps only files of its own user that are sealed: nobody can cut
them under it, and nobody but the owner writes them.
"""

import errno
import fcntl
import mmap
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from vllm_dwdp.errors import DOCTOR, DwdpError, PeerLost
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.limits import require_descriptors, require_memory
from vllm_dwdp.transport.mapping import Mapping, map_file

TRANSPORT: Final = "shm"
_F_SEAL_FUTURE_WRITE: Final = 0x0010  # Linux 5.1; not in Python's fcntl
_MFD_NOEXEC_SEAL: Final = 0x0008  # Linux 6.3; not in Python's os. With vm.memfd_noexec=2 a file without it is refused
#: Descriptors that must be left when a file is made: the file, and what is read under /proc and /sys meanwhile.
_FILE_DESCRIPTORS: Final = 4
#: What refuses a descriptor whoever owns the file, and what helps.
_OWN_LIMITS: Final = {errno.EMFILE: "raise ulimit -n", errno.ENFILE: "raise fs.file-max"}
#: What helps where a file cannot be made.
_REMEDIES: Final = {
    **_OWN_LIMITS,
    errno.EFBIG: "raise ulimit -f",
    errno.ENOSYS: "dwdp's shm transport needs memfd_create, which this kernel or sandbox lacks",
    errno.EPERM: "let this process use memfd_create and seals (seccomp, security modules)",
    errno.EACCES: "let this process use memfd_create (vm.memfd_noexec, security modules)",
}


class Host(NamedTuple):
    """What two processes must share to open each other's memory files: all but the name, which containers may differ in."""

    name: str
    boot_id: str
    pid_namespace: str

    def is_machine_of(self, other: "Host") -> bool:
        """Whether one kernel runs both."""
        return self.boot_id == other.boot_id

    def reaches(self, other: "Host") -> bool:
        """Whether processes here see those there."""
        return self[1:] == other[1:]

    @property
    def machine(self) -> str:
        """For a message."""
        return f"{self.name} (boot {self.boot_id[:8]})"


@cache
def this_host() -> Host:
    """The host of this process; raises DwdpError without /proc."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return Host(socket.gethostname(), boot_id, os.readlink("/proc/self/ns/pid"))
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, f"dwdp's shm transport needs /proc mounted{DOCTOR}")
        raise DwdpError(f"cannot identify this host ({error}): {remedy}") from error


@dataclass
class MemoryFile:
    """A memory file that this process has open and mapped; `handle` is what peers need."""

    fd: int
    mapping: Mapping
    handle: Handle

    def close(self) -> None:
        """Withdraw the handle; the mapping stays as long as somebody holds it. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def create_file(nbytes: int, purpose: str, shared_writes: bool = False) -> MemoryFile:
    """A zeroed memory file of `nbytes` > 0 with all its pages allocated, of fixed size, writable by this mapping only, or
    with `shared_writes` by every process of this user.

    Raises DwdpError where memory does not suffice: without the check before and the allocation here the process would
    die of SIGBUS, or of the OOM killer, at the first touch.
    """
    if nbytes < 1:
        raise DwdpError(f"{purpose} of {nbytes} bytes: it must have at least one")
    require_descriptors(_FILE_DESCRIPTORS, purpose)
    require_memory(nbytes, purpose)
    token = secrets.token_hex(16)
    fd = -1
    try:
        fd = _new_file(f"dwdp-{token}")
        os.ftruncate(fd, nbytes)
        os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        mapping = map_file(fd, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, purpose)
        if not shared_writes:
            _seal_future_writes(fd)
        payload = {"pid": os.getpid(), "fd": fd, "inode": os.fstat(fd).st_ino, "token": token}
        handle = Handle(TRANSPORT, "|".join(this_host()), "cpu", nbytes, payload)
    except BaseException as error:
        if fd >= 0:
            os.close(fd)
        if not isinstance(error, OSError):
            raise
        remedy = _REMEDIES.get(error.errno or 0, "free memory or use more ranks")
        raise DwdpError(f"{purpose} of {nbytes} bytes failed ({error}): {remedy}") from error
    return MemoryFile(fd, mapping, handle)


def _new_file(name: str) -> int:
    """Descriptor of an empty memory file that can never be made executable, where the kernel can seal that."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)


def open_file(handle: Handle, writable: bool = False) -> int:
    """Open a peer's memory file, read-only unless `writable`; returns a descriptor, which the caller closes.

    Raises PeerLost where the owner is gone or no longer offers it, DwdpError for another host, missing permission, too many
    open files, a file of another user or one without seals.
    """
    require_descriptors(1, "a peer's memory file")
    _check_host(handle)
    payload = handle.words(pid=int, fd=int, inode=int, token=str)
    pid, number = payload["pid"], payload["fd"]
    owner = f"process {pid}, descriptor {number}"
    try:
        # Not blocking: should the number stand for something else by now, a pipe say, opening it must not hang.
        access = os.O_RDWR if writable else os.O_RDONLY
        fd = os.open(f"/proc/{pid}/fd/{number}", access | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise DwdpError(
            f"no permission to open the memory of {owner}: run all ranks as one user, in one PID namespace, not "
            f"setuid{DOCTOR}"
        ) from error
    except OSError as error:
        if error.errno in _OWN_LIMITS:
            raise DwdpError(f"opening the memory of {owner} failed ({error}): {_OWN_LIMITS[error.errno]}") from error
        alive = os.path.exists(f"/proc/{pid}")
        reason = "has freed it or is ending" if alive else "is gone"
        raise PeerLost(f"the owner of a slab ({owner}) {reason} ({error.strerror}): look at that rank's log") from error
    try:
        stat, label = os.fstat(fd), os.readlink(f"/proc/self/fd/{fd}")
        if (stat.st_ino, stat.st_size) != (payload["inode"], handle.nbytes) or payload["token"] not in label:
            raise PeerLost(
                f"{owner} is now inode {stat.st_ino} of {stat.st_size} bytes, not inode {payload['inode']} of "
                f"{handle.nbytes}: the owner is gone and its number reused; look at that rank's log"
            )
        _check_trust(fd, stat.st_uid, owner, writable)
    except BaseException:
        os.close(fd)
        raise
    return fd


def map_handle(handle: Handle, purpose: str, writable: bool = False) -> Mapping:
    """Map a peer's memory file, read-only unless `writable`; raises as `open_file` does."""
    fd = open_file(handle, writable)
    try:
        return map_file(fd, handle.nbytes, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0), purpose)
    finally:
        os.close(fd)


def keep_file(handle: Handle, purpose: str) -> MemoryFile:
    """Map another process's memory file read-only and keep it open, so that others can have it from this process when that
    one is gone: the handle of what is returned names this process. Raises as `open_file` does.
    """
    fd = open_file(handle)
    try:
        mapping = map_file(fd, handle.nbytes, mmap.PROT_READ, purpose)
    except BaseException:
        os.close(fd)
        raise
    return MemoryFile(fd, mapping, replace(handle, payload={**handle.payload, "pid": os.getpid(), "fd": fd}))


def _check_host(handle: Handle) -> None:
    handle.check_transport(TRANSPORT)
    here, there = this_host(), Host(*handle.host.split("|"))
    if here.reaches(there):
        return
    if here.is_machine_of(there):
        raise DwdpError(
            f"a slab of PID namespace {there.pid_namespace} cannot be opened from {here.pid_namespace} on one host: "
            f"run all ranks of a group in one container, or share its PID namespace{DOCTOR}"
        )
    raise DwdpError(
        f"a slab of host {there.machine} cannot be opened on {here.machine}: "
        "shm joins ranks of one host only; choose dwdp.group_size so that a group fits on a host"
    )


def _check_trust(fd: int, uid: int, owner: str, writable: bool) -> None:
    """Raise DwdpError unless the file is of this user, of fixed size and, but for `writable` ones, read-only to others."""
    if uid != os.geteuid():
        raise DwdpError(
            f"{owner} offers memory of user {uid} to a rank of user {os.geteuid()}: run all ranks as one user"
        )
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # Not a memory file.
        seals = 0
    needed = {"shrink": fcntl.F_SEAL_SHRINK, "grow": fcntl.F_SEAL_GROW}
    if not writable and _kernel_seals_future_writes():
        needed["future-write"] = _F_SEAL_FUTURE_WRITE
    if missing := [name for name, seal in needed.items() if not seals & seal]:
        raise DwdpError(
            f"{owner} offers memory without the seals {', '.join(missing)}, which others could cut or change under its "
            "readers: run one vllm-dwdp on all ranks, and see what that process is"
        )


@cache
def _kernel_seals_future_writes() -> bool:
    try:
        fd = os.memfd_create("dwdp-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:  # Then it cannot be told: demand the seal.
        return True
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _seal_future_writes(fd: int) -> None:
    """From here on nobody, peers and this process alike, can map the file for writing or write to it."""
    with suppress(OSError):  # An older kernel: peers still open and map read-only.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
