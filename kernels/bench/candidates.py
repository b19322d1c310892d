"""Tiles worth trying, by what limits a layer: hand-chosen for Hopper, few enough to measure all of them within minutes.

Up to about 8 routes per expert the weights' bytes limit: flat tiles, deep loads. From about 48 on the matrix units do: tiles
of 128 x 256 read the fewest bytes per operation, 64 x 256 waste less on half-filled blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..tiles import Tiles

CHOICES: dict[str, tuple[Any, ...]] = {
    "kernel": ("pointer", "persistent"),
    "block_m": (16, 32, 64, 128),
    "block_n": (32, 64, 128, 256),
    "block_k": (64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
    "group_m": (1, 4, 16, 64),
}
#: Bytes of shared memory that a program can have; stages that need more are not tried.
SHARED = 227 * 1024

_FLAT = ((16, 64, 128, 1, 4, 4), (16, 128, 64, 1, 4, 4), (16, 32, 256, 1, 4, 3), (16, 64, 256, 1, 4, 3),
         (16, 32, 128, 1, 4, 5), (16, 128, 128, 1, 8, 3), (16, 64, 64, 1, 4, 5))  # fmt: skip
_MIDDLE = ((16, 128, 64, 1, 4, 4), (16, 64, 128, 1, 4, 4), (32, 128, 64, 1, 4, 4), (32, 64, 128, 1, 4, 3),
           (64, 128, 64, 1, 4, 4), (64, 64, 128, 1, 4, 3), (32, 256, 64, 1, 8, 3), (16, 128, 128, 1, 4, 3))  # fmt: skip
_TALL = ((128, 256, 64, 8, 8, 4, "persistent"), (128, 256, 64, 8, 8, 3), (128, 128, 64, 8, 8, 3),
         (128, 256, 64, 8, 8, 3, "persistent"), (128, 128, 64, 8, 4, 3, "persistent"), (64, 256, 64, 8, 8, 4, "persistent"),
         (128, 256, 64, 8, 8, 4), (64, 256, 64, 8, 4, 3), (64, 128, 64, 8, 4, 4), (128, 128, 64, 16, 8, 4),
         (128, 128, 64, 8, 4, 3))  # fmt: skip
_FLAT_BLOCK = ((16, 64, 128, 1, 4, 4), (16, 64, 128, 1, 4, 3), (16, 128, 128, 1, 4, 4), (16, 64, 128, 1, 4, 5),
               (16, 128, 128, 1, 8, 4), (16, 128, 128, 1, 4, 3))  # fmt: skip
_MIDDLE_BLOCK = ((16, 128, 128, 1, 4, 4), (16, 64, 128, 1, 4, 4), (32, 128, 128, 1, 4, 4), (32, 64, 128, 1, 4, 4),
                 (64, 128, 128, 1, 4, 4), (64, 64, 128, 1, 4, 4))  # fmt: skip
_TALL_BLOCK = ((64, 128, 128, 8, 4, 4), (128, 128, 128, 8, 8, 4), (128, 128, 128, 8, 8, 3, "persistent"),
               (64, 128, 128, 8, 4, 3, "persistent"), (64, 128, 128, 32, 4, 4), (64, 256, 128, 8, 8, 3),
               (128, 64, 128, 8, 4, 4), (64, 128, 128, 8, 4, 4, "persistent"))  # fmt: skip


def fits(tiles: Tiles, itemsize: int) -> bool:
    """Whether the stages of A and W tiles fit the shared memory, and the accumulator the registers."""
    stage = (tiles.block_m + tiles.block_n) * tiles.block_k * itemsize
    accumulator = tiles.block_m * tiles.block_n * 4 / (tiles.num_warps * 32)
    return stage * (tiles.num_stages - 1) <= SHARED and accumulator <= 4 * 128


def listed(routes_per_expert: float, block_scales: bool) -> list[Tiles]:
    """The list for a number of routes per expert, best guesses first."""
    chosen: tuple[tuple[Any, ...], ...]
    if routes_per_expert < 6:
        chosen = _FLAT_BLOCK if block_scales else _FLAT
    elif routes_per_expert < 48:
        chosen = _MIDDLE_BLOCK if block_scales else _MIDDLE
    else:
        chosen = _TALL_BLOCK if block_scales else _TALL
    return [Tiles(*sizes) for sizes in chosen]


def neighbours(tiles: Tiles, itemsize: int, names: tuple[str, ...] = tuple(CHOICES)) -> Iterator[Tiles]:
    """Every configuration that differs in one of these things."""
    for name in names:
        for value in CHOICES[name]:
            if value == getattr(tiles, name):
                continue
            found = replace(tiles, **{name: value})
            if found.kernel == "persistent" and found.group_m == 1:
                # There a group is what keeps an expert's row blocks together.
                found = replace(found, group_m=16)
            if fits(found, itemsize):
                yield found
