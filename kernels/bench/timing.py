"""Times two ways of computing the same thing in turns, and says how sure their ratio is."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Pairs:
    """Seconds per call of both sides, measured in turns: entry i of both under the same conditions."""

    base: list[float]
    own: list[float]

    @property
    def ratios(self) -> list[float]:
        """base / own: above 1 is faster than the base."""
        return [base / own for base, own in zip(self.base, self.own, strict=True)]


def captured(calls: Sequence[Call], device: torch.device) -> list[Call]:
    """Each as a CUDA graph, so that launches cost the host nothing; as they are on a CPU. Warms up first.

    The graphs share their memory: replay them one after another, and do not look at what they leave.
    """
    calls[0]()
    if device.type != "cuda":
        return list(calls)
    side, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    made: list[Call] = []
    for call in calls:
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            call()
        made.append(graph.replay)
    return made


def seconds(call: Call, times: int, device: torch.device) -> float:
    """Of one call, over `times` in a row; device time on a GPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begin) / times
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(times):
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / times


def in_turns(base: Sequence[Call], own: Sequence[Call], device: torch.device, pairs: int, pair_s: float) -> Pairs:
    """`pairs` measurements of each side, alternating in who goes first; each takes about half of `pair_s`.

    Both sides are lists of calls (other inputs each), used in turn within a measurement, so that caches are not warmer
    than they are in a model.
    """

    def cycle(calls: Sequence[Call]) -> Call:
        def run() -> None:
            for call in calls:
                call()

        return run

    both = (cycle(base), cycle(own))
    times = max(1, int(pair_s / 2 / max(seconds(both[0], 1, device), 1e-6)))
    found: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for side in (pair % 2, 1 - pair % 2):
            found[side].append(seconds(both[side], times, device) / len(base))
    return Pairs(*found)


def lower_bound(per_shape: Sequence[Sequence[float]], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """(geometric mean over shapes of each one's median ratio, its lower 95 % bound by resampling the pairs)."""

    def mean(samples: Sequence[Sequence[float]]) -> float:
        return statistics.geometric_mean([statistics.median(ratios) for ratios in samples])

    dice = random.Random(seed)
    drawn = sorted(mean([dice.choices(ratios, k=len(ratios)) for ratios in per_shape]) for _ in range(draws))
    # The lower end of the two-sided interval: 2.5 % lie below.
    return mean(per_shape), drawn[int(0.025 * draws)]
