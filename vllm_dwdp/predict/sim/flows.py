"""The layers of a DWDP group in detail: every rank computes and pulls one layer ahead, and pulls share their source.

Copies are fluid: a source's bandwidth is divided evenly among the pulls that read it at the moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Order = Literal["rotated", "ascending", "random"]
_EPSILON = 1e-12


class Span(NamedTuple):
    """Something a rank did from `start` to `end` (s): `what` is 'compute', 'wait' or 'pull', for `layer`."""

    rank: int
    what: str
    layer: int
    start: float
    end: float


@dataclass(frozen=True)
class Layers:
    """A group's run. exposed: [ranks] seconds waited. pull: mean seconds of a layer's pull. spans: the timeline."""

    seconds: float
    exposed: list[float]
    pull: float
    spans: list[Span]


def simulate_layers(
    windows: np.ndarray,
    pull_bytes: float,
    rate: float,
    *,
    sliced: bool,
    order: Order = "random",
    starts: list[float] | None = None,
    seed: int = 0,
    keep: bool = False,
) -> Layers:
    """Run [ranks, layers] windows (s of compute) with `pull_bytes` from the peers per layer at `rate` bytes/s.

    The pull of layer l+1 starts with the compute of layer l, whose end frees no slot that it needs; layer 0 is there.
    sliced: slices of all peers take turns, so that a source serves its N-1 possible readers rate / (N-1) each and is
    never overbooked. Otherwise peers are read one after the other, in `order`. starts: s, when each rank begins.
    """
    ranks, layers = windows.shape
    rng = np.random.default_rng(seed)
    part = pull_bytes if sliced else pull_bytes / (ranks - 1)
    begin = [0.0] * ranks if starts is None else list(starts)
    layer = [-1] * ranks
    compute_end: list[float] = begin[:]
    computing = [True] * ranks
    pulling = [False] * ranks
    ready = [0] * ranks
    left = [0.0] * ranks
    source = [-1] * ranks
    queue: list[list[int]] = [[] for _ in range(ranks)]
    pull_start, exposed = [0.0] * ranks, [0.0] * ranks
    durations: list[float] = []
    spans: list[Span] = []
    now, active = 0.0, ranks

    def start_layer(r: int) -> None:
        """Compute of the next layer begins, and with it the pull of the one after."""
        waited = now - compute_end[r]
        if keep and waited > _EPSILON:
            spans.append(Span(r, "wait", layer[r] + 1, compute_end[r], now))
        exposed[r] += max(0.0, waited)
        layer[r] += 1
        computing[r] = True
        compute_end[r] = now + float(windows[r, layer[r]])
        if keep:
            spans.append(Span(r, "compute", layer[r], now, compute_end[r]))
        if layer[r] + 1 < layers:
            pulling[r], left[r], pull_start[r] = True, part, now
            if not sliced:
                queue[r] = _peers(r, ranks, order, rng)
                source[r] = queue[r].pop(0)

    while active:
        readers = [0] * ranks
        for r in range(ranks):
            if pulling[r] and not sliced:
                readers[source[r]] += 1
        speed = [(rate if sliced else rate / readers[source[r]]) if pulling[r] else 0.0 for r in range(ranks)]
        ends = [compute_end[r] for r in range(ranks) if computing[r]]
        ends += [now + left[r] / speed[r] for r in range(ranks) if pulling[r]]
        then = min(ends)
        for r in range(ranks):
            if pulling[r]:
                left[r] -= speed[r] * (then - now)
        now = then
        for r in range(ranks):
            if pulling[r] and left[r] <= part * 1e-9:
                if queue[r]:
                    source[r], left[r] = queue[r].pop(0), part
                else:
                    pulling[r] = False
                    ready[r] = layer[r] + 1
                    durations.append(now - pull_start[r])
                    if keep:
                        spans.append(Span(r, "pull", layer[r] + 1, pull_start[r], now))
            if computing[r] and compute_end[r] <= now + _EPSILON:
                computing[r] = False
                if layer[r] + 1 >= layers:
                    active -= 1
                    layer[r] = layers
            if not computing[r] and layer[r] + 1 < layers and ready[r] == layer[r] + 1:
                start_layer(r)
    return Layers(now, exposed, float(np.mean(durations)) if durations else 0.0, spans)


def _peers(rank: int, ranks: int, order: Order, rng: np.random.Generator) -> list[int]:
    peers = [(rank + i) % ranks for i in range(1, ranks)]
    if order == "ascending":
        return sorted(peers)
    return [peers[i] for i in rng.permutation(ranks - 1)] if order == "random" else peers
