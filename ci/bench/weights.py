"""Random weights on disk for a model of models.py: for servers that are compared by their bytes, or read them twice.

Written about as fast as memory is copied: every tensor is made of parts of one pool of random numbers, each from a place of
its own, so that no two experts are alike.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ci.bench.models import MODELS
from examples.checkpoints.weights import as_on_disk, distribution

if TYPE_CHECKING:
    import torch

#: Numbers in the pool; a part is a quarter of it at most.
_POOL: Final = 1 << 24
_TYPES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def write_weights(name: str, folder: Path) -> int:
    """Write model.safetensors of the model `name` of MODELS, whose config is in `folder`; returns its bytes.

    Raises ValueError for a model whose weights are quantised, or whose experts are fused.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    spec, _ = MODELS[name]
    if spec.fp8 or spec.experts or spec.is_fused:
        raise ValueError(f"model {name}: only weights of one type, expert by expert, are written here: take qwen3")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=getattr(torch, spec.dtype))
    wanted = as_on_disk(model.state_dict(), spec)
    header, at = dict[str, object](), 0
    for tensor_name, tensor in wanted.items():
        end = at + tensor.nbytes
        header[tensor_name] = {"dtype": _TYPES[spec.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    head += b" " * (-len(head) % 8)
    numbers = torch.empty(_POOL).normal_(generator=torch.Generator().manual_seed(spec.seed))

    @cache
    def pool(mean: float, std: float) -> torch.Tensor:
        return (numbers * std + mean).to(getattr(torch, spec.dtype))

    file = folder / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for tensor_name, tensor in wanted.items():
            values = pool(*distribution(tensor_name, tensor.dim(), spec))
            for first, last in parts(tensor_name, tensor.numel(), len(values)):
                stream.write(values[first:last].view(torch.uint8).numpy().data)
    return file.stat().st_size


def parts(name: str, count: int, pool: int) -> Iterator[tuple[int, int]]:
    """Where in a pool of `pool` numbers those of a tensor are: half-open ranges, the same for the same name."""
    places = random.Random(name)
    while count:
        length = min(count, pool // 4)
        first = places.randrange(pool - length)
        yield first, first + length
        count -= length
