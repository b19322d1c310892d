"""Cases that begin only where they will probably end in time: one that is killed in its middle says nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class InTime:
    """Lets no case begin that would not end within `limit_s` from now, were it as slow as the slowest so far, running ones
    included. Several threads may ask."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._end = clock() + limit_s
        self._running: dict[str, float] = {}
        self._slowest = 0.0
        #: Those that were not let begin, in the order of asking.
        self.left_out: list[str] = []

    @contextmanager
    def case(self, name: str) -> Iterator[bool]:
        """Around a case: whether it may begin."""
        with self._lock:
            now = self._clock()
            slowest = max([self._slowest, *(now - began for began in self._running.values())])
            begins = now + slowest < self._end
            if begins:
                self._running[name] = now
            else:
                self.left_out.append(name)
        try:
            yield begins
        finally:
            if begins:
                with self._lock:
                    self._slowest = max(self._slowest, self._clock() - self._running.pop(name))
