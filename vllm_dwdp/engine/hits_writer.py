"""In a worker: hits are written while a launch serves, since vLLM gives a server no time for it when it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from vllm.logger import init_logger

from vllm_dwdp.hits_file import LOCK_TIMEOUT_S, Hits

logger = init_logger("vllm.dwdp")

PERIOD_S: Final = 10.0


class HitsWriter:
    """Writes hits every `period_s` from a thread of its own, where there are new ones, and once more at the end.

    What nobody has hit is not written: a launch that served nothing leaves an earlier file as it is.
    """

    def __init__(
        self, read: Callable[[], Hits], write: Callable[[Hits], None], rank: int, period_s: float = PERIOD_S
    ) -> None:
        """read: may wait for the device, which holds up the thread alone. write: raises DwdpError."""
        self._read, self._write, self._rank, self._period_s = read, write, rank, period_s
        self._written = 0
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dwdp-hits", daemon=True)

    def start(self) -> None:
        """From now on; CUDA graphs are captured by then, which another thread's reads would break off."""
        self._thread.start()

    def now(self) -> Hits:
        """Write what there is, and return it; raises DwdpError."""
        with self._lock:
            hits = self._read()
            if hits.tokens:
                self._write(hits)
                self._written = hits.tokens
        return hits

    def close(self) -> None:
        """Write for the last time; what fails is a WARNING."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(LOCK_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning("dwdp rank %d: hits are lost: they are still being read or written", self._rank)
        else:
            self._try(self.now)

    def _run(self) -> None:
        while not self._end.wait(self._period_s):
            self._try(self._news)

    def _news(self) -> None:
        if self._read().tokens > self._written:
            self.now()

    def _try(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:
            logger.warning("dwdp rank %d: hits are lost: %s", self._rank, error)
