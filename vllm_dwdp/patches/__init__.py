"""Every change to a symbol of vLLM, one file each; README.md lists them.

A patch wraps and delegates, checks at install time that what it wraps looks as expected, and fails closed: where a
check fails, plain vLLM goes on as if we were not installed and `dwdp` is refused with the reason.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from vllm_dwdp.compat.versions import why_not_tested

#: Why `dwdp` cannot be selected in this process; empty when it can.
failures: list[str] = []


def refuse(reason: str) -> None:
    """From here on `dwdp` is refused for `reason`."""
    line = " ".join(reason.split())
    if line not in failures:
        failures.append(line)


def expect_parameters(function: Callable[..., Any], *names: str) -> None:
    """Record a failure unless `function` takes at least the parameters `names`, in this order."""
    where = f"{function.__module__}.{function.__qualname__}"
    have = [name for name in inspect.signature(function).parameters if name in names]
    if have != list(names):
        refuse(f"{where} takes {have} of the expected {list(names)}")


def attempt(step: Callable[[], None]) -> None:
    """Run `step`; where it raises, which would end plain vLLM too, `dwdp` is refused instead."""
    try:
        step()
    except Exception as error:
        where = getattr(step, "func", step).__module__
        refuse(f"{where} does not fit this vLLM ({type(error).__name__}: {error})")


def check() -> None:
    """Raise DwdpError with every known reason why `dwdp` cannot run here, in one line; none known: return."""
    if failures:
        from vllm_dwdp.errors import DOCTOR, DwdpError

        raise DwdpError(f"dwdp cannot run on this vLLM: {'; '.join(failures)}; install the matching pair{DOCTOR}")


def install(create_engine_config: Callable[..., Any]) -> None:
    """Install what every process needs so that `dwdp` is understood when it is selected; idempotent.

    `create_engine_config` is called with vLLM's own, and its arguments, where `dwdp` is selected.
    """
    from vllm_dwdp.patches import engine_args, llm_init

    if (why := why_not_tested()) is not None:
        refuse(why)
    # Engine and worker processes never build engine arguments; they get a finished config.
    if "vllm.engine.arg_utils" in sys.modules:
        attempt(functools.partial(engine_args.install, create_engine_config))
        attempt(llm_init.wait_for_llm)
    else:
        attempt(llm_init.settle)
