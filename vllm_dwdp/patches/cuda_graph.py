"""`torch.cuda.CUDAGraph`: which graph is captured, and that it was replayed.

Why: vLLM tells its offloader before a graph of a whole forward is replayed, and not which one; graphs of a drafter have no
MoE layer, others need not all have the same, so counts go by graph. In GPU workers only, for graphs made from then on. Goes
when vLLM says which graph it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.prefetch.replays import NO_LAYERS, ReplayCounts


def install(count_replay: Callable[[ReplayCounts], None]) -> Callable[[ReplayCounts], None]:
    """Have graphs call `count_replay` at each replay with what they were given; returns what gives it, in a capture.

    Raises DwdpError where torch's class is not as expected.
    """
    plain: Any = torch.cuda.CUDAGraph
    if missing := [name for name in ("capture_begin", "capture_end", "replay") if not hasattr(plain, name)]:
        raise DwdpError(f"torch.cuda.CUDAGraph has no {', '.join(missing)}: install the torch that vLLM was built for")
    capturing: Any = None

    class CountedGraph(plain):  # type: ignore[misc]
        """Torch's, and the counts of its replays."""

        counts: ReplayCounts = NO_LAYERS

        def capture_begin(self, *args: Any, **kwargs: Any) -> None:
            nonlocal capturing
            super().capture_begin(*args, **kwargs)
            capturing, self.counts = self, NO_LAYERS

        def capture_end(self, *args: Any, **kwargs: Any) -> None:
            nonlocal capturing
            if capturing is self:
                capturing = None  # also where the capture failed; nobody is to keep its memory
            super().capture_end(*args, **kwargs)

        def replay(self, *args: Any, **kwargs: Any) -> None:
            super().replay(*args, **kwargs)
            if self.counts is not NO_LAYERS:
                count_replay(self.counts)

    def give_counts(counts: ReplayCounts) -> None:
        if capturing is None:
            raise DwdpError("a CUDA graph is captured past torch.cuda.CUDAGraph, so that its replays cannot be counted")
        capturing.counts = counts

    torch.cuda.CUDAGraph = CountedGraph  # type: ignore[misc]
    return give_counts
