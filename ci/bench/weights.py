"""Random weights on disk for a model of models.py: for servers that are compared by their bytes, or read them twice.

Written about as fast as memory is copied: every tensor is made of parts of one pool of random numbers, each from a place of
its own, so that no two experts are alike.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from ci.bench.models import MODELS
from examples.checkpoints import CheckpointSpec
from examples.checkpoints.fp8 import is_stored_in_fp8
from examples.checkpoints.spec import FP8_BLOCK
from examples.checkpoints.weights import as_on_disk, distribution

if TYPE_CHECKING:
    import torch

#: Numbers in the pool; a part is a quarter of it at most.
_POOL: Final = 1 << 24
_TYPES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float8_e4m3fn": "F8_E4M3"}
#: Of matrices in FP8: four of these are the largest number that there is.
_FP8_STD: Final = 112.0


class _Stored(NamedTuple):
    """A tensor on disk, and how its numbers are drawn; dtype: torch's name of it. Beyond four standard deviations there
    are none."""

    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float


def write_weights(name: str, folder: Path) -> int:
    """Write model.safetensors of the model `name` of MODELS, whose config is in `folder`; returns its bytes.

    Raises ValueError where there is a reason `why_not`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    spec, _ = MODELS[name]
    if reason := why_not(name):
        raise ValueError(reason)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=getattr(torch, spec.dtype))
    wanted = _stored(as_on_disk(model.state_dict(), spec), spec)
    header, at = dict[str, object](), 0
    for tensor_name, each in wanted.items():
        end = at + math.prod(each.shape) * getattr(torch, each.dtype).itemsize
        header[tensor_name] = {"dtype": _TYPES[each.dtype], "shape": list(each.shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    head += b" " * (-len(head) % 8)
    numbers = torch.empty(_POOL).normal_(generator=torch.Generator().manual_seed(spec.seed)).clamp_(-4.0, 4.0)

    @cache
    def pool(mean: float, std: float, dtype: str) -> torch.Tensor:
        return (numbers * std + mean).to(getattr(torch, dtype))

    file = folder / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for tensor_name, each in wanted.items():
            values = pool(each.mean, each.std, each.dtype)
            for first, last in parts(tensor_name, math.prod(each.shape), len(values)):
                stream.write(values[first:last].view(torch.uint8).numpy().data)
    return file.stat().st_size


def why_not(name: str) -> str:
    """Why no weights are made for the model `name` of MODELS, in one line; empty where they are."""
    spec, _ = MODELS[name]
    if not spec.experts and not spec.is_fused:
        return ""
    made = ", ".join(each for each, (spec, _) in MODELS.items() if not spec.experts and not spec.is_fused)
    return f"model {name}: only weights of one type or in FP8 blocks, expert by expert, are made: take {made}"


def _stored(wanted: Mapping[str, torch.Tensor], spec: CheckpointSpec) -> dict[str, _Stored]:
    found: dict[str, _Stored] = {}
    for name, tensor in wanted.items():
        mean, std = distribution(name, tensor.dim(), spec)
        if spec.fp8 and is_stored_in_fp8(name, tensor.dim()):
            found[name] = _Stored(tuple(tensor.shape), "float8_e4m3fn", 0.0, _FP8_STD)
            blocks = tuple(-(-size // FP8_BLOCK) for size in tensor.shape)
            # Scales differ, so that one of another block would be seen.
            found[f"{name}_scale_inv"] = _Stored(blocks, "float32", std / _FP8_STD, 0.1 * std / _FP8_STD)
        else:
            # Routers score with a correction in float32 whatever the model's type is.
            dtype = "float32" if name.endswith("e_score_correction_bias") else spec.dtype
            found[name] = _Stored(tuple(tensor.shape), dtype, mean, std)
    return found


def parts(name: str, count: int, pool: int) -> Iterator[tuple[int, int]]:
    """Where in a pool of `pool` numbers those of a tensor are: half-open ranges, the same for the same name."""
    places = random.Random(name)
    while count:
        length = min(count, pool // 4)
        first = places.randrange(pool - length)
        yield first, first + length
        count -= length
