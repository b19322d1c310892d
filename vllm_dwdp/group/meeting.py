"""The folder in which ranks meet that are servers of their own, and who holds which position there.

Nobody has to answer for the folder, so that there is nothing to restart. Whoever holds a position holds a lock that the
kernel takes away with the process, however it ends: byte L of the position's file is locked by its life L. So one question
to the kernel tells whether a position is held, by which process and in which life. Lives are counted up with every start.

The locks are those of POSIX, which go with their process and can be asked for without being taken. A process loses its own
by closing any descriptor of the file: nobody opens the file of a position that it holds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from vllm_dwdp.errors import DwdpError, DwdpTimeout, PeerLost
from vllm_dwdp.group.launch_folder import PrivateFolder
from vllm_dwdp.transport.memfd import Host, this_host

#: struct flock of 64-bit Linux: type, whence, start, length, process.
_FLOCK: Final = "hhqqi4x"
_HOST: Final = "host"
_DOOR: Final = "door.lock"
_PAUSE_S: Final = 0.05
_LEAVE_S: Final = 2.0
_REMEDY: Final = (
    "set dwdp.meet, the same for all ranks, to a folder on a local file system with owners and permissions, and run all "
    "ranks as one user"
)


class Holder(NamedTuple):
    """Who holds a position: its process, and which of the lives of that position it is."""

    pid: int
    life: int


def meeting_place(group: str, meet: str | None) -> str:
    """The path of the folder of a group of this user: in `meet`, in XDG_RUNTIME_DIR, or in /tmp."""
    place = meet or os.environ.get("XDG_RUNTIME_DIR") or ""
    if meet is None and not os.path.isdir(place):
        # Not TMPDIR, which two servers may have set differently.
        place = "/tmp"
    return os.path.join(place, f"dwdp-group-{os.geteuid()}-{group}")


class Meeting(PrivateFolder):
    """The open folder of a group; made where there is none.

    Raises DwdpError where it cannot be made, or is not this user's alone; everything here, where a file cannot be
    opened or locked.
    """

    called = "the group's folder"
    remedy = _REMEDY

    def __init__(self, path: str) -> None:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
        except OSError as error:
            raise DwdpError(f"making {path} for a group to meet in failed ({error.strerror}): {_REMEDY}") from error
        super().__init__(path)
        self._held: dict[int, tuple[int, Holder]] = {}

    def join(self, rank: int, timeout_s: float) -> int:
        """Hold the position `rank` for as long as this process lives, and forget what its earlier lives have said.

        Returns the number of this life. Raises DwdpError where another process holds it, and as `check_host`; DwdpTimeout.
        """
        with self._door(timeout_s):
            self.check_host()
            if (holder := self.holder(rank)) is not None:
                raise _taken(rank, holder, self.path)
            # systemd-tmpfiles, which tidies /tmp up, leaves a folder alone that somebody has locked.
            with contextlib.suppress(OSError):
                fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            life = int(self.read(_life_file(rank)) or 0) + 1
            self.write(_life_file(rank), life)
            fd = self._create(_lock_file(rank))
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, life)
            except OSError as error:
                os.close(fd)
                raise self.failed(f"locking {_lock_file(rank)}", error) from error
            self._held[rank] = fd, Holder(os.getpid(), life)
            for name in os.listdir(self.fd):
                if name.startswith(f"{rank}.") and name != _lock_file(rank):
                    os.unlink(name, dir_fd=self.fd)
            self.say(rank, _HOST, this_host())
        return life

    def check_host(self) -> None:
        """Raise DwdpError where a rank is there that runs on another machine, or in another PID namespace: a folder can be
        shared with it, memory cannot.
        """
        here = this_host()
        for rank in self.positions():
            if (told := self.said(rank, _HOST)) is None or here.reaches(there := Host(*told)):
                continue
            where = f"rank {rank} of the group in {self.path} runs"
            if here.is_machine_of(there):
                raise DwdpError(
                    f"{where} in PID namespace {there.pid_namespace}, this server in {here.pid_namespace}: run all ranks "
                    "of a group in one container, or share its PID namespace"
                )
            raise DwdpError(
                f"{where} on {there.machine}, this server on {here.machine}: ranks of a group share memory of one machine; "
                "start all of them on one, and let those of another have another dwdp.group, or dwdp.meet"
            )

    def last_host(self, rank: int) -> Host | None:
        """Where the last life of `rank` ran, be it that nobody holds the position as far as locks tell."""
        told = self.read(_message(rank, int(self.read(_life_file(rank)) or 0), _HOST))
        return None if told is None else Host(*told)

    def holder(self, rank: int) -> Holder | None:
        """Who holds the position `rank`; None where nobody does."""
        if rank in self._held:
            return self._held[rank][1]
        if (fd := self._open(_lock_file(rank))) is None:
            return None
        try:
            return _locked_by(fd)
        except OSError as error:
            raise self.failed(f"asking who has locked {_lock_file(rank)}", error) from error
        finally:
            os.close(fd)

    def positions(self) -> list[int]:
        """All that somebody has held in this folder, be it that nobody does now, ascending."""
        try:
            names = os.listdir(self.fd)
        except OSError as error:
            raise self.failed("listing files", error) from error
        stems = [name.removesuffix(".lock") for name in names if name.endswith(".lock")]
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def say(self, rank: int, name: str, value: Any) -> None:
        """Publish a JSON-able value of a position that this process holds."""
        self.write(_message(rank, self._held[rank][1].life, name), value)

    def unsay(self, rank: int, name: str) -> None:
        """Take back what this process has said; never raises, since the folder may be gone."""
        with contextlib.suppress(OSError):
            os.unlink(_message(rank, self._held[rank][1].life, name), dir_fd=self.fd)

    def said(self, rank: int, name: str) -> Any | None:
        """What the holder of `rank` has said under `name` in this life; None where it has not, or nobody holds it."""
        holder = self.holder(rank)
        return None if holder is None else self.read(_message(rank, holder.life, name))

    def leave(self) -> None:
        """Let go of what this process holds; the last one takes the folder with it. Idempotent, and never raises."""
        with contextlib.suppress(OSError, DwdpError), self._door(_LEAVE_S):
            while self._held:
                fd, _ = self._held.popitem()[1]
                os.close(fd)
            if all(self.holder(rank) is None for rank in self.positions()):
                # The door goes last: whoever waited at it sees that, and where this process is killed before, what is
                # left is a folder that the next start uses.
                for name in [*(name for name in os.listdir(self.fd) if name != _DOOR), _DOOR]:
                    os.unlink(name, dir_fd=self.fd)
                os.rmdir(self.path)

    def check_there(self) -> None:
        """Raise PeerLost where the folder was removed: whoever comes then meets elsewhere."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self.fd)):
                return
        raise self._removed()

    def _open(self, name: str, flags: int = 0) -> int | None:
        try:
            return os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.failed(f"opening {name}", error) from error

    def _create(self, name: str) -> int:
        if (fd := self._open(name, os.O_CREAT)) is None:
            raise self._removed()
        return fd

    def _removed(self) -> PeerLost:
        return PeerLost(
            f"{self.path} was removed, so that no rank that comes finds this one: start it again, with dwdp.meet in a "
            "folder that stays"
        )

    def _is_door(self, fd: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(_DOOR, dir_fd=self.fd), os.fstat(fd))
        return False

    @contextlib.contextmanager
    def _door(self, timeout_s: float) -> Iterator[None]:
        """Nobody else joins or leaves meanwhile; raises DwdpTimeout, PeerLost where the folder was removed."""
        deadline = time.monotonic() + timeout_s
        fd = self._create(_DOOR)
        try:
            while True:
                try:
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EAGAIN):
                        raise self.failed(f"locking {_DOOR}", error) from error
                if time.monotonic() > deadline:
                    who = f"process {holder.pid}" if (holder := _locked_by(fd)) else "another process"
                    raise DwdpTimeout(f"{who} has kept {_DOOR} in {self.path} for {timeout_s:g} s: end it")
                time.sleep(_PAUSE_S)
            self.check_there()
            if not self._is_door(fd):
                raise self._removed()
            yield
        finally:
            os.close(fd)


