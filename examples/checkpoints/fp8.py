"""Weights in FP8 with a float32 scale per block, under the names of DeepSeek-V3's checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .spec import FP8_BLOCK

if TYPE_CHECKING:
    import torch

#: What config.json says of it.
FP8_CONFIG = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}

#: Kept in the model's type: what is no matrix product of a layer, and routers.
_KEPT = ("embed_tokens.weight", "lm_head.weight", ".gate.weight", "shared_expert_gate.weight")


def is_stored_in_fp8(name: str, dims: int) -> bool:
    """Whether a tensor of that name in a checkpoint is a matrix of a linear layer."""
    return dims == 2 and name.endswith(".weight") and not name.endswith(_KEPT)


def as_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every matrix of a linear layer as `NAME` in float8_e4m3fn and `NAME_scale_inv` [ceil(rows/128), ceil(cols/128)]."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if is_stored_in_fp8(name, tensor.dim()):
            out[name], out[f"{name}_scale_inv"] = _quantise(tensor)
        else:
            out[name] = tensor
    return out


def _quantise(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    rows, cols = matrix.shape
    high, wide = -(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK)
    padded = torch.zeros(high * FP8_BLOCK, wide * FP8_BLOCK)
    padded[:rows, :cols] = matrix.float()
    blocks = padded.view(high, FP8_BLOCK, wide, FP8_BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    stored = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return stored.view(high * FP8_BLOCK, wide * FP8_BLOCK)[:rows, :cols].contiguous(), scale
