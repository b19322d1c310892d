"""Engines that only compute prompts: how many a rate of requests takes, and how long a first token then is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from vllm_dwdp.predict.strategies import Step

#: Sizes of steps that are looked at, up to the largest.
_SIZES: Final = 12
_ROUNDS: Final = 40
MOST_GROUPS: Final = 1 << 20


@dataclass(frozen=True)
class PrefillGroup:
    """A group of `ranks` that computes prompts of `prompt` tokens on average. sizes, seconds: tokens of a rank's step, from
    one prompt (or what a step takes of it) to the most, and what it takes. lockstep: its ranks wait for each other."""

    way: str
    ranks: int
    prompt: float
    sizes: tuple[float, ...]
    seconds: tuple[float, ...]
    lockstep: bool

    @property
    def prompts_per_s(self) -> float:
        """The most of the group, with full steps."""
        return self.ranks * self.sizes[-1] / self.seconds[-1] / self.prompt

    def step_s(self, tokens: float) -> float:
        """Of a step, between the sizes that were looked at."""
        return float(np.interp(tokens, self.sizes, self.seconds))

    def ttft_s(self, prompts_per_s: float) -> float:
        """Mean seconds until a prompt is computed, if that many come to the group, at random; infinite above what it can.

        A queue whose server takes all that waits, up to a full step: with one prompt a step it is M/D/1.
        """
        load = prompts_per_s / self.prompts_per_s
        if load >= 1:
            return math.inf
        mine, parts = prompts_per_s / self.ranks, max(1.0, self.prompt / self.sizes[-1])
        tokens = self.sizes[0]
        for _ in range(_ROUNDS):
            tokens = min(max(mine * self.step_s(tokens) * self.prompt, self.sizes[0]), self.sizes[-1])
        step = parts * self.step_s(tokens)
        busy = min(1.0, mine * parts * self.seconds[0])
        if self.lockstep:
            busy = 1 - (1 - busy) ** self.ranks
        together = max(1.0, self.sizes[-1] / self.prompt)
        return step + busy * step / 2 / (1 - load**together)


def prefill_group(
    way: str, ranks: int, prompt: float, tokens_per_step: int, step: Callable[[int], Step]
) -> PrefillGroup:
    """`step`: what a step of that many tokens of a rank takes."""
    least = min(round(prompt), tokens_per_step)
    sizes = sorted(
        {*np.geomspace(max(1, least), tokens_per_step, _SIZES).round().astype(int).tolist(), tokens_per_step}
    )
    # A step with more tokens takes no less time, whatever was drawn.
    seconds = np.maximum.accumulate([step(size).seconds for size in sizes])
    return PrefillGroup(way, ranks, prompt, tuple(map(float, sizes)), tuple(seconds.tolist()), lockstep=way == "DEP")


def groups_needed(group: PrefillGroup, rate: float, ttft_s: float) -> int | None:
    """The fewest groups at which `rate` requests/s wait `ttft_s` on average at most; None if no number does."""
    least = max(1, math.ceil(rate / group.prompts_per_s))

    def enough(groups: int) -> bool:
        found = group.ttft_s(rate / groups)
        return math.isfinite(found) and found <= ttft_s

    low, high = least - 1, least
    while not enough(high):
        if high > MOST_GROUPS:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
