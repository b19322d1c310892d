"""Weights of four bits in floating point: MXFP4 and NVFP4, as quantisers store them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

#: Weights that share an exponent in MXFP4, and what 3 bits mean there.
MX_GROUP: Final = 32
MX_LEVELS: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Weights that share an FP8 scale in NVFP4. Beside it all of an expert have one in FP32: here another for every expert, so
#: that the largest FP8 scale is not in every share.
NV_GROUP: Final = 16
NV_SCALE: Final = 0.001
#: Of static activation scales: every expert has another, so that the largest is not in every share.
INPUT_SCALE: Final = 0.01


def mxfp4(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 [..., groups, 16], two weights to a byte, the first in the low half; uint8 [..., groups], exponents + 127)."""
    import torch

    values = matrices.float().unflatten(-1, (-1, MX_GROUP))
    exponent = values.abs().amax(-1).clamp(min=2.0**-120).log2().floor() - 2
    return _fp4(values / torch.exp2(exponent)[..., None]), (exponent + 127).to(torch.uint8)


def _fp4(scaled: torch.Tensor) -> torch.Tensor:
    """uint8 [..., half]: two numbers to a byte, the first in the low half, each the nearest of `MX_LEVELS` with its sign."""
    import torch

    levels = torch.tensor(MX_LEVELS)
    code = (scaled.abs()[..., None] - levels).abs().argmin(-1).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    return code[..., ::2] | code[..., 1::2] << 4


def nvfp4(matrix: torch.Tensor, whole: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 [outputs, inputs / 2], as `_fp4`; float8_e4m3fn scales [outputs, groups]), beside a scale of all, `whole`."""
    import torch

    values = matrix.float().unflatten(-1, (-1, NV_GROUP))
    scale = (values.abs().amax(-1) / MX_LEVELS[-1] / whole).clamp(max=448).to(torch.float8_e4m3fn)
    return _fp4(values / (scale.float() * whole).clamp(min=1e-12)[..., None]).flatten(-2), scale


def mxfp4_fused(matrices: torch.Tensor, expert: int) -> Tensors:
    """All experts at once, as gpt-oss is published."""
    import torch

    blocks, scales = zip(*map(mxfp4, matrices), strict=True)
    return {"_blocks": torch.stack(blocks), "_scales": torch.stack(scales)}


def nvfp4_tensors(matrix: torch.Tensor, expert: int) -> Tensors:
    """As ModelOpt writes them; gate and up have one scale of all weights, as vLLM expects."""
    import torch

    whole = torch.tensor(NV_SCALE * (1 + expert))
    stored, scale = nvfp4(matrix, float(whole))
    inputs = torch.tensor(INPUT_SCALE * (1 + expert))
    return {"weight": stored, "weight_scale": scale, "weight_scale_2": whole, "input_scale": inputs}


def ct_nvfp4(inputs: bool) -> Callable[[torch.Tensor, int], Tensors]:
    """As compressed-tensors writes them: the scales of all weights, and with `inputs` of activations, as reciprocals."""

    def pack(matrix: torch.Tensor, expert: int) -> Tensors:
        found = nvfp4_tensors(matrix, expert)
        given = {"input_global_scale": 1 / found["input_scale"].view(1)} if inputs else {}
        whole = 1 / found["weight_scale_2"].view(1)
        return {
            "weight_packed": found["weight"], "weight_scale": found["weight_scale"], "weight_global_scale": whole, **given
        }  # fmt: skip

    return pack


def mxfp4_each(weight: str) -> Callable[[torch.Tensor, int], Tensors]:
    """Expert by expert; `weight`: what the packed ones are called."""

    def pack(matrix: torch.Tensor, expert: int) -> Tensors:
        stored, scale = mxfp4(matrix)
        return {weight: stored.flatten(-2), "weight_scale": scale}

    return pack