def join(path: str, rank: int, timeout_s: float) -> tuple[Meeting, int]:
    """The group's folder, and the life in which this process holds the position `rank` there; raises as Meeting does.

    The last one that leaves may take the folder along just then: the next is made.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            meeting = Meeting(path)
            return meeting, meeting.join(rank, timeout_s)
        except PeerLost:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_S)


def check_free(path: str, rank: int, wait_s: float) -> None:
    """Raise DwdpError where a process goes on holding a position for `wait_s`, since it may just be ending.

    To be asked before a server starts anything; whoever joins then has the last word. Makes no folder, and raises DwdpError
    where none could be made either; and as `Meeting.check_host`.
    """
    deadline, place = time.monotonic() + wait_s, os.path.dirname(path)
    if not os.path.lexists(path) and not os.access(place, os.W_OK | os.X_OK):
        why = "may not write there" if os.path.isdir(place) else "finds no such folder"
        raise DwdpError(f"a group cannot meet in {place}: user {os.geteuid()} {why}; {_REMEDY}")
    if os.path.lexists(path):
        Meeting(path).check_host()
    while os.path.lexists(path) and (holder := Meeting(path).holder(rank)) is not None:
        if time.monotonic() > deadline:
            raise _taken(rank, holder, path)
        time.sleep(_PAUSE_S)


def _locked_by(fd: int) -> Holder | None:
    """Which other process has locked the file, and from which byte on."""
    found = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    kind, _, first, _, pid = struct.unpack(_FLOCK, found)
    return None if kind == fcntl.F_UNLCK else Holder(pid, first)


def _taken(rank: int, holder: Holder, path: str) -> DwdpError:
    return DwdpError(
        f"rank {rank} of the group in {path} is process {holder.pid} (life {holder.life}), which is there, be it stopped: "
        "end it first, or give this server another rank"
    )


def _lock_file(rank: int) -> str:
    return f"{rank}.lock"


def _life_file(rank: int) -> str:
    return f"{rank}-life.json"


def _message(rank: int, life: int, name: str) -> str:
    return f"{rank}.{life}-{name}.json"
