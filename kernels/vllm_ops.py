"""`MoeOps` by vLLM's own kernels, and its tile configurations: the one module here that calls vLLM 0.32.0's functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from .arguments import Assignment
from .torch_ops import QuantKind, TorchOps

Result = TypeVar("Result")


def assign(topk_ids: torch.Tensor, block_m: int, num_experts: int) -> Assignment:
    """vLLM's sorting of routes into blocks, or none of it where there are few."""
    from vllm.model_executor.layers.fused_moe.fused_moe import _prepare_expert_assignment

    tokens, top_k = topk_ids.shape
    found = _prepare_expert_assignment(topk_ids, {"BLOCK_SIZE_M": block_m}, tokens, top_k, num_experts, None)
    return Assignment(*found)


def quantize(
    x: torch.Tensor, scale: torch.Tensor | None, kind: QuantKind, group: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """vLLM's quantisation of activations to FP8."""
    from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input

    if kind == "none":
        return x, None
    block_shape = [group, group] if kind == "block" else None
    quantized: tuple[torch.Tensor, torch.Tensor | None] = moe_kernel_quantize_input(
        x, scale, torch.float8_e4m3fn, kind == "token", block_shape
    )
    return quantized


class VllmOps(TorchOps):
    """`MoeOps` as `fused_experts` of vLLM composes them; needs a CUDA device."""

    def assign(self, topk_ids: torch.Tensor, block_m: int, num_experts: int) -> Assignment:
        """See `MoeOps`."""
        return assign(topk_ids, block_m, num_experts)

    def activate(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        """See `MoeOps`."""
        activation, kernels = self.activation, torch.ops._C
        if activation.kind == "swigluoai":
            kernels.swigluoai_and_mul(out, gate_up, activation.alpha, activation.limit)
        elif activation.limit is not None:
            kernels.silu_and_mul_with_clamp(out, gate_up, activation.limit, 1.0, 0.0)
        elif activation.kind == "silu":
            kernels.silu_and_mul(out, gate_up)
        elif activation.kind == "gelu":
            kernels.gelu_and_mul(out, gate_up)
        else:
            kernels.gelu_tanh_and_mul(out, gate_up)

    def quantize(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `MoeOps`."""
        return quantize(x, scale, self.quant, self.group)

    def reduce(self, partial: torch.Tensor, out: torch.Tensor) -> None:
        """See `MoeOps`."""
        from vllm import _custom_ops

        _custom_ops.moe_sum(partial, out)


def forced_config() -> Mapping[str, Any] | None:
    """The configuration that a caller of vLLM's `override_config` asked for, if any."""
    from vllm.model_executor.layers.fused_moe import get_config

    forced: Mapping[str, Any] | None = get_config()
    return forced


def under_config(config: Mapping[str, Any] | None, call: Callable[[], Result]) -> Result:
    """`call()` with that configuration instead of vLLM's choice; as it is with None."""
    from vllm.model_executor.layers.fused_moe import override_config

    if config is None:
        return call()
    failed: Exception | None = None
    with override_config(dict(config)):
        # vLLM's manager stays in force where an exception leaves it.
        try:
            return call()
        except Exception as error:
            failed = error
    raise failed


def best_config(
    shape: tuple[int, int, int, int], top_k: int, dtype: str | None, num_tokens: int, block: tuple[int, int] | None
) -> Mapping[str, Any]:
    """vLLM's configuration for (E, 2 I, H, I): its tuned table for this device where it has one, its default otherwise."""
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    experts, rows, hidden, width = shape
    block_shape = list(block) if block else None
    config: Mapping[str, Any] = try_get_optimal_moe_config(
        (experts, rows, hidden), (experts, hidden, width), top_k, dtype, num_tokens, block_shape
    )
    return config
