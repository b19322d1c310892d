"""A MoE layer expert by expert in wide floats: what the kernels are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..torch_ops import Activation, activate
from ..weight_table import Scales

Rounding = Callable[[torch.Tensor], torch.Tensor]


def dequantize(stored: torch.Tensor, scales: Scales, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[E, N, K] of `dtype` from FP8 and its dense scales."""
    values, (experts, rows, cols) = scales.values, stored.shape
    if scales.kind == "block":
        spread = values.repeat_interleave(scales.group[0], 1).repeat_interleave(scales.group[1], 2)[:, :rows, :cols]
    elif scales.kind == "channel":
        spread = values.reshape(experts, rows, 1)
    else:
        spread = values.reshape(experts, 1, 1)
    return stored.to(dtype) * spread.to(dtype)


def reference_experts(
    hidden: torch.Tensor,
    w13: Sequence[torch.Tensor] | torch.Tensor,
    w2: Sequence[torch.Tensor] | torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation,
    *,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    on_input: bool = False,
    rounding: Rounding | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[M, H] of `dtype` from w13 [E, 2 I, H] and w2 [E, H, I], or one matrix per expert; ids below 0 add nothing.

    Args:
        on_input: router weights are multiplied before the activation instead of at the end.
        rounding: applied to the input of each GEMM: what a quantisation loses.
    """
    rounding = rounding or (lambda x: x)
    out = torch.zeros(hidden.shape[0], hidden.shape[1], dtype=dtype, device=hidden.device)
    states = rounding(hidden).to(dtype)
    for expert in topk_ids.unique().tolist():
        if expert < 0:
            continue
        tokens, positions = (topk_ids == expert).nonzero(as_tuple=True)
        weight = topk_weights[tokens, positions].to(dtype)[:, None]
        gate_up = states[tokens] @ w13[expert].to(dtype).T
        if bias13 is not None:
            gate_up = gate_up + bias13[expert].to(dtype)
        if on_input:
            gate_up = gate_up * weight
        inner = rounding(activate(activation, gate_up)).to(dtype)
        result = inner @ w2[expert].to(dtype).T
        if bias2 is not None:
            result = result + bias2[expert].to(dtype)
        out.index_add_(0, tokens, result if on_input else result * weight)
    return out
