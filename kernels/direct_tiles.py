"""Tiles for layers of which some experts are read where they lie, in a peer's memory.

This device's L2 cache keeps nothing of what comes over a link, so every row block of an expert reads its weights over it
once more. Here a block is as tall as the rows of an expert need, each tile of weights is read once, and blocks are computed
in an order in which own experts and peers' are in flight together. What else a tile has is measured (`ci/bench/direct.py
--search`) and kept in the tables of tables.py, under the shape's key with ",direct" behind it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import exp, lgamma, log, log1p
from pathlib import Path
from typing import Final

import torch

from .configs import LayerShape, forced_tiles, nearest
from .tables import FOLDER, chip_of, measured
from .tiles import Tiles

#: How likely the rows of an expert fit one block, where the router takes every expert equally often.
COVERED: Final = 0.99
#: Rows of a block. From there on an expert has work for several blocks, and computing takes longer than reading.
HEIGHTS: Final = (16, 32, 64, 128)
#: With missing experts spread over 16 runs, every run has its part of them wherever they lie.
SPREAD: Final = 16


def direct_key(shape: LayerShape) -> str:
    """Name in a table."""
    return f"{shape.key},direct"


@lru_cache
def likelihood(rows: int, num_tokens: int, top_k: int, experts: int) -> float:
    """Of an expert having at most `rows` of `num_tokens` tokens, each of which takes `top_k` of `experts`, all alike."""
    if rows >= num_tokens:
        return 1.0
    share = top_k / experts
    if share >= 1:
        return 0.0

    def exactly(count: int) -> float:
        ways = lgamma(num_tokens + 1) - lgamma(count + 1) - lgamma(num_tokens - count + 1)
        return exp(ways + count * log(share) + (num_tokens - count) * log1p(-share))

    return sum(map(exactly, range(rows + 1)))


def height(num_tokens: int, top_k: int, experts: int) -> int:
    """Rows of a block that hold those of an expert with a likelihood of `COVERED`; the tallest where none does."""
    return next((rows for rows in HEIGHTS if likelihood(rows, num_tokens, top_k, experts) >= COVERED), HEIGHTS[-1])


def default_direct(dtype: str, block_m: int) -> Tiles:
    """Where nothing was measured: rows of weights in pieces of 128 bytes at least, and some 50 KiB of them in flight."""
    tall = block_m >= 128
    if dtype == "fp8_block":
        # 128 columns share a scale.
        block_n, block_k, stages = 128, 128, 4
    elif dtype == "fp32":
        block_n, block_k, stages = 32, 64, 3
    else:
        block_n, block_k, stages = (128, 64, 4) if tall else (64, 128, 4)
    return Tiles(block_m, block_n, block_k, 1, 8 if tall else 4, stages, spread=SPREAD)


def direct_tiles_for(
    shape: LayerShape,
    num_tokens: int,
    device: torch.device,
    block: tuple[int, int] | None = None,
    *,
    folder: Path = FOLDER,
) -> Tiles:
    """Tiles for a layer and a batch of `num_tokens` that reads experts over a link; arguments as `tiles_for` takes them."""
    if (forced := forced_tiles(device)) is not None:
        return forced
    block_m = height(num_tokens, shape.top_k, shape.experts)
    # An entry serves batches of other sizes too: not those whose experts have more rows than its blocks.
    known = measured(folder, chip_of(device)).get(direct_key(shape), {})
    entries = {tokens: tiles for tokens, tiles in known.items() if tiles.block_m >= block_m}
    tiles = (nearest(entries, num_tokens) if entries else None) or default_direct(shape.dtype, block_m)
    return tiles if block is None else replace(tiles, block_k=min(tiles.block_k, *block))
