"""Environment of a launch: for its own processes, not for others that the program starts.

What engines and workers read travels with the config and is set in them (`enter_engine`). What vLLM reads in the front end
while it starts them is set there from the config on, and taken away when they have been started
(patches/engine_processes.py). One value stays for API servers, under the id of the process that set it.
"""

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


def own_ipc_folder(owner: object) -> dict[str, str]:
    """Send socket files of this launch into a folder that is removed with it; one that the user chose is left alone.

    Returns what engines need for it.
    """
    if is_users(IPC_FOLDER):
        return {}
    folder = tempfile.mkdtemp(prefix=FOLDER_PREFIX)
    set_for_start(owner, IPC_FOLDER, folder)
    weakref.finalize(owner, _remove, folder, os.getpid())
    return {IPC_FOLDER: folder}


def is_own_folder(folder: str) -> bool:
    """Whether a launch made `folder`, and may remove it."""
    return os.path.basename(folder).startswith(FOLDER_PREFIX)


def _remove(folder: str, creator: int) -> None:
    # A forked child has this finalizer too.
    if os.getpid() == creator:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def temporary_files_in_ipc_folder() -> Iterator[None]:
    """Have `tempfile` of this process use a launch's own folder: vLLM's file stores outlive killed workers."""
    before, folder = tempfile.tempdir, os.environ.get(IPC_FOLDER, "")
    tempfile.tempdir = folder if is_own_folder(folder) and os.path.isdir(folder) else before
    try:
        yield
    finally:
        tempfile.tempdir = before
