"""No process of a launch outlives the one that started it, even where that is killed and can say nothing.

vLLM's engines and its coordinator go on for ever when their front end is killed.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import signal
import threading
import time
from multiprocessing import util

from vllm_dwdp.group.environment import of_parent
from vllm_dwdp.group.launch import RENDEZVOUS_ENV
from vllm_dwdp.group.launch_folder import remove_orphaned

#: Short: vLLM's coordinator fails by itself once it tells a dead front end its addresses, and leaves the folder.
_PERIOD_S = 0.1
#: Time for a process to end by itself after SIGTERM; an engine that is being built only takes note of it.
_GRACE_S = 2.0

#: The processes of a launch, by the names that vLLM gives them.
_OF_A_LAUNCH = re.compile(r"EngineCore\b|EngineCore_DP\d+|VLLM_DP_Coordinator|ApiServer_\d+|VllmWorker-\d+")

_forks_watched = False


def launcher() -> int | None:
    """The process that says in the environment that it starts this one; None where this is no process of a launch.

    Known before `parent_process()`, while this process is still being unpickled. It may be a process above the one that
    started this.
    """
    pid = os.environ.get(RENDEZVOUS_ENV, "").partition(":")[0]
    return int(pid) if pid.isdigit() and _OF_A_LAUNCH.fullmatch(multiprocessing.current_process().name) else None


def started_by() -> int | None:
    """The process that started this one by multiprocessing, as it said itself; the kernel names another once it is gone."""
    parent = multiprocessing.parent_process()
    return parent.pid if parent is not None else None


def value_of_parent(name: str) -> str | None:
    """What the front end left in `name` for this child of its own."""
    parent = started_by()
    return None if parent is None else of_parent(name, parent)


def orphaned() -> bool:
    """Whether the process that started this one by multiprocessing is gone."""
    return started_by() not in (None, os.getppid())


@functools.cache
def end_with_parent() -> None:
    """End this process soon after the one that started it by multiprocessing. Idempotent."""
    if (parent := launcher() or started_by()) is not None:
        threading.Thread(target=_watch, args=(parent,), name="dwdp-parent", daemon=True).start()


def watch_forked() -> None:
    """Have processes of a launch that are forked from this one watch it: they load no plugin. Idempotent."""
    global _forks_watched
    if not _forks_watched:
        _forks_watched = True
        util.register_after_fork(_after_fork, lambda hook: hook())


def _after_fork() -> None:
    # This process's own watcher, if it has one, is no thread of the child's.
    end_with_parent.cache_clear()
    if launcher() is not None:
        end_with_parent()


def _watch(parent: int) -> None:
    if os.getppid() == parent:
        while os.getppid() == parent:
            time.sleep(_PERIOD_S)
    else:
        # Gone already, or no parent of this process: told by what it was started with, once that is unpickled. By then this
        # process may fail by itself; the folder tells whose it is.
        _remove_folder()
        while (told := started_by()) is None:
            time.sleep(_PERIOD_S / 10)
        if told != parent:
            return
    _remove_folder()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _remove_folder() -> None:
    """Remove the launch's folder if its front end is gone."""
    remove_orphaned(os.environ.get(RENDEZVOUS_ENV, "").partition(":")[2])
