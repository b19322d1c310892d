"""In a worker: the planner's question once more, with measured rates; and whether the answer was right."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final

from vllm.logger import init_logger

from vllm_dwdp.engine.planner import planned
from vllm_dwdp.predict.startup import MUCH_WAIT, FullStep, Rates, full_step

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_dwdp.group.launch import DwdpLaunch
    from vllm_dwdp.layers.sharing import ExpertSharing
    from vllm_dwdp.prefetch.counters import CounterPage

logger = init_logger("vllm.dwdp")

#: Forwards that pull make a period once they have as many tokens as this many full steps.
STEPS: Final = 32


class Waits:
    """Compares, period by period, what compute waited with what was foreseen; one line, at the first that differs.

    above: forwards of more tokens pull; None where none does. full: tokens of a full step; step: what is foreseen of it.
    more: what can be done beside the usual.
    """

    def __init__(
        self, rank: int, page: CounterPage, above: int | None, full: int, step: FullStep | None, more: str
    ) -> None:
        self._rank, self._fields, self._more = rank, page.fields, more
        self._above = sys.maxsize if above is None else above
        self._enough = STEPS * full
        self._foreseen_s = step.step.seconds / full if step is not None and step.waits else None
        self._tokens = self._forwards = self._begin_ns = 0
        self._begin_s = 0.0

    def add(self, tokens: int) -> None:
        """A forward of `tokens` tokens begins."""
        if tokens <= self._above:
            return
        if self._tokens >= self._enough:
            self._compare()
        if not self._tokens:
            self._begin_s, self._begin_ns = time.monotonic(), self._fields.exposed_wait_ns
        self._tokens += tokens
        self._forwards += 1

    def _compare(self) -> None:
        waited_s, elapsed_s = (self._fields.exposed_wait_ns - self._begin_ns) / 1e9, time.monotonic() - self._begin_s
        said = f"in {self._forwards} forwards that pull, of {self._tokens // self._forwards} tokens on average"
        percent = 100 * waited_s / elapsed_s
        if self._foreseen_s is None and waited_s > MUCH_WAIT * elapsed_s:
            logger.warning(
                "dwdp rank %d: compute waited %.1f %% of the time, %s: use more tokens per step, more experts_per_rank%s",
                *(self._rank, percent, said, self._more),
            )
        # Of the time that these tokens are foreseen to take: a rank that was idle has waited little of all time.
        elif self._foreseen_s is not None and waited_s <= MUCH_WAIT * self._foreseen_s * self._tokens:
            logger.info(
                "dwdp rank %d: pulls are hidden after all: %.1f %% of the time was spent waiting, %s",
                *(self._rank, percent, said),
            )
        else:
            self._tokens = self._forwards = 0
            return
        self._above = sys.maxsize


def watch_waits(vllm_config: VllmConfig, launch: DwdpLaunch, rank: int, sharing: ExpertSharing) -> Waits:
    """Log one WARNING where compute is foreseen to wait in full steps. To be called before the first forward."""
    full, platform = vllm_config.scheduler_config.max_num_batched_tokens, sharing.build.platform
    above = sharing.direct_tokens if sharing.refilled else None
    more = ", or the view inplace" if platform.on_cpu else ""
    step = None
    if above is not None and above < full:
        rates = Rates(sharing.link_rate, sharing.memory_rate, sharing.product_rate, sharing.copies_s)
        step = full_step(planned(vllm_config, launch.config, launch.group_size, platform), rates)
        if step is not None and step.waits:
            logger.warning("dwdp rank %d: %s", rank, step.describe(more))
    return Waits(rank, sharing.counters, above, full, step, more)
