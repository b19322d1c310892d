"""`LLM.__init__`: lets `LLM(..., distributed_executor_backend="dwdp", data_parallel_size=N)` reach the config.

Why: the constructor refuses `data_parallel_size > 1` before general plugins are loaded, with one way out for
platforms: `not current_platform.is_tpu()`. `arm()` runs as a platform plugin, while `vllm.entrypoints.llm` is still
half imported, so it can only reach `Platform.is_tpu`; its answer changes for one caller alone, that very check.
`settle()` runs right after the check: it takes the early hook away and, where `LLM` is imported, wraps `LLM.__init__` so
that a second `LLM` in the process works too. Goes when vLLM drops the check.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from typing import Any

from vllm_dwdp import BACKEND
from vllm_dwdp.patches import expect_parameters, refuse

_LLM_MODULE = "vllm.entrypoints.llm"
_MARK = "_dwdp_wraps"
_lock = threading.Lock()
_original: Any = None


def _is_dwdp_check(frame: Any) -> bool:
    return (
        frame.f_code.co_name == "__init__"
        and frame.f_globals.get("__name__") == _LLM_MODULE
        and frame.f_locals.get("_distributed_executor_backend") == BACKEND
    )


def arm() -> None:
    """Install the early hook on `Platform.is_tpu`; idempotent."""
    global _original
    from vllm.platforms.interface import Platform

    with _lock:
        if _original is not None:
            return
        original = Platform.__dict__.get("is_tpu")
        if not inspect.isfunction(original) or list(inspect.signature(original).parameters) != ["self"]:
            refuse("Platform.is_tpu is no longer a method without arguments")
            return
        _original = original

        @functools.wraps(original)
        def is_tpu(self: Platform) -> bool:
            # Not a TPU: the only branch of LLM.__init__ behind this answer is its data-parallel refusal.
            return _is_dwdp_check(sys._getframe(1)) or bool(original(self))

        Platform.is_tpu = is_tpu  # type: ignore[method-assign]


def disarm() -> None:
    """Take the early hook away; idempotent."""
    global _original
    from vllm.platforms.interface import Platform

    with _lock:
        if _original is not None:
            Platform.is_tpu = _original  # type: ignore[method-assign]
            _original = None


def _imported_llm() -> Any:
    return getattr(sys.modules.get(_LLM_MODULE), "LLM", None)


def wait_for_llm() -> None:
    """Settle, or keep the early hook until the first config is built where `LLM` may still be imported before."""
    if _imported_llm() is None:
        arm()
    else:
        settle()


def settle() -> None:
    """Replace the early hook by a wrapper of `LLM.__init__` that arms it for calls with `dwdp` only; idempotent."""
    disarm()
    LLM = _imported_llm()
    if LLM is None or hasattr(LLM.__init__, _MARK):
        return
    original = LLM.__init__
    expect_parameters(original, "self", "model", "kwargs")
    # Other plugins may have wrapped it too.
    code = getattr(inspect.unwrap(original), "__code__", None)
    if code is None or "_distributed_executor_backend" not in code.co_varnames:
        refuse("LLM.__init__ no longer checks data_parallel_size as expected")

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("distributed_executor_backend") != BACKEND:
            return original(self, *args, **kwargs)
        arm()
        try:
            return original(self, *args, **kwargs)
        finally:
            disarm()

    setattr(__init__, _MARK, original)
    LLM.__init__ = __init__
