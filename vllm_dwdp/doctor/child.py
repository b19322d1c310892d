"""Processes that look at what may hang or crash: each answers within a limit of time, and is gone when it is left."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

#: A child that was told to end, or was killed, has this long: one that hangs in the driver cannot be waited for.
_END_S: Final = 5.0


class ChildFailed(Exception):
    """One line: why there is no answer."""


class Child:
    """A process with pipes to both ends, in a group of its own, so that all it started goes with it."""

    def __init__(self, command: Sequence[str]) -> None:
        """Raises ChildFailed where `command` cannot be started."""
        self._name = os.path.basename(command[0])
        self._read = b""
        # A child finds what this process finds, from whatever folder it was called.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ChildFailed(f"{self._name} cannot be started ({error.strerror})") from error

    @classmethod
    def part(cls, *arguments: str) -> Child:
        """A part of parts.py."""
        return cls([sys.executable, "-P", "-m", "vllm_dwdp.doctor.parts", *arguments])

    def ask(self, limit_s: float, order: object = None) -> dict[str, Any]:
        """The next answer, to `order` where there is one. Raises ChildFailed; an answer may itself be an `error`."""
        if order is not None:
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
            except OSError:
                raise ChildFailed(self._ended()) from None
        answer: dict[str, Any] = json.loads(self._until(b"\n", limit_s))
        return answer

    def everything(self, limit_s: float) -> str:
        """What it prints until it ends; raises ChildFailed, also for a status other than 0."""
        text = self._until(None, limit_s).decode(errors="replace")
        with suppress(subprocess.TimeoutExpired):
            if self._process.wait(_END_S) == 0:
                return text
        raise ChildFailed(self._ended() + (f": {text.splitlines()[0]}" if text else ""))

    def _until(self, end: bytes | None, limit_s: float) -> bytes:
        """What comes up to `end`, or all of it."""
        deadline = time.monotonic() + limit_s
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while end is None or end not in self._read:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise ChildFailed(f"no answer after {limit_s:.0f} s")
            more = os.read(fd, 1 << 16)
            if not more:
                if end is None:
                    break
                raise ChildFailed(self._ended())
            self._read += more
        if end is None:
            found, self._read = self._read, b""
        else:
            found, _, self._read = self._read.partition(end)
        return found

    def _ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(_END_S)
            if -status in set(signal.Signals):
                return f"its process ended with {signal.Signals(-status).name}"
            return f"its process ended with {f'status {status}' if status >= 0 else f'signal {-status}'}"
        return "its process closed its pipes"

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Have it end by itself, at the end of its orders, and kill whatever is left of it; at once after an exception."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S if kind is None else 0)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
