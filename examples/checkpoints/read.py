"""Read the experts of a checkpoint back, whatever layout they have on disk, for comparisons byte by byte."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .spec import FAMILIES, CheckpointSpec
from .write import SPEC_FILE

if TYPE_CHECKING:
    import torch


class Expert(NamedTuple):
    """One routed expert, in the orientation in which vLLM keeps it before any kernel's own packing."""

    layer: int  # of the model, counted with dense layers
    expert: int
    w13: torch.Tensor  # [2 * intermediate, hidden]: gate above up; interleaved for gpt-oss
    w2: torch.Tensor  # [hidden, intermediate]
    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None


def read_spec(path: str | os.PathLike[str]) -> CheckpointSpec:
    values = json.loads((Path(path) / SPEC_FILE).read_text())
    values.pop("format")
    return CheckpointSpec(**values)


def expert_tensors(path: str | os.PathLike[str]) -> Iterator[Expert]:
    """Every expert of every MoE layer, in order. Reads a layer at a time."""
    spec = read_spec(path)
    family = FAMILIES[spec.family]
    with _Tensors(Path(path)) as tensors:
        for layer in range(spec.first_moe_layer, spec.first_moe_layer + spec.num_moe_layers):
            prefix = f"model.layers.{layer}.{family.moe_prefix}"
            if not spec.is_fused:
                assert family.per_expert is not None
                for expert in range(spec.num_experts):
                    names = [f"{prefix}.experts.{expert}.{part}.weight" for part in family.per_expert]
                    gate, up, down = map(tensors.get, names)
                    yield Expert(layer, expert, _cat(gate, up), down, None, None)
                continue
            assert family.fused is not None
            w13, w2 = (tensors.get(f"{prefix}.{name}") for name in family.fused)
            biases: list[torch.Tensor] | None = None
            if spec.family == "gpt_oss":
                # Stored input-major, unlike all others.
                w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
                biases = [tensors.get(f"{prefix}.{name}_bias") for name in family.fused]
            for e in range(spec.num_experts):
                b13, b2 = (b[e] for b in biases) if biases else (None, None)
                yield Expert(layer, e, w13[e].contiguous(), w2[e].contiguous(), b13, b2)


def _cat(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([gate, up])


class _Tensors:
    """Tensors by name, from one file or many."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        files = sorted(folder.glob("*.safetensors"))
        self._open = [safe_open(file, framework="pt") for file in files]
        self._where = {name: file for file in self._open for name in file.keys()}  # noqa: SIM118

    def get(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._where.clear()
        self._open.clear()
