"""Which tiles to use: measured tables (tables.py), then vLLM's tuned ones, then vLLM's defaults.

A table holds what `tune.py` measured to be faster than vLLM's choice for that very shape, on that device or one with the
same compute units, so it goes first. Other tiles may round other bits than vLLM's choice does; both are as far from the
exact result.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from .tables import FOLDER, chip_of, measured
from .tiles import Tiles
from .weight_table import WeightTable


class LayerShape(NamedTuple):
    """What tiles depend on beside the number of tokens.

    rows: 2 I. hidden: H. width: I. dtype: 'bf16', 'fp16', 'fp32', 'fp8' or 'fp8_block'.
    """

    experts: int
    rows: int
    hidden: int
    width: int
    dtype: str
    top_k: int

    @property
    def key(self) -> str:
        """Name in a table."""
        return f"E={self.experts},N={self.rows},H={self.hidden},I={self.width},dtype={self.dtype},top_k={self.top_k}"


def layer_shape(w13: WeightTable, w2: WeightTable, top_k: int) -> LayerShape:
    """Of a layer's tables."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8"}
    dtype = names[w13.dtype]
    if w13.scales is not None and w13.scales.kind == "block":
        dtype = "fp8_block"
    return LayerShape(w13.num_experts, w13.rows, w13.cols, w2.cols, dtype, top_k)


#: An entry serves batches of half to twice its own number of tokens: tables are sparse, and what is fastest changes slowly.
REACH = 2.0


def nearest(entries: dict[int, Tiles], num_tokens: int) -> Tiles | None:
    """The entry nearest by ratio, if within `REACH`; the largest one serves everything above it."""

    def apart(tokens: int) -> float:
        return max(tokens / num_tokens, num_tokens / tokens) if num_tokens else float(tokens)

    best = min(entries, key=apart)
    return entries[best] if apart(best) <= REACH or num_tokens >= max(entries) else None


def default_tiles(dtype: str, num_tokens: int) -> Tiles:
    """Tiles for where neither a table nor vLLM is at hand (tests on a CPU)."""
    block_m = 16 if num_tokens <= 32 else 64
    return Tiles(block_m, 64, 128 if dtype.startswith("fp8") else 64, 1, 4, 3)


def forced_tiles(device: torch.device) -> Tiles | None:
    """Those that a caller of vLLM's `override_config` asked for, if any."""
    if device.type != "cuda":
        return None
    from . import vllm_ops

    forced = vllm_ops.forced_config()
    return Tiles.from_vllm(forced) if forced else None


def tiles_for(
    shape: LayerShape,
    num_tokens: int,
    device: torch.device,
    block: tuple[int, int] | None = None,
    *,
    own: bool = True,
    folder: Path = FOLDER,
) -> Tiles:
    """Tiles for a layer and a batch of `num_tokens`; callers keep the answer, so it may read files.

    Args:
        block: (group_n, group_k) of block scales, None otherwise.
        own: False for what vLLM itself would use.
        folder: of measured tables; rows that they lack come from the shipped ones.
    """
    if (forced := forced_tiles(device)) is not None:
        return forced
    if own:
        entries = measured(folder, chip_of(device)).get(shape.key)
        tuned = nearest(entries, num_tokens) if entries else None
        if tuned is not None:
            return tuned
    if device.type != "cuda":
        return default_tiles(shape.dtype, num_tokens)
    from . import vllm_ops

    # vLLM's names: nothing for 16 bits, one word for all FP8.
    dtype = {"fp32": "float32", "fp8": "fp8_w8a8", "fp8_block": "fp8_w8a8"}.get(shape.dtype)
    return Tiles.from_vllm(vllm_ops.best_config(shape[:4], shape.top_k, dtype, num_tokens, block))
