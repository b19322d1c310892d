"""`EngineCoreClient.make_client`: the offline client that spreads requests over the ranks.

Why: vLLM's `SyncMPClient` talks to its first engine only; serving needs nothing, `DPLBAsyncMPClient` balances. Installed
only in processes in which `dwdp` is selected. Goes when vLLM has an offline client for several engines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_dwdp.patches import expect_parameters

_MARK = "_dwdp_wraps"


def install(client_for: Callable[[Any], Callable[..., Any] | None]) -> None:
    """Wrap `EngineCoreClient.make_client`; other executors and asyncio clients are delegated untouched.

    client_for: the client class for a config of dwdp, None for any other.
    """
    from vllm.v1.engine.core_client import EngineCoreClient

    original = EngineCoreClient.make_client
    if hasattr(original, _MARK):
        return
    expect_parameters(original, "multiprocess_mode", "asyncio_mode", "vllm_config", "executor_class", "log_stats")

    @functools.wraps(original)
    def make_client(
        multiprocess_mode: bool,
        asyncio_mode: bool,
        vllm_config: Any,
        executor_class: Any,
        log_stats: bool,
        renderer: Any = None,
    ) -> Any:
        client = None if asyncio_mode or not multiprocess_mode else client_for(vllm_config)
        if client is None:
            return original(multiprocess_mode, asyncio_mode, vllm_config, executor_class, log_stats, renderer)
        return client(vllm_config, executor_class, log_stats, renderer=renderer)

    setattr(make_client, _MARK, original)
    EngineCoreClient.make_client = staticmethod(make_client)  # type: ignore[method-assign]
