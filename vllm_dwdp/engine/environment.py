"""Environment of a launch: set before engines are started, inherited by them, gone with the launch."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator

#: Where vLLM puts the socket files of a launch; by default the temporary folder, and it does not remove them.
IPC_FOLDER = "VLLM_RPC_BASE_PATH"

FOLDER_PREFIX = "dwdp-"

#: The longest path of a Unix socket, and what is added to the prefix: `mkdtemp`'s part, then vLLM's "/" and a UUID.
_SOCKET_PATH_BYTES = 107
_RANDOM_BYTES = 8
_NAME_BYTES = 1 + 36


class Setting:
    """One value that a launch set; compared by identity, since two launches may set the same."""

    def __init__(self, value: str) -> None:
        self.value = value


_ours: dict[str, Setting] = {}


def is_users(name: str, default: str | None = None) -> bool:
    """Whether the user, and not a launch of this process, set `name` to something other than `default`."""
    value, ours = os.environ.get(name), _ours.get(name)
    return value is not None and value != default and (ours is None or ours.value != value)


def set_for_launch(owner: object, name: str, value: str) -> None:
    """Set `name` until `owner` (the front end's config) is gone, or this process."""
    setting = _ours[name] = Setting(value)
    os.environ[name] = value
    weakref.finalize(owner, _unset, name, setting)


def _unset(name: str, setting: Setting) -> None:
    # A later launch may have set its own, and the user too.
    if _ours.get(name) is setting:
        del _ours[name]
        if os.environ.get(name) == setting.value:
            del os.environ[name]


def forget_launches() -> None:
    """Take away what launches set, before an engine without dwdp is started from this process."""
    for name, setting in list(_ours.items()):
        _unset(name, setting)


def _new_folder() -> str | None:
    """A new folder of this user alone in which the paths of vLLM's sockets fit; None where there is no place for one,
    and vLLM's own way is no worse."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(os.path.join(parent, FOLDER_PREFIX))) + _RANDOM_BYTES + _NAME_BYTES <= _SOCKET_PATH_BYTES:
            with contextlib.suppress(OSError):
                return tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent)
    return None


def own_ipc_folder(owner: object) -> None:
    """Send socket files of this launch into a folder that is removed with it; one that the user chose is left alone."""
    if is_users(IPC_FOLDER):
        return
    folder = _new_folder()
    if folder is None:
        return
    set_for_launch(owner, IPC_FOLDER, folder)
    weakref.finalize(owner, shutil.rmtree, folder, True)


@contextlib.contextmanager
def temporary_files_in_ipc_folder() -> Iterator[None]:
    """Have `tempfile` of this process use that folder: vLLM's file stores outlive killed workers."""
    before, folder = tempfile.tempdir, os.environ.get(IPC_FOLDER)
    tempfile.tempdir = folder if folder and os.path.isdir(folder) else before
    try:
        yield
    finally:
        tempfile.tempdir = before
