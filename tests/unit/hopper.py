"""vLLM on CPU that chooses expert kernels, and processes weights for them, as on a Hopper GPU; nothing is computed.

Choosing and processing are vLLM's own code. What it calls of CUDA stands in here: a repacking into Marlin's layout by one
with that layout's shape, which for each expert is some order of its own elements, and FP8 quantisation by torch's.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

_LAYERS = "vllm.model_executor.layers."
_MODULES = (
    *(f"fused_moe.oracle.{name}" for name in ("fp8", "int_wna16", "int8", "mxfp4", "nvfp4", "unquantized")),
    *(
        f"fused_moe.experts.{name}"
        for name in (
            "marlin_moe",
            "triton_moe",
            "cutlass_moe",
            "triton_cutlass_moe",
            "int4_emulation_moe",
            "flashinfer_cutlass_moe",
        )
    ),
    *(f"quantization.utils.{name}" for name in ("marlin_utils", "marlin_utils_fp4", "marlin_utils_fp8")),
)


class Hopper:
    """vLLM's CPU platform, but for what it says of the device."""

    def __init__(self, cpu: Any) -> None:
        self._cpu = cpu

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cpu, name)

    def is_cpu(self) -> bool:
        return False

    def is_cuda(self) -> bool:
        return True

    is_cuda_alike = supports_fp8 = is_cuda

    def get_device_capability(self, device_id: int = 0) -> Any:
        from vllm.platforms.interface import DeviceCapability

        return DeviceCapability(9, 0)

    def has_device_capability(self, capability: Any, device_id: int = 0) -> bool:
        return _number(capability) <= 90

    def is_device_capability(self, capability: Any, device_id: int = 0) -> bool:
        return _number(capability) == 90

    def is_device_capability_family(self, capability: int, device_id: int = 0) -> bool:
        return capability // 10 == 9


def _number(capability: Any) -> int:
    return capability[0] * 10 + capability[1] if isinstance(capability, tuple) else int(capability)


def repack(b_q_weight: torch.Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool = False) -> torch.Tensor:
    """As `gptq_marlin_repack`: int32 [K / 16, N * bits / 2]."""
    return b_q_weight.contiguous().view(size_k // 16, size_n * num_bits // 2)


def repack_all(
    b_q_weight: torch.Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool = False
) -> torch.Tensor:
    """As `gptq_marlin_moe_repack`, and AWQ's."""
    return torch.stack([repack(expert, size_k, size_n, num_bits) for expert in b_q_weight])


def quantise(x: torch.Tensor, scale: torch.Tensor | None = None, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As `scaled_fp8_quant`, with one scale, or one per row."""
    if scale is None:
        scale = x.float().abs().amax(-1, keepdim=True) / 448
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@contextmanager
def on_hopper() -> Iterator[None]:
    """Within it, kernels are those for a Hopper GPU."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    with ExitStack() as stack:
        for name in _MODULES:
            module = importlib.import_module(_LAYERS + name)
            if hasattr(module, "current_platform"):
                stack.enter_context(mock.patch.object(module, "current_platform", Hopper(current_platform)))
        for name, stand_in in (
            ("gptq_marlin_repack", repack),
            ("gptq_marlin_moe_repack", repack_all),
            ("awq_marlin_moe_repack", repack_all),
            ("scaled_fp8_quant", quantise),
        ):
            stack.enter_context(mock.patch.object(_custom_ops, name, stand_in))
        for name, there in (
            ("cutlass_moe", "cutlass_group_gemm_supported"),
            ("flashinfer_cutlass_moe", "has_flashinfer_cutlass_fused_moe"),
        ):
            module = importlib.import_module(f"{_LAYERS}fused_moe.experts.{name}")
            stack.enter_context(mock.patch.object(module, there, lambda: True))
        yield
