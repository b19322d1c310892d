"""Every change to a symbol of vLLM, one file each; README.md lists them.

A patch wraps and delegates, checks at install time that what it wraps looks as expected, and fails closed: where a
check fails, plain vLLM goes on as if we were not installed and `dwdp` is refused with the reason.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from vllm_dwdp import VLLM_VERSION

#: Why `dwdp` cannot be selected in this process; empty when it can.
failures: list[str] = []


def vllm_version() -> str:
    """Version of the installed vLLM without a local suffix such as `+cpu`."""
    from vllm.version import __version__

    return str(__version__).split("+", 1)[0]


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


def refuse_misfits() -> None:
    """Raise DwdpError, in one line, where `dwdp` was refused for any reason."""
    if failures:
        from vllm_dwdp.errors import DwdpError

        raise DwdpError(f"dwdp cannot run on this vLLM: {'; '.join(failures)}; install the matching pair")


def attempt(step: Callable[..., None], *arguments: Any) -> None:
    """Run `step`; where it raises, which would end plain vLLM too, `dwdp` is refused instead."""
    try:
        step(*arguments)
    except Exception as error:
        refuse(f"{step.__module__} does not fit this vLLM ({type(error).__name__}: {error})")


def install(select: Callable[[], Callable[..., Any]], forget: Callable[[], None]) -> None:
    """Install what every process needs so that `dwdp` is understood when it is selected; idempotent.

    select, forget: see engine_args.py.
    """
    from vllm_dwdp.patches import engine_args, llm_init

    version = vllm_version()
    if version != VLLM_VERSION:
        refuse(f"vLLM {version} is installed, this vllm-dwdp was made for vLLM {VLLM_VERSION}")
    # Engine and worker processes never build engine arguments; they get a finished config.
    if "vllm.engine.arg_utils" in sys.modules:
        attempt(engine_args.install, select, forget)
        attempt(llm_init.wait_for_llm)
    else:
        attempt(llm_init.settle)
