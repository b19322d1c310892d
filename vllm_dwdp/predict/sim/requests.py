"""Request streams: when they arrive, how long they are, how much of each is in the prefix cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_dwdp.predict.work import Lengths


class Request(NamedTuple):
    """`arrival` in seconds; `new` tokens to prefill after `cached` ones; `out` tokens to generate."""

    arrival: float
    new: int
    cached: int
    out: int


@dataclass(frozen=True)
class Stream:
    """One rank's requests. rate: requests/s. burst: mean requests that arrive together (1: Poisson).

    hit_rate: share of requests whose prompt is found in the prefix cache, for `hit_share` of its tokens.
    """

    rate: float
    lengths: Lengths
    osl: int = 1
    burst: float = 1.0
    hit_rate: float = 0.0
    hit_share: float = 0.5

    def draw(self, seconds: float, rng: np.random.Generator) -> list[Request]:
        """The arrivals of that many seconds, in order."""
        count = int(rng.poisson(self.rate / self.burst * seconds))
        starts = np.sort(rng.uniform(0, seconds, count))
        # Batches of geometric size: the same mean rate, arrivals in clumps.
        sizes = rng.geometric(1 / self.burst, count) if self.burst > 1 else np.ones(count, dtype=int)
        times = np.repeat(starts, sizes)
        total = np.maximum(1, self.lengths.draw(rng, (len(times),)).round().astype(int))
        hits = rng.uniform(size=len(times)) < self.hit_rate
        cached = np.where(hits, np.minimum(total - 1, (total * self.hit_share).astype(int)), 0)
        return [
            Request(t, n - c, c, self.osl)
            for t, n, c in zip(times.tolist(), total.tolist(), cached.tolist(), strict=True)
        ]
