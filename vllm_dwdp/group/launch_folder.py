"""The folder of one launch, through which its processes meet: only this user can list, read or write it, nobody has to
answer for it, and it goes with the front end.

Whoever opens it checks whose it is, and from then on works with what was opened, not with the path.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
import weakref
from typing import Any, ClassVar

from vllm_dwdp.errors import DwdpError, PeerLost
from vllm_dwdp.group.environment import FOLDER_PREFIX, fits_sockets
from vllm_dwdp.transport.process import ProcessId, is_gone, this_process

_FRONT_END = "front-end.json"
_MODE = 0o700
#: Where the user's temporary folder does not do.
_OTHER_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
#: Removing races with ranks that write a message: none begins to once the front end's file is gone.
_REMOVALS = 10
_REMOVAL_PAUSE_S = 0.01
_REMEDY = "set TMPDIR to a folder on a local file system with owners and permissions, and run all ranks as one user"
_FREE_SPACE = "free space there, or set TMPDIR to a folder that has some"
_REMEDIES = {
    errno.EMFILE: "raise ulimit -n",
    errno.ENFILE: "raise fs.file-max",
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "raise ulimit -f",
}


class PrivateFolder:
    """An open folder that only this user can list, read or write; `fd` is its descriptor.

    Raises:
        PeerLost: the folder is gone.
        DwdpError: it is no directory, of another user, or open to others.
    """

    #: What it is called, and what helps where it cannot be had.
    called: ClassVar[str] = "the launch's folder"
    remedy: ClassVar[str] = _REMEDY

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = _open_private(path, self.called, self.remedy)
        # Not at the end of the program, where other finalizers, and threads that they end, still read in it.
        weakref.finalize(self, os.close, self.fd).atexit = False

    def write(self, name: str, value: Any) -> None:
        """Put a JSON-able value, not None, into the file `name` as a whole; raises DwdpError where that fails."""
        try:
            _write(self.fd, name, value)
        except OSError as error:
            raise self.failed(f"writing {name}", error) from error

    def failed(self, what: str, error: OSError) -> DwdpError:
        """What to raise where doing `what` in this folder failed."""
        return _failed(f"{what} in {self.path}", error, self.remedy)

    def read(self, name: str) -> Any | None:
        """The value in the file `name`; None where there is none."""
        try:
            # Not blocking: opening what is no file must not hang.
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.failed(f"reading {name}", error) from error
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                raise DwdpError(
                    f"{name} in {self.path} is no file of user {os.geteuid()} (mode {found.st_mode:o}, user "
                    f"{found.st_uid}): run all ranks as one user"
                )
            with open(fd, "rb", closefd=False) as file:
                return json.loads(file.read())
        except ValueError as error:
            raise DwdpError(
                f"{name} in {self.path} cannot be read ({error}), as after a loss of power: end all ranks "
                "and remove the folder"
            ) from error
        finally:
            os.close(fd)


class LaunchFolder(PrivateFolder):
    """An open folder of a launch; `front_end` is the process that made it. Raises as PrivateFolder."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        raw = self.read(_FRONT_END)
        if raw is None:
            raise _gone(path)
        self.front_end = ProcessId(*raw)

    def write(self, name: str, value: Any) -> None:
        """See PrivateFolder; raises PeerLost where the front end is gone."""
        if self.is_abandoned():
            raise _gone(self.path)
        try:
            super().write(name, value)
        except DwdpError:
            if self.is_abandoned():
                raise _gone(self.path) from None
            raise

    def is_abandoned(self) -> bool:
        """Whether the front end is gone, or has removed the folder."""
        try:
            os.stat(_FRONT_END, dir_fd=self.fd)
        except OSError:
            return True
        return is_gone(self.front_end)


def make_folder(owner: object) -> str:
    """Make the folder of a launch, which goes with `owner` (the front end's config): in the temporary folder, or in another
    place where sockets do not fit there, or it cannot be made there.

    Raises DwdpError where no place has space, owners and permissions.
    """
    all_places = dict.fromkeys([tempfile.gettempdir(), *_OTHER_PLACES])
    for place in all_places:
        for path in glob.glob(os.path.join(glob.escape(place), FOLDER_PREFIX + "*")):
            remove_orphaned(path)  # of launches of which every process was killed
    places = sorted(all_places, key=lambda place: not fits_sockets(_longest(place)))
    first: DwdpError | None = None
    for place in places:
        try:
            path = _make_in(place)
        except DwdpError as error:
            first = first or error
            continue
        weakref.finalize(owner, _remove_own, path, os.getpid())
        return path
    assert first is not None
    raise first


def _longest(place: str) -> str:
    return os.path.join(place, FOLDER_PREFIX + 8 * "x")  # `mkdtemp` adds as much


def _make_in(place: str) -> str:
    try:
        path = tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=place)
    except OSError as error:
        raise _failed("making a folder for the ranks to meet in", error) from error
    try:
        fd = _open_private(path, LaunchFolder.called, _REMEDY)
        try:
            _write(fd, _FRONT_END, this_process())
        finally:
            os.close(fd)
    except (OSError, DwdpError) as error:
        remove_folder(path)
        if isinstance(error, OSError):
            raise _failed(f"writing {_FRONT_END} in {path}", error) from error
        raise
    return path


def remove_folder(path: str) -> None:
    """Remove the folder and all messages; quiet where it is gone."""
    for _ in range(_REMOVALS):
        shutil.rmtree(path, ignore_errors=True)
        if not os.path.lexists(path):
            return
        time.sleep(_REMOVAL_PAUSE_S)


def remove_orphaned(path: str) -> None:
    """Remove the folder of a front end that was killed; leaves every other alone, and never raises."""
    with contextlib.suppress(DwdpError, OSError):
        if is_gone(LaunchFolder(path).front_end):
            remove_folder(path)


def _remove_own(path: str, pid: int) -> None:
    # A forked child has the finalizers of its parent.
    if os.getpid() == pid:
        remove_folder(path)


def _open_private(path: str, called: str, remedy: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise _gone(path) from error
    except OSError as error:
        raise _failed(f"opening {called} {path}", error, remedy) from error
    found = os.fstat(fd)
    # The group's set-id bit is inherited and opens nothing.
    if found.st_uid == os.geteuid() and found.st_mode & 0o777 == _MODE:
        return fd
    os.close(fd)
    raise DwdpError(
        f"{path} belongs to user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}, not to user {os.geteuid()} "
        f"with mode {_MODE:04o}: {remedy}"
    )


def _gone(path: str) -> PeerLost:
    return PeerLost(f"the folder {path} of this launch is gone: its front end has ended; look at its log")


def _failed(what: str, error: OSError, usual: str = _REMEDY) -> DwdpError:
    remedy = _REMEDIES.get(error.errno or 0, usual)
    return DwdpError(f"{what} failed for user {os.geteuid()} ({error.strerror}): {remedy}")


def _write(folder: int, name: str, value: Any) -> None:
    temporary = f".{name}-{secrets.token_hex(4)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        with open(fd, "wb") as file:
            file.write(json.dumps(value).encode())
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
