"""Which tiles to use: measured tables per device beside this file, then vLLM's tuned ones, then vLLM's defaults.

A table holds what `tune.py` measured to be faster than vLLM's choice for that very device and shape, so it goes first. Other
tiles may round other bits than vLLM's choice does; both are as far from the exact result.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_dwdp.errors import DwdpError

from .tiles import Tiles
from .weight_table import WeightTable

FOLDER = Path(__file__).parent / "configs"


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


def device_name(device: torch.device) -> str:
    """As in file names: 'NVIDIA_H200'; 'cpu' for the interpreter."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^A-Za-z0-9]+", "_", torch.cuda.get_device_name(device)).strip("_")


@lru_cache
def read_table(path: Path) -> dict[str, dict[int, Tiles]]:
    """Shape key -> tokens -> tiles; empty where there is no such file. Raises DwdpError for one that makes no sense."""
    if not path.exists():
        return {}
    try:
        raw: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text())["shapes"]
        return {
            key: {int(tokens): Tiles(**entry["tiles"]) for tokens, entry in entries.items()}
            for key, entries in raw.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DwdpError(f"{path} is no table of tiles ({error}): write it with vllm_dwdp.kernels.tune") from error


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
        folder: of the measured tables.
    """
    on_cuda = device.type == "cuda"
    if on_cuda:
        from . import vllm_ops

        forced = vllm_ops.forced_config()
        if forced:
            return Tiles.from_vllm(forced)
    if own:
        entries = read_table(folder / f"{device_name(device)}.json").get(shape.key)
        measured = nearest(entries, num_tokens) if entries else None
        if measured is not None:
            return measured
    if not on_cuda:
        return default_tiles(shape.dtype, num_tokens)
    # vLLM's names: nothing for 16 bits, one word for all FP8.
    dtype = {"fp32": "float32", "fp8": "fp8_w8a8", "fp8_block": "fp8_w8a8"}.get(shape.dtype)
    return Tiles.from_vllm(vllm_ops.best_config(shape[:4], shape.top_k, dtype, num_tokens, block))
