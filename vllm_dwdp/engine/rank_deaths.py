"""The front end's word on an engine that is killed: vLLM ends the launch then, and does not say which one it was.

An engine that ends by itself has told why, also where its worker died (`DwdpExecutor`).
"""

from __future__ import annotations

import multiprocessing
import re
import signal
import time
from multiprocessing import connection
from multiprocessing.process import BaseProcess

#: By which engines end that were told to.
_ORDINARY = (signal.SIGTERM, signal.SIGINT)


class RankDeaths:
    """The engine processes of a launch, as far as this process started them."""

    def __init__(self, num_ranks: int) -> None:
        """Once all are up. Of several launches at a time in one process it knows nothing: engines' names tell no launch."""
        named = [
            (re.fullmatch(r"EngineCore_DP(\d+)", child.name), child) for child in multiprocessing.active_children()
        ]
        engines = [(int(name[1]), child) for name, child in named if name]
        self._engines: list[tuple[int, BaseProcess]] = engines if len(engines) == num_ranks else []

    def __bool__(self) -> bool:
        """Whether there is anything to watch."""
        return bool(self._engines)

    def wait(self, timeout_s: float) -> str | None:
        """At most so long for an engine to end; what to say if it was killed.

        Afterwards nothing is watched any more, since the others are ended because of it.
        """
        ended = connection.wait([engine.sentinel for _, engine in self._engines], timeout_s)
        told = None
        for rank, engine in self._engines:
            if engine.sentinel in ended:
                code = _exit_code(engine)
                if told is None and code < 0 and -code not in _ORDINARY:
                    told = f"DWDP rank {rank} (pid {engine.pid}) died: its engine was killed by {_name(-code)}"
        if ended:
            self._engines = []
        return told


def _exit_code(engine: BaseProcess) -> int:
    """Of an engine that has ended; 0 where it is not known."""
    # vLLM asks too: whoever comes second learns it only after the other has put it down.
    for _ in range(50):
        if engine.exitcode is not None:
            return engine.exitcode
        time.sleep(0.02)
    return 0


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
