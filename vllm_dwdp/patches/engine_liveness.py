"""`CoreEngineProcManager.monitor_engine_liveness`: the rank of an engine that was killed is told.

Why: vLLM ends a launch when one of its engines dies and says only that one did. An engine that ends by itself has told why,
also where its worker died (`DwdpExecutor`). Installed only in processes in which `dwdp` is selected. Goes when vLLM logs
`failed_proc_name`.
"""

from __future__ import annotations

import functools
import re
import signal
from collections.abc import Iterable
from typing import Any

from vllm_dwdp.patches import expect_parameters

_MARK = "_dwdp_wraps"
#: What engines are told to end with; at the end of a program that is no failure, though vLLM's monitor may take it for one.
_ORDINARY = (signal.SIGTERM, signal.SIGINT)


def install() -> None:
    """Wrap `monitor_engine_liveness`, which returns once an engine has ended or all are stopped; idempotent."""
    from vllm.logger import init_logger
    from vllm.v1.engine.utils import CoreEngineProcManager

    original = CoreEngineProcManager.monitor_engine_liveness
    if hasattr(original, _MARK):
        return
    expect_parameters(original, "self")
    logger = init_logger("vllm.dwdp")

    @functools.wraps(original)
    def monitor_engine_liveness(self: Any) -> None:
        original(self)
        # Not set where vLLM was asked to stop.
        if (name := self.failed_proc_name) and (told := killed(name, self.processes)):
            logger.error("%s", told)

    setattr(monitor_engine_liveness, _MARK, original)
    CoreEngineProcManager.monitor_engine_liveness = monitor_engine_liveness  # type: ignore[method-assign]


def killed(name: str, processes: Iterable[Any]) -> str | None:
    """What to say of the engine process called `name`; None where it ended by itself or was told to, or is no rank's."""
    rank = re.fullmatch(r"EngineCore_DP(\d+)", name)
    process = next((process for process in processes if process.name == name), None)
    number = -(process.exitcode or 0) if process is not None else 0
    if rank is None or process is None or number <= 0 or number in _ORDINARY:
        return None
    by = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"DWDP rank {rank[1]} (pid {process.pid}) died: its engine was killed by {by}"
