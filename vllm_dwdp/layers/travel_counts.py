"""What travelling tokens' kernels and the thread that serves others have counted, on the rank's counter page."""

from __future__ import annotations

import logging
import time
from typing import Final

import torch

from vllm_dwdp.kernels.travel import ASKED, LATE
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.travel.attendant import Attendant

#: Seconds between looks at what the device has counted: a server publishes once a second.
_PERIOD_S: Final = 0.25
#: A rank that was asked so long ago is taken to be asked again.
_LATELY_S: Final = 1.0

logger = logging.getLogger("vllm.dwdp")


class TravelCounts:
    """state: int32 [., ranks] of the requester, on the device; its counts wrap. asked_lately: whether others had this rank
    compute for them since the last forward, or within a second before it."""

    def __init__(self, state: torch.Tensor, attendant: Attendant, counters: CounterPage) -> None:
        self._state, self._attendant, self._counters = state, attendant, counters
        on_gpu = state.device.type == "cuda"
        self._seen = torch.zeros(2, state.shape[1], dtype=torch.int32, pin_memory=on_gpu)
        self._told = self._seen.long()
        self._failed = False
        self._published = 0.0
        self._served, self._served_at = attendant.served, -_LATELY_S
        self.asked_lately = False

    def count(self) -> None:
        """A forward begins."""
        now = time.monotonic()
        if (served := self._attendant.served) != self._served:
            self._served, self._served_at = served, now
        self.asked_lately = now - self._served_at < _LATELY_S
        if now - self._published > _PERIOD_S:
            self._published = now
            self.publish()

    def publish(self, now: bool = False) -> None:
        """Add what the device had counted when this was called last; with `now`, what it has counted, and wait for it."""
        for _ in range(2 if now else 1):
            # Once: the device may write while this is read.
            seen = self._seen.long()
            grown = (seen - self._told) % (1 << 32)
            self._told = seen
            page = self._counters.fields
            page.travel_requests += int(grown[0].sum())
            page.travel_late += int(grown[1].sum())
            page.travel_served = self._attendant.served
            self._seen.copy_(self._state[ASKED.value : LATE.value + 1], non_blocking=not now)
        if (code := self._attendant.failed) and not self._failed:
            self._failed = True
            logger.warning(
                "dwdp rank %d answers no requests of other ranks any more (CUDA error %d): they read its experts directly",
                page.rank,
                code,
            )
