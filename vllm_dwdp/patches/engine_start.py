"""`CoreEngineProcManager.__init__`: what a launch set to have its engines started goes when they are.

Why: vLLM chooses a launch's socket files and the way in which it starts processes from the environment, which every child of
the program inherits. The last process that reads them is an engine, and this constructor has started all. Installed only in
processes in which `dwdp` is selected. Goes when both are options of the config.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm_dwdp.patches import expect_parameters

_MARK = "_dwdp_wraps"


def install(started: Callable[[Any], None]) -> None:
    """Wrap `CoreEngineProcManager.__init__`, which starts the engines of a config, to call `started` with it; idempotent."""
    from vllm.v1.engine.utils import CoreEngineProcManager

    original = CoreEngineProcManager.__init__
    if hasattr(original, _MARK):
        return
    expect_parameters(original, "self", "vllm_config", "executor_class")
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        finally:
            started(signature.bind(self, *args, **kwargs).arguments["vllm_config"])

    setattr(__init__, _MARK, original)
    CoreEngineProcManager.__init__ = __init__  # type: ignore[method-assign]
