"""Offline client for several independent engines: what `LLM` talks to.

vLLM's `SyncMPClient` launches all engines but sends everything to the first. This one sends each request to the engine
with the fewest unfinished ones, splits aborts by engine and calls utilities on all.
"""

from __future__ import annotations

import time
import uuid
import weakref
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core_client import SyncMPClient

from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.group.launch import launch_of
from vllm_dwdp.hits_file import Hits, add_hits

if TYPE_CHECKING:
    from vllm import LLM

#: How often a wait looks whether an engine has died.
_PERIOD_S = 0.5

#: Utilities whose results are one list over all workers, to be joined in rank order.
_JOINED = frozenset({"collective_rpc"})
#: Utilities that report success: true only if every rank says so.
_ALL_TRUE = frozenset({"reset_prefix_cache", "is_sleeping", "wake_up", "add_lora", "remove_lora", "pin_lora"})


class DwdpSyncClient(SyncMPClient):
    """`SyncMPClient` over N engines. Results keep their order, which `LLM` takes from the request ids."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With is_dp, has_unfinished_requests would wait for waves that independent ranks never complete.
        self.is_dp = False
        self._engine_of: dict[str, int] = {}
        self._unfinished = [0] * len(self.core_engines)
        self._served = [0] * len(self.core_engines)
        # At the end of a program the newest finalizer runs first. vLLM's newest would end the engines while its monitor
        # still takes that for a failure, and shuts down in a thread that Python is about to end.
        weakref.finalize(self, self._finalizer)

    def _send_to(self, engine: int, kind: EngineCoreRequestType, payload: Any) -> None:
        self.ensure_alive()
        self.input_socket.send_multipart(
            (self.core_engines[engine], kind.value, *self.encoder.encode(payload)), copy=False
        )

    def add_request(self, request: EngineCoreRequest) -> None:
        """Send `request` to the rank it is pinned to, or to the least loaded one."""
        engine = request.data_parallel_rank
        if engine is None:
            engine = min(range(len(self._unfinished)), key=lambda i: (self._unfinished[i], self._served[i]))
        elif not 0 <= engine < len(self.core_engines):
            raise DwdpError(f"data_parallel_rank {engine} of {len(self.core_engines)} ranks: use 0 to N - 1")
        self._send_to(engine, EngineCoreRequestType.ADD, request)
        self._engine_of[request.request_id] = engine
        self._unfinished[engine] += 1
        self._served[engine] += 1

    def _forget(self, request_id: str) -> None:
        engine = self._engine_of.pop(request_id, None)
        if engine is not None:
            self._unfinished[engine] -= 1

    def get_output(self) -> EngineCoreOutputs:
        """Next outputs of any rank."""
        while self.outputs_queue.empty():
            # vLLM's monitor ends its reader without a word where an engine was killed.
            self.ensure_alive()
            self._wait_for_output()
        outputs = super().get_output()
        for request_id in outputs.finished_requests or ():
            self._forget(request_id)
        for output in outputs.outputs:
            if output.finish_reason is not None:
                self._forget(output.request_id)
        return outputs

    def _wait_for_output(self) -> None:
        queue = self.outputs_queue
        with queue.not_empty:
            if not queue._qsize():
                queue.not_empty.wait(_PERIOD_S)

    def abort_requests(self, request_ids: list[str]) -> None:
        """Tell each rank to abort its own of `request_ids`."""
        if self.resources.engine_dead:
            return
        by_engine: dict[int, list[str]] = {}
        for request_id in request_ids:
            if (engine := self._engine_of.get(request_id)) is not None:
                by_engine.setdefault(engine, []).append(request_id)
                self._forget(request_id)
        for engine, ids in by_engine.items():
            self._send_to(engine, EngineCoreRequestType.ABORT, ids)

    def call_utility(self, method: str, *args: Any) -> Any:
        """Call `method` on every rank; lists of workers are joined, other results are the first rank's."""
        results = self.call_utility_all(method, *args)
        if method in _JOINED:
            return [item for result in results for item in result]
        return all(results) if method in _ALL_TRUE else results[0]

    def call_utility_all(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Call `method` on every rank at once and return the results in rank order.

        Without `timeout_s` it waits as long as the ranks live, as plain vLLM does. Raises DwdpTimeout.
        """
        deadline = time.monotonic() + (timeout_s or 0.0)
        futures: list[Future[Any]] = []
        for engine in range(len(self.core_engines)):
            call_id = uuid.uuid1().int >> 64
            future: Future[Any] = Future()
            self.utility_results[call_id] = future
            futures.append(future)
            self._send_to(engine, EngineCoreRequestType.UTILITY, (0, call_id, method, args))
        return [
            self._result(future, f"rank {rank} ({method})", timeout_s, deadline) for rank, future in enumerate(futures)
        ]

    def _result(self, future: Future[Any], what: str, timeout_s: float | None, deadline: float) -> Any:
        while not wait([future], _PERIOD_S).done:
            self.ensure_alive()
            if timeout_s is not None and time.monotonic() > deadline:
                raise DwdpTimeout(
                    f"{what} does not answer within {timeout_s:g} s: it computes for longer, or stands still; look at its "
                    "log, or raise dwdp.timeout_s"
                )
        return future.result()

    def dwdp_counters(self) -> list[dict[str, Any]]:
        """Counters of every rank, in rank order, with the requests sent to it; raises DwdpTimeout."""
        counters = self._ask_ranks("dwdp_counters")
        return [{**counter, "requests": served} for counter, served in zip(counters, self._served, strict=True)]

    def dwdp_hits(self) -> Hits:
        """Hits of all ranks together, which each has written by then; raises DwdpTimeout."""
        parts = self._ask_ranks("dwdp_hits")
        return add_hits(
            [Hits(part["tokens"], {name: tuple(counts) for name, counts in part["layers"].items()}) for part in parts]
        )

    def _ask_ranks(self, method: str) -> list[dict[str, Any]]:
        """What `method` of every worker returns, in rank order; raises DwdpTimeout."""
        launch = launch_of(self.vllm_config)
        timeout_s = None if launch is None else launch.config.timeout_s
        # The limit is ours, not the call's: an engine that gives up on an answer takes it for that of its next call.
        results = self.call_utility_all("collective_rpc", method, None, (), None, timeout_s=timeout_s)
        return [answer for result in results for answer in result]


def client_of(llm: LLM) -> DwdpSyncClient:
    """The offline client behind `llm`; raises DwdpError where it does not run on dwdp."""
    client = llm.llm_engine.engine_core
    if not isinstance(client, DwdpSyncClient):
        raise DwdpError('this LLM does not run on dwdp: pass distributed_executor_backend="dwdp"')
    return client
