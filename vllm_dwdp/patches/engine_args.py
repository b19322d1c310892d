"""`EngineArgs.create_engine_config`: the one place where the word `dwdp` turns into a configuration.

Why: `Executor.get_class` cannot resolve the word, and the config has to make the ranks independent before anything is
launched. Everything else of the plugin is reached from here. Goes when vLLM resolves executor names through an entry
point and lets a plugin adjust the config.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from vllm_dwdp import BACKEND
from vllm_dwdp.patches import attempt, check, expect_parameters, llm_init

_MARK = "_dwdp_wraps"


def install(replacement: Callable[..., Any]) -> None:
    """Wrap `EngineArgs.create_engine_config`; with `dwdp` it calls `replacement(original, self, ...)`."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if hasattr(original, _MARK):
        return
    expect_parameters(original, "self", "usage_context", "headless")
    expect_parameters(EngineArgs.create_model_config, "self")

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        attempt(llm_init.wait_for_llm)
        if self.distributed_executor_backend != BACKEND:
            if (environment := sys.modules.get("vllm_dwdp.group.environment")) is not None:
                environment.forget_launches()
            return original(self, *args, **kwargs)
        # Known reasons come before imports that may fail for the same ones.
        check()
        return replacement(original, self, *args, **kwargs)

    setattr(create_engine_config, _MARK, original)
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]
