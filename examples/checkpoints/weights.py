"""Random weights in the names and shapes that checkpoints of the hub have.

transformers holds all experts of a layer in one tensor; most checkpoints on the hub hold each expert by itself, and
only such names can be skipped by a reader that wants some of the experts.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from .spec import FAMILIES, CheckpointSpec

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

# Below hidden states of size one, so that experts and attention decide the output more than the last token does.
EMBEDDING_STD = 0.3
# Large enough to change which experts are chosen, whose sigmoid scores lie between 0 and 1.
CORRECTION_STD = 0.2
BIAS_STD = 0.1
NORM_STD = 0.1

#: transformers' names of routers' weights, [experts, hidden].
_ROUTERS = (".gate.weight", ".router.weight", ".router.layer.weight")


def random_weights(config: PretrainedConfig, spec: CheckpointSpec) -> tuple[str, dict[str, torch.Tensor]]:
    """The model class's name, and every tensor under transformers' own names."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, spec.dtype)
    # On the meta device: only names and shapes are wanted, and transformers' initial values tie greedy tokens.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shapes = model.state_dict()
    return type(model).__name__, {name: _fill(name, meta, dtype, spec) for name, meta in shapes.items()}


def _fill(name: str, like: torch.Tensor, dtype: torch.dtype, spec: CheckpointSpec) -> torch.Tensor:
    import torch

    # Seeded by name: a layer's values do not depend on how many there are.
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ spec.seed * 0x9E3779B1 & 0xFFFFFFFFFFFF)
    values = torch.empty(like.shape, dtype=torch.float32).normal_(generator=generator)
    mean, std = distribution(name, values.dim(), spec)
    values.mul_(std).add_(mean)
    if spec.router_skew and name.endswith(_ROUTERS) and like.shape[0] == spec.num_experts:
        layer = int(next(part for part in name.split(".") if part.isdecimal()))
        values[list(hot_experts(spec, layer))] *= 1 + spec.router_skew
    # Routers score with a correction in float32 whatever the model's type is.
    return values if name.endswith("e_score_correction_bias") else values.to(dtype)


def hot_experts(spec: CheckpointSpec, layer: int) -> tuple[int, ...]:
    """A quarter of the experts, at least one, ascending: those that a skewed router sends most tokens to, others in each
    layer (of the model, counted with dense layers)."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(f"hot {layer}".encode()) ^ spec.seed)
    order = torch.randperm(spec.num_experts, generator=generator).tolist()
    return tuple(sorted(order[: max(1, spec.num_experts // 4)]))


def distribution(name: str, dims: int, spec: CheckpointSpec) -> tuple[float, float]:
    """Mean and standard deviation of a tensor, by its name in the model."""
    if name.endswith("e_score_correction_bias"):
        return 0.0, CORRECTION_STD
    if name.endswith("sinks"):
        return 0.0, 1.0
    if name.endswith("bias"):
        return 0.0, BIAS_STD
    if dims == 1:
        return 1.0, NORM_STD
    if "embed_tokens" in name:
        return 0.0, EMBEDDING_STD
    # Keeps the size of what passes through, at any width; 0.09 at the default.
    return 0.0, spec.hidden**-0.5


def mute(weights: dict[str, torch.Tensor], token_ids: list[int]) -> None:
    """Let greedy decoding never choose these tokens: readable output, whose length no chance end-of-text decides."""
    weights["lm_head.weight"][token_ids] = 0


def as_on_disk(weights: dict[str, torch.Tensor], spec: CheckpointSpec) -> dict[str, torch.Tensor]:
    """Under the names of real checkpoints, per expert or fused."""
    family = FAMILIES[spec.family]
    out: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        stem, dot, last = name.rpartition(".experts.")
        if not dot:
            out[_rename(name, spec)] = tensor
            continue
        layer = stem.rpartition(".")[0]
        prefix = f"{layer}.{family.moe_prefix}"
        if last not in ("gate_up_proj", "down_proj"):
            out[f"{prefix}.experts.{last}"] = tensor  # gpt-oss's biases
        elif spec.is_fused:
            assert family.fused is not None
            out[f"{prefix}.{family.fused[last == 'down_proj']}"] = tensor
        else:
            assert family.per_expert is not None
            gate, up, down = family.per_expert
            for expert, own in enumerate(tensor.unbind()):
                parts = {down: own} if last == "down_proj" else dict(zip((gate, up), own.chunk(2), strict=True))
                for part, value in parts.items():
                    out[f"{prefix}.experts.{expert}.{part}.weight"] = value
    return out


def _rename(name: str, spec: CheckpointSpec) -> str:
    if spec.family == "mixtral":
        return name.replace(".mlp.", ".block_sparse_moe.")
    if spec.family == "granitemoe":
        return name.replace(".router.weight", ".router.layer.weight")
    return name
