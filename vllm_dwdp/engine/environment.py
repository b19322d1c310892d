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

_ours: dict[str, str] = {}


def is_users(name: str, default: str | None = None) -> bool:
    """Whether the user, and not a launch of this process, set `name` to something other than `default`."""
    value = os.environ.get(name)
    return value is not None and value != default and _ours.get(name) != value


def set_for_launch(owner: object, name: str, value: str) -> None:
    """Set `name` until `owner` (the front end's config) is gone, or this process."""
    _ours[name] = os.environ[name] = value
    weakref.finalize(owner, _unset, name, value)


def _unset(name: str, value: str) -> None:
    # A later launch may have set its own.
    if os.environ.get(name) == value:
        del os.environ[name]
        _ours.pop(name, None)


def own_ipc_folder(owner: object) -> None:
    """Send socket files of this launch into a folder that is removed with it; one that the user chose is left alone."""
    if is_users(IPC_FOLDER):
        return
    folder = tempfile.mkdtemp(prefix=FOLDER_PREFIX)
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
