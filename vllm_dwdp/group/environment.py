"""Environment of a launch: for its own processes, not for others that the program starts.

What engines and workers read travels with the config and is set in them (`enter_engine`). What vLLM reads in the front end
while it starts them is set there from the config on, and taken away when they have been started
(patches/engine_start.py). One value stays for API servers, under the id of the process that set it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Iterator

#: Where vLLM puts the socket files of a launch; by default the temporary folder, and it does not remove them.
IPC_FOLDER = "VLLM_RPC_BASE_PATH"

FOLDER_PREFIX = "dwdp-"

#: The longest path of a Unix socket, and what vLLM adds to a folder: "/" and a UUID.
_SOCKET_PATH_BYTES = 107
_NAME_BYTES = 1 + 36


class Setting:
    """One value that a launch set; compared by identity, since two launches may set the same."""

    def __init__(self, value: str, owner: object, until_started: bool) -> None:
        self.value = value
        self.owner = weakref.ref(owner)
        self.until_started = until_started


_ours: dict[str, Setting] = {}


def is_users(name: str, default: str | None = None) -> bool:
    """Whether the user, and not a launch of this process, set `name` to something other than `default`."""
    value, ours = os.environ.get(name), _ours.get(name)
    return value is not None and value != default and (ours is None or ours.value != value)


def set_for_start(owner: object, name: str, value: str) -> None:
    """Set `name` until the processes of the launch of `owner` (the front end's config) are started, or it is gone."""
    _set(owner, name, value, until_started=True)


def set_for_children(owner: object, name: str, value: str) -> None:
    """Set `name` until `owner` is gone, for children that vLLM starts; `of_parent` reads it there, and nowhere else."""
    _set(owner, name, f"{os.getpid()}:{value}", until_started=False)


def of_parent(name: str, parent: int) -> str | None:
    """What the process `parent` set with `set_for_children`; None where it did not."""
    pid, _, value = os.environ.get(name, "").partition(":")
    return value if pid == str(parent) else None


def _set(owner: object, name: str, value: str, until_started: bool) -> None:
    setting = _ours[name] = Setting(value, owner, until_started)
    os.environ[name] = value
    weakref.finalize(owner, _unset, name, setting)


def _unset(name: str, setting: Setting) -> None:
    # A later launch may have set its own, and the user too.
    if _ours.get(name) is setting:
        del _ours[name]
        if os.environ.get(name) == setting.value:
            del os.environ[name]


def started(owner: object) -> None:
    """Take away what was set for the start of the launch of `owner`: its processes run."""
    for name, setting in list(_ours.items()):
        if setting.until_started and setting.owner() is owner:
            _unset(name, setting)


def forget_launches() -> None:
    """Take away what launches set, before an engine without dwdp is started from this process."""
    for name, setting in list(_ours.items()):
        _unset(name, setting)


def sockets_in(folder: str, owner: object) -> dict[str, str]:
    """Send socket files of the launch of `owner` into its `folder`, which is removed with it; a place that the user chose is
    left alone, and vLLM's own stays where paths in the folder would be too long.

    Returns what engines need for it.
    """
    if is_users(IPC_FOLDER) or not fits_sockets(folder):
        return {}
    set_for_start(owner, IPC_FOLDER, folder)
    return {IPC_FOLDER: folder}


def fits_sockets(folder: str) -> bool:
    """Whether the paths of vLLM's sockets in `folder` are short enough for the system."""
    return len(os.fsencode(folder)) + _NAME_BYTES <= _SOCKET_PATH_BYTES


@contextlib.contextmanager
def temporary_files_in(folder: str) -> Iterator[None]:
    """Have `tempfile` of this process use `folder` of a launch: vLLM's file stores outlive killed workers."""
    before = tempfile.tempdir
    tempfile.tempdir = folder if os.path.isdir(folder) else before
    try:
        yield
    finally:
        tempfile.tempdir = before
