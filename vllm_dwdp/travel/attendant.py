"""The thread of an owner that launches what requesters ask for. It holds no interpreter lock: the owner's Python, its
scheduler and its step loop are not asked.

Numba compiles the loop, which vLLM brings. It polls the bells, memory of the host that requesters' kernels write, and
launches the prepared graph of a request on a stream of its own. After some time without a request it sleeps between looks.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from vllm_dwdp.errors import DwdpError

# Words of the control array.
_STOP: Final = 0
_SERVED: Final = 1
_FAILED: Final = 2  # CUDA's code of a launch that failed; the loop has ended then
#: Looks without a request before the loop sleeps between them, and for how long.
_BUSY_LOOKS: Final = 200_000
_SLEEP_US: Final = 20
#: A bell is the number of a request times this, and its bucket.
BUCKETS: Final = 256


def _cuda_launch() -> Any:
    launch = ctypes.CDLL("libcuda.so.1").cuGraphLaunch
    launch.argtypes, launch.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_int
    return launch


def _compiled(launch: Any) -> Callable[..., None]:
    import numba

    libc = ctypes.CDLL(None)
    # A sleep of no time takes some 50 microseconds.
    give_way, sleep = libc.sched_yield, libc.usleep
    give_way.argtypes, give_way.restype = (), ctypes.c_int
    sleep.argtypes, sleep.restype = (ctypes.c_uint,), ctypes.c_int
    busy_looks, sleep_us = _BUSY_LOOKS, _SLEEP_US

    def loop(bells, served, graphs, streams, control):  # type: ignore[no-untyped-def]
        idle = 0
        while control[0] == 0:
            idle += 1
            for who in range(len(bells)):
                bell = bells[who]
                if bell >> 8 != served[who]:
                    code = launch(graphs[who, bell & 255], streams[who])
                    if code != 0:
                        control[2] = code
                        return
                    served[who] = bell >> 8
                    control[1] += 1
                    idle = 0
            # A call, so that the bells are read again; and another thread may need this core.
            if idle < busy_looks:
                give_way()
            else:
                sleep(sleep_us)

    compiled: Callable[..., None] = numba.njit(nogil=True)(loop)
    return compiled


class Attendant:
    """Serves from `start` to `stop`.

    bells: int64 [requesters], written by them. graphs: by requester and bucket, CUgraphExec; streams: one per requester.
    """

    def __init__(self, bells: Any, graphs: Sequence[Sequence[int]], streams: Sequence[int], launch: Any = None) -> None:
        self._bells = bells
        self._served = bells >> 8
        self._graphs = np.array(graphs, dtype=np.uint64).reshape(len(bells), -1)
        self._streams = np.array(streams, dtype=np.uint64)
        self._control = np.zeros(4, dtype=np.int64)
        self._loop = _compiled(launch or _cuda_launch())
        self._thread: threading.Thread | None = None

    @property
    def served(self) -> int:
        """Requests so far."""
        return int(self._control[_SERVED])

    def start(self, prepare: Callable[[], None]) -> None:
        """prepare: called first in the thread, to make the device current there."""

        def run() -> None:
            prepare()
            self._loop(self._bells, self._served, self._graphs, self._streams, self._control)

        self._thread = threading.Thread(target=run, name="dwdp-attendant", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread; raises DwdpError where a launch had failed or the thread does not end."""
        self._control[_STOP] = 1
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise DwdpError(f"the thread that answers requests has not ended after {timeout_s:.3g} s")
        if self._control[_FAILED]:
            raise DwdpError(f"a launch for another rank failed with CUDA error {self._control[_FAILED]}")
