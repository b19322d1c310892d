"""In the front end, once `dwdp` was said: the rest of the patches goes in, with what they put in place of vLLM's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_dwdp.patches import attempt, engine_liveness, engine_start, refuse_misfits, sync_client


def select() -> Callable[..., Any]:
    """What builds a config of dwdp; raises DwdpError, in one line, where something does not fit this vLLM."""
    attempt(sync_client.install, _client_for)
    attempt(engine_liveness.install)
    attempt(engine_start.install, _started)
    attempt(_import_all)
    refuse_misfits()
    from vllm_dwdp.engine.configure import create_engine_config

    return create_engine_config


def _client_for(vllm_config: Any) -> Callable[..., Any] | None:
    from vllm_dwdp.group.launch import launch_of

    if launch_of(vllm_config) is None:
        return None
    from vllm_dwdp.engine.offline_client import DwdpSyncClient

    return DwdpSyncClient


def _started(vllm_config: Any) -> None:
    from vllm_dwdp.group.environment import started

    started(vllm_config)


def _import_all() -> None:
    """What every launch imports of vLLM in the front end."""
    import vllm_dwdp.engine.configure
    import vllm_dwdp.engine.executor  # noqa: F401
