"""In front ends, when `dwdp` is selected: what this vLLM has is checked, then the patches of a launch are installed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_dwdp import patches


def install() -> Callable[..., Any]:
    """What builds a config of dwdp; raises DwdpError, in one line, where something does not fit this vLLM."""
    from vllm_dwdp.patches import engine_liveness, engine_start, sync_client

    patches.attempt(_check_seams)
    patches.check()
    patches.attempt(functools.partial(sync_client.install, _offline_client))
    patches.attempt(engine_liveness.install)
    patches.attempt(functools.partial(engine_start.install, _started))
    patches.attempt(_import_all)
    patches.check()
    from vllm_dwdp.engine.configure import create_engine_config

    return create_engine_config


@functools.cache
def _check_seams() -> None:
    from vllm_dwdp.compat.seams import misfits

    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    for line in misfits(Path(spec.origin).parents[1]):
        patches.refuse(line)


def _offline_client(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm_dwdp.group.launch import launch_of

    if launch_of(vllm_config) is None:
        return None
    from vllm_dwdp.engine.offline_client import DwdpSyncClient

    return DwdpSyncClient(vllm_config, *args, **kwargs)


def _started(vllm_config: Any) -> None:
    from vllm_dwdp.group.environment import started

    started(vllm_config)


def _import_all() -> None:
    """What every launch imports of vLLM in the front end."""
    import vllm_dwdp.engine.configure
    import vllm_dwdp.engine.executor  # noqa: F401
