"""What a start that is refused or fails must not leave behind in this process, or on this machine."""

from __future__ import annotations

import _posixshmem
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from vllm_dwdp.errors import DwdpError

WAIT_S = 10.0

#: Sizes of a checkpoint that only has to be recognised.
TINY = {"num_layers": 1, "hidden": 32, "intermediate": 32, "head_dim": 32, "num_heads": 1, "num_kv_heads": 1}

_VARIABLES = ("DWDP_RENDEZVOUS", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_RPC_BASE_PATH")
_LISTENING = "0A"


def build(model: Path | str, headless: bool = False, **arguments: Any) -> Any:
    """vLLM's config of a launch on two ranks of dwdp, unless `arguments` say otherwise; starts no engine."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"distributed_executor_backend": "dwdp", "data_parallel_size": 2, **arguments}
    return EngineArgs(model=str(model), **arguments).create_engine_config(headless=headless)


def refusal(call: Callable[[], object], kind: type[Exception] = DwdpError) -> str:
    """The message with which `call` fails; keeps no frame of it alive."""
    try:
        call()
    except kind as error:
        return str(error)
    pytest.fail("nothing was refused")


def check_message(message: str, words: list[str]) -> None:
    """One line that says all of `words`: what is wrong, with its numbers, and what to do."""
    assert "\n" not in message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


@contextmanager
def nothing_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where the body leaves a child, port, memory file, thread, variable, shared memory or temporary file behind.

    `folder`: an empty one, to be the temporary folder meanwhile.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    # Names opened from here: a listing would also show those of engines that run beside this test.
    shared, shm_open = set[str](), _posixshmem.shm_open

    def open_and_note(name: str, *more: Any, **named: Any) -> int:
        shared.add(name)
        return int(shm_open(name, *more, **named))

    monkeypatch.setattr(_posixshmem, "shm_open", open_and_note)
    before = _held(folder, shared)
    yield
    deadline = time.monotonic() + WAIT_S
    while left := _held(folder, shared) - before:
        assert time.monotonic() < deadline, f"left behind: {sorted(left)}"
        gc.collect()
        time.sleep(0.05)


def _held(folder: Path, shared: set[str]) -> set[str]:
    found = {f"temporary file {path}" for path in folder.iterdir()}
    found |= {f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ}
    found |= {f"thread {thread.name}" for thread in threading.enumerate() if thread.name.startswith("dwdp")}
    commands = {_command(child) for child in psutil.Process().children(recursive=True)}
    # Python starts its own tracker, once per process, at the first use of multiprocessing.
    found |= {f"child {command}" for command in commands if "resource_tracker" not in command}
    links = _links()
    found |= {link for link in links if link.startswith("/memfd:")}
    for line in [line.split() for table in ("tcp", "tcp6") for line in _lines(f"/proc/self/net/{table}")[1:]]:
        if line[3] == _LISTENING and f"socket:[{line[9]}]" in links:
            found.add(f"listening on {line[1]}")
    return found | {f"/dev/shm{name}" for name in shared if Path(f"/dev/shm{name}").exists()}


def _links() -> set[str]:
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # The one of the listing itself.
            continue
    return found


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return "that ends"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
