"""vllm-dwdp: Distributed Weight Data Parallelism for vLLM, as a plugin.

This module holds the entry points only and imports nothing heavy: it is loaded in every vLLM process, also where
`dwdp` is not selected. See docs/architecture.md for the way of a request and of a byte of weight.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_dwdp.hits_file import Hits

__version__ = "0.1.0"

#: What users write: `--distributed-executor-backend dwdp`.
BACKEND = "dwdp"


def early() -> None:
    """Entry point of `vllm.platform_plugins`: claims no platform, lets `LLM(...)` through to the config.

    `LLM.__init__` refuses `data_parallel_size > 1` before general plugins are loaded; platform plugins are loaded
    before. Returns None, which tells vLLM that no platform was found here. It also runs in every process of a launch,
    so that is where each begins to watch its parent.
    """
    from vllm_dwdp.patches import attempt, llm_init

    attempt(llm_init.arm)
    # Set by the front end of a dwdp launch, and inherited by all that it starts.
    if "DWDP_RENDEZVOUS" in os.environ:
        from vllm_dwdp.engine import orphans

        if orphans.launcher() is not None:
            orphans.end_with_parent()


def register() -> None:
    """Entry point of `vllm.general_plugins`: makes the word `dwdp` known to vLLM's engine arguments."""
    from vllm_dwdp import patches

    patches.install(_create_engine_config)


def _create_engine_config(original: Any, args: Any, *positional: Any, **keywords: Any) -> Any:
    """`EngineArgs.create_engine_config` where `dwdp` is selected."""
    from vllm_dwdp.engine.select import install

    return install()(original, args, *positional, **keywords)


def counters(llm: LLM) -> list[dict[str, Any]]:
    """Counters of every rank of an offline `LLM(distributed_executor_backend="dwdp")`, in rank order.

    The fields are those of `vllm_dwdp.prefetch.counters.Counters.to_dict`, plus `requests` (requests sent to that rank)
    and, where hits are counted, `hits`: per layer how many (`total`) and how many of experts held there (`local`).

    Raises:
        DwdpError: `llm` does not run on the dwdp backend.
    """
    from vllm_dwdp.engine.offline_client import client_of

    return client_of(llm).dwdp_counters()


def hits(llm: LLM) -> Hits:
    """How often each expert was hit on all ranks of an offline `LLM` with `dwdp.hits`; also writes that file.

    Raises:
        DwdpError: `llm` does not run on the dwdp backend.
    """
    from vllm_dwdp.engine.offline_client import client_of

    return client_of(llm).dwdp_hits()
