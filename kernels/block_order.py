"""Where experts lie over a link: in which order the pointer kernel computes row blocks, and how single routes share them."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import Tiles


@triton.jit
def spread_block(block, used, SPREAD: tl.constexpr):
    """The row block computed `block`-th of `used`: the first of SPREAD equal runs of blocks, then the second of each, ...

    The runs go in order of experts, so that experts from all over are in flight at once. Blocks past `used` stay.
    """
    run = used // SPREAD
    longer = used % SPREAD  # runs of one block more; these last blocks are computed at the end
    even = run * SPREAD
    of_run = tl.where(block < even, block % SPREAD, block - even)
    place = tl.where(block < even, block // SPREAD, run)
    return tl.where(block < used, of_run * run + tl.minimum(of_run, longer) + place, block)


@triton.jit
def joined_routes(experts_ptr, block, expert, num_routes, BLOCK_M: tl.constexpr, ROUTES: tl.constexpr):
    """Of single routes: those of `expert` from that of `block` on, BLOCK_M at most; and how many of it come before.

    Returns int32 [BLOCK_M], padded with num_routes, and a number.
    """
    every = tl.arange(0, ROUTES)
    same = tl.load(experts_ptr + every, mask=every < num_routes, other=-2) == expert
    before = tl.sum(tl.where(every < block, same.to(tl.int32), 0), 0)
    rank = tl.cumsum(same.to(tl.int32), 0) - 1 - before
    chosen = same[None, :] & (rank[None, :] == tl.arange(0, BLOCK_M)[:, None])
    # One at most is chosen in a row.
    return num_routes + tl.sum(tl.where(chosen, every[None, :] - num_routes, 0), 1), before


def order(single_routes: int, tiles: Tiles) -> dict[str, int]:
    """Constants of the pointer kernel; single_routes: how many there are, 0 where routes are sorted by expert.

    Single routes come in the router's order, which mixes experts as it is.
    """
    if single_routes == 0 or tiles.spread == 1:
        return {"SPREAD": tiles.spread, "JOIN": 0}
    return {"SPREAD": 1, "JOIN": max(16, triton.next_power_of_2(single_routes))}
