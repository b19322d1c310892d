"""No process of a launch outlives the one that started it, even where that is killed and can say nothing.

vLLM's engines and its coordinator go on for ever when their front end is killed.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

from vllm_dwdp.engine.environment import FOLDER_PREFIX, IPC_FOLDER
from vllm_dwdp.engine.launch import RENDEZVOUS_ENV
from vllm_dwdp.engine.launch_folder import remove_orphaned

_PERIOD_S = 0.5
#: Time for a process to end by itself after SIGTERM.
_GRACE_S = 5.0


def started_by_multiprocessing() -> bool:
    """Whether this is a child process of Python's multiprocessing, also while it is still being unpickled."""
    inheriting = getattr(multiprocessing.current_process(), "_inheriting", False)
    return inheriting or multiprocessing.parent_process() is not None


@functools.cache
def end_with_parent() -> None:
    """End this process soon after the one that started it. Idempotent."""
    threading.Thread(target=_watch, args=(os.getppid(),), name="dwdp-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PERIOD_S)
    folder = os.environ.get(IPC_FOLDER, "")
    if Path(folder).name.startswith(FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
    remove_orphaned(os.environ.get(RENDEZVOUS_ENV, ""))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
