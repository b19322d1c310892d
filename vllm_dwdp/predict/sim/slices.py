"""One layer's pulls slice by slice, to check the fluid picture: sources serve slices in the order they are asked."""

from __future__ import annotations

import heapq


def simulate_slices(
    ranks: int,
    pull_bytes: float,
    slice_bytes: float,
    rate: float,
    *,
    rotated: bool = True,
    starts: list[float] | None = None,
) -> list[float]:
    """[ranks] seconds from each rank's start until its last slice has arrived.

    Every rank asks its peers in turn, for one slice each, and for the next when that has arrived. A source sends one
    slice at a time at `rate` bytes/s. rotated: rank r begins with peer r+1; otherwise all go through the peers upwards
    from rank 0, the known mistake.
    """
    begin = [0.0] * ranks if starts is None else list(starts)
    per_peer = pull_bytes / (ranks - 1)
    full, rest = divmod(per_peer, slice_bytes)
    sizes = [slice_bytes] * int(full) + ([rest] if rest > per_peer * 1e-9 else [])
    plans = []
    for r in range(ranks):
        peers = [(r + i) % ranks for i in range(1, ranks)]
        if not rotated:
            peers.sort()
        plans.append([(peer, size) for size in sizes for peer in peers])
    source_free = [0.0] * ranks
    position = [0] * ranks
    ended = begin[:]
    # (time of asking, order of asking, reader): sources serve in this order.
    asked = [(begin[r], r, r) for r in range(ranks)]
    heapq.heapify(asked)
    order = ranks
    while asked:
        now, _, r = heapq.heappop(asked)
        if position[r] >= len(plans[r]):
            ended[r] = now
            continue
        peer, size = plans[r][position[r]]
        position[r] += 1
        done = max(now, source_free[peer]) + size / rate
        source_free[peer] = done
        heapq.heappush(asked, (done, order, r))
        order += 1
    return [e - b for e, b in zip(ended, begin, strict=True)]
