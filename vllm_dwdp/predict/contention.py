"""What ranks that pull at once cost each other: as measured, else by the paper's binomial model (T2) of pulls that meet at
one source, with and without slices."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from vllm_dwdp.errors import DwdpError


def binomial(trials: int, probability: float) -> list[float]:
    """P(k) for k = 0..trials, from log-gamma so that thousands of trials do not overflow."""
    if probability <= 0:
        return [1.0] + [0.0] * trials
    if probability >= 1:
        return [0.0] * trials + [1.0]
    lead = math.lgamma(trials + 1)
    yes, no = math.log(probability), math.log1p(-probability)
    return [
        math.exp(lead - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * yes + (trials - k) * no)
        for k in range(trials + 1)
    ]


def meeting(ranks: int, duty: float = 1.0) -> list[float]:
    """P(C) for C = 1..ranks-1: a pull shares its source with C-1 others, C-1 ~ Binomial(N-2, duty/(N-1)).

    `duty`: share of the time in which another rank pulls at all; the paper's T2 has 1.
    """
    if ranks < 2:
        raise DwdpError(f"contention needs at least 2 ranks, got {ranks}")
    return binomial(ranks - 2, duty / (ranks - 1))


def simulate_meeting(ranks: int, draws: int, seed: int) -> list[float]:
    """The same by drawing: every other rank picks one of its N-1 peers at random; how many picked ours?"""
    rng = np.random.default_rng(seed)
    # Rank 0 pulls from rank 1. Ranks 2..N-1 each pick among N-1 peers; one of these is rank 1.
    picks = rng.integers(0, ranks - 1, (draws, ranks - 2)) == 0
    counts = np.bincount(picks.sum(axis=1), minlength=ranks - 1)
    return [float(c) / draws for c in counts]


@lru_cache(maxsize=4096)
def _spread(ranks: int, duty: float) -> tuple[np.ndarray, np.ndarray]:
    """(slowdown, probability) of one layer's pulls from all N-1 peers, whole tensors, one after the other."""
    pulls = (ranks - 1) * (ranks - 2)
    chance = np.array(binomial(pulls, duty / (ranks - 1)))
    keep = chance > 1e-12
    return (1 + np.arange(pulls + 1)[keep] / (ranks - 1)), chance[keep] / chance[keep].sum()


def slowdowns(
    ranks: int, duty: float, sliced: bool = False, at_once: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(factor, probability): how much longer a layer's pulls take than alone.

    at_once: measured rate of a rank while all pull all the time (duty 1), over its rate alone; with duty the factor grows
    evenly to that. None, nothing measured, is the paper's model: each of the N-1 pulls takes C times as long, C as in
    `meeting`; with `sliced`, where slices of all peers take turns, every source serves its readers evenly: the factor is 1.
    """
    if at_once is not None:
        return np.array([1 + min(max(duty, 0.0), 1.0) * (1 / at_once - 1)]), np.ones(1)
    if sliced or ranks <= 2:
        return np.ones(1), np.ones(1)
    return _spread(ranks, round(min(max(duty, 0.0), 1.0), 3))


def exposed(
    pull: float, window: float, ranks: int, duty: float, sliced: bool = False, at_once: float | None = None
) -> tuple[float, float]:
    """(mean seconds of the pull, mean seconds of it that `window` does not hide), per layer."""
    factor, chance = slowdowns(ranks, duty, sliced, at_once)
    durations = pull * factor
    return float(durations @ chance), float(np.clip(durations - window, 0, None) @ chance)
