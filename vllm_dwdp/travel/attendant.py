"""The thread of an owner that launches what requesters ask for. It holds no interpreter lock: the owner's Python, its
scheduler and its step loop are not asked.

Numba compiles the loop, which vLLM brings. It polls the bells, memory of the host that requesters' kernels write, and
launches the prepared graph of a request on a stream of its own. After some time without a request it sleeps between looks.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from vllm_dwdp.errors import DwdpTimeout

# Words of the control array.
_STOP: Final = 0
_SERVED: Final = 1
_FAILED: Final = 2  # CUDA's code of a launch that failed; the loop has ended then
#: Looks without a request before the loop sleeps between them, and for how long.
_BUSY_LOOKS: Final = 200_000
_SLEEP_US: Final = 20


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

    # A bell is the number of a request times 256, and its bucket (kernels/travel.py).
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

    bells: int64 [ranks], written by requesters, by rank. graphs: CUgraphExec of each requester, by bucket. streams: on which
    those of a requester are launched. launch: cuGraphLaunch, unless a test says otherwise.
    """

    def __init__(
        self,
        bells: np.ndarray[Any, Any],
        graphs: Mapping[int, Sequence[int]],
        streams: Mapping[int, int],
        launch: Any = None,
    ) -> None:
        # Wide enough for any bell: no graph is an error of CUDA's, and not what lies behind the table.
        table = np.zeros((len(bells), 256), dtype=np.uint64)
        for requester, row in graphs.items():
            table[requester, : len(row)] = row
        launched_on = [streams.get(requester, 0) for requester in range(len(bells))]
        self._control = np.zeros(3, dtype=np.int64)
        self._arguments = (bells, bells >> 8, table, np.array(launched_on, dtype=np.uint64), self._control)
        self._loop = _compiled(launch or _cuda_launch())
        # Compiled here and not in the thread: what fails, fails at start, and the first request waits for no compiler.
        self._control[_STOP] = 1
        self._loop(*self._arguments)
        self._control[_STOP] = 0
        self._thread: threading.Thread | None = None

    @property
    def served(self) -> int:
        """Requests so far."""
        return int(self._control[_SERVED])

    @property
    def failed(self) -> int:
        """CUDA's code of a launch that failed, after which nobody is served any more; 0 while all is well."""
        return int(self._control[_FAILED])

    def start(self, prepare: Callable[[], None]) -> None:
        """prepare: called first in the thread, to make the device current there."""

        def run() -> None:
            prepare()
            self._loop(*self._arguments)

        self._thread = threading.Thread(target=run, name="dwdp-attendant", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread; idempotent. Raises DwdpTimeout where it does not end: something in CUDA holds it."""
        self._control[_STOP] = 1
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise DwdpTimeout(
                    f"the thread that answers other ranks has not ended after {timeout_s:.3g} s: look for a stalled device"
                )
            self._thread = None
