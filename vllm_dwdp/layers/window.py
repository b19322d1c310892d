"""Can the pull of a forward be hidden? A rough answer at start, from two short measurements on this rank.

The window that hides the pull of a layer is the expert compute of the one before and the attention between (paper,
'Roofline'). Attention depends on the context, so only expert compute is counted: a pull that it hides alone is safe.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_dwdp.transport.base import CopyEngine, Program

_PRODUCT = 512
_PRODUCT_ON_GPU = 4096
_REPEATS = 8


@dataclass(frozen=True)
class Window:
    """One forward of `tokens` tokens on this rank: seconds to pull its experts, and of expert compute to hide that."""

    tokens: int
    pulled_bytes: int
    pull_s: float
    compute_s: float
    more: str = ""  # what else can be done here

    @property
    def hides(self) -> bool:
        """Whether expert compute alone is as long as the pull."""
        return self.compute_s >= self.pull_s

    def describe(self) -> str:
        """The two figures, and what can be done."""
        needed = int(self.tokens * self.pull_s / self.compute_s) + 1
        return (
            f"a forward pulls {self.pulled_bytes / 1e6:.1f} MB, about {self.pull_s * 1e3:.1f} ms, but "
            f"max_num_batched_tokens={self.tokens} gives at most about {self.compute_s * 1e3:.1f} ms of expert compute to "
            f"hide it: compute will wait; use about {needed} tokens per step, more experts_per_rank{self.more}"
        )


def copy_rate(engine: CopyEngine, program: Program, timeout_s: float) -> float:
    """Bytes per second of one layer's copies; they run twice, since the first run touches the pages."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        engine.finish(engine.submit(program), timeout_s)
        seconds = time.perf_counter() - started
    return (program.pulled_bytes + program.merged_bytes) / seconds


def product_rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """FLOP per second of a matrix product on this rank's cores, or on its GPU; FP8 counts as BF16."""
    on_gpu = torch.device(device).type == "cuda"
    size = _PRODUCT_ON_GPU if on_gpu else _PRODUCT
    a = torch.ones(size, size, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype, device=device)
    a @ a
    best = float("inf")
    for _ in range(_REPEATS):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def estimate(
    programs: Sequence[Program], flop_per_token: int, tokens: int, rate: float, flop_rate: float, more: str = ""
) -> Window:
    """The window of a forward: `flop_per_token` over all MoE layers, `rate` in bytes/s, `flop_rate` in FLOP/s."""
    pulled = sum(program.pulled_bytes for program in programs)
    copied = pulled + sum(program.merged_bytes for program in programs)
    return Window(tokens, pulled, copied / rate, flop_per_token * tokens / flop_rate, more)
