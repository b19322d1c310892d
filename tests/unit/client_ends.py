"""Programs whose offline client has two engines, and that end: vLLM's own client, monitor and processes; engines that wait.

    python -m tests.unit.client_ends COUNT

Each ends in a fork of this process, so that many take little time; prints every exit status, and what vLLM logs.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any


def leave() -> None:
    """The last finalizer of a fork: native libraries that were loaded before it wait for their threads for ever."""
    if os.getpid() != PROGRAM:
        time.sleep(0.3)  # for the monitor's thread
        os._exit(0)


PROGRAM = os.getpid()
# Before anything of vLLM: the first that is registered runs last.
atexit.register(leave)


def wait_for_the_end(**_: Any) -> None:
    """An engine's process: told to end, it does so with the status of vLLM's."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    while True:
        time.sleep(0.01)


def make_client() -> Any:
    """A `DwdpSyncClient` over processes that compute nothing."""
    import multiprocessing
    import weakref

    import zmq
    from vllm.v1.engine import utils
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.core_client import BackgroundResources, SyncMPClient
    from vllm.v1.engine.utils import CoreEngineProcManager

    from vllm_dwdp.engine.offline_client import DwdpSyncClient

    EngineCoreProc.run_engine_core = staticmethod(wait_for_the_end)  # type: ignore[method-assign, assignment]
    utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    parallel = SimpleNamespace(data_parallel_size=2, use_ray=False, numa_bind=False, assigned_physical_gpu_ids=None)
    parallel.world_size = parallel.local_world_size = 1

    def start(self: Any) -> None:
        # As in MPClient.__init__, and in this order.
        self.resources = BackgroundResources(ctx=zmq.Context())
        self._finalizer = weakref.finalize(self, self.resources)
        self.resources.engine_manager = CoreEngineProcManager(
            local_engine_count=2,
            start_index=0,
            local_start_index=0,
            vllm_config=SimpleNamespace(parallel_config=parallel, shutdown_timeout=0),  # type: ignore[arg-type]
            local_client=True,
            handshake_address="",
            executor_class=object,  # type: ignore[arg-type]
            log_stats=False,
        )
        self.core_engines = [b"0", b"1"]
        self.start_engine_core_monitor()

    SyncMPClient.__init__ = start  # type: ignore[method-assign, assignment]
    return DwdpSyncClient()


def main() -> None:
    """Fork the programs one after the other; a child returns from here, and ends as any program does."""
    import vllm.v1.engine.core  # noqa: F401

    import vllm_dwdp.engine.offline_client  # noqa: F401

    for number in range(int(sys.argv[1])):
        if (child := os.fork()) == 0:
            main.client = make_client()  # type: ignore[attr-defined]
            time.sleep(0.2 + number % 5 / 10)
            return
        print("ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
