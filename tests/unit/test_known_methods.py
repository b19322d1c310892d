"""Which of vLLM's methods, kernels and parameters of experts are taken, by their names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers import methods
from vllm_dwdp.layers.slabs import expert_tensors


@pytest.mark.parametrize(
    ("method", "kernels", "said"),
    [
        ("Fp8MoEMethod", "DEEPGEMM", "strides that slabs do not keep: dwdp needs --moe-backend triton or marlin"),
        ("Fp8MoEMethod", "VLLM_CUTLASS", "dwdp needs --moe-backend triton or marlin or flashinfer_cutlass"),
        ("Fp8MoEMethod", "HUMMING", "a layout of their own"),
        ("UnquantizedFusedMoEMethod", "FLASHINFER_TRTLLM", "counts of the experts that they were made with"),
        ("AutoGPTQMoEMethod", "TRITON", "the kernels TRITON: dwdp needs --moe-backend marlin"),
        ("UnquantizedFusedMoEMethod", None, "the kernels None"),
        ("MoeWNA16Method", "TRITON", "use MoeWNA16Method, which this release"),
        ("ModelOptNvFp4FusedMoE", "FLASHINFER_TRTLLM", "were made with: dwdp needs --moe-backend marlin"),
        ("ModelOptNvFp4FusedMoE", "EMULATION", "without a row per expert: dwdp needs --moe-backend marlin"),
        ("CompressedTensorsW4A4Nvfp4MoEMethod", "VLLM_CUTLASS", "kernels VLLM_CUTLASS: dwdp needs --moe-backend m"),
        ("CompressedTensorsW4A4Nvfp4MoEMethod", "FLASHINFER_CUTLASS", "kernels FLASHINFER_CUTLASS: dwdp needs"),
        ("Mxfp4MoEMethod", "TRITON", "the kernels TRITON: dwdp needs --moe-backend marlin"),
        ("ModelOptMxFp8FusedMoE", "MARLIN", "use ModelOptMxFp8FusedMoE, which this release"),
        ("CompressedTensorsW4A8Mxfp4MoEMethod", "MARLIN", "use CompressedTensorsW4A8Mxfp4MoEMethod, which this"),
        ("Fp8PtpcOnlineMoEMethod", "DEEPGEMM", "slabs do not keep: dwdp needs --moe-backend triton or cutlass"),
        ("Mxfp8OnlineMoEMethod", "MARLIN", "use Mxfp8OnlineMoEMethod, which this release"),
        ("Mxfp4OnlineMoEMethod", "MARLIN", "use Mxfp4OnlineMoEMethod, which this release"),
    ],
)
def test_methods_and_kernels_that_are_not_known(method: str, kernels: str | None, said: str) -> None:
    def made(kernels: str | None) -> Any:
        given = None if kernels is None else SimpleNamespace(name=kernels)
        known = methods.METHODS.get(method)
        return type(method, (), {known.backend if known else "backend": given})()

    assert said in str(methods.why_not(made(kernels), on_cpu=False))
    for name in methods.METHODS[method].kernels if method in methods.METHODS else ():
        assert methods.why_not(made(name), on_cpu=False) is None
        assert (methods.why_not(made(name), on_cpu=True) is None) == (method == methods.UNQUANTISED)


def test_activations_of_a_byte_are_refused() -> None:
    given = {"wna16_moe_backend": SimpleNamespace(name="MARLIN"), "input_dtype": torch.int8}
    method = type("AutoGPTQMoEMethod", (), given)()
    assert "take activations in torch.int8, as VLLM_MARLIN_INPUT_DTYPE asks" in str(
        methods.why_not(method, on_cpu=False)
    )
    method.input_dtype = None
    assert methods.why_not(method, on_cpu=False) is None


class Layer(torch.nn.Module):
    """Of 3 experts, computed by vLLM's method of this name."""

    def __init__(self, method: str, **parameters: torch.Tensor) -> None:
        super().__init__()
        self.quant_method = type(method, (), {})()
        for name, data in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(data, requires_grad=False))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        # As long as the share, by accident.
        ("workspace", torch.zeros(3), r"layer.workspace \[3\] is no parameter that .* knows of Fp8MoEMethod"),
        ("w13_weight_scale", torch.zeros(1), "layer.w13_weight_scale has 1 rows for a share of 3"),
        ("w13_weight_scale", torch.tensor(1.0), "layer.w13_weight_scale has no rows for a share of 3"),
        # Experts behind another dimension, as some kernels' scales lie.
        ("w13_weight_scale_inv", torch.zeros(2, 3), "has 2 rows for a share of 3"),
        (
            "w13_weight_scale_inv",
            torch.zeros(3, 4, 2).mT,
            r"\[3, 2, 4\] has strides \[8, 1, 2\], which a slab would not",
        ),
        ("w2_bias", torch.zeros(3, 0), r"layer.w2_bias has empty rows \[3, 0\]"),
    ],
)
def test_parameters_that_break_the_rule(name: str, data: torch.Tensor, said: str) -> None:
    weights = {"w13_weight": torch.zeros(3, 4, 2), "w2_weight": torch.zeros(3, 2, 2)}
    expert_tensors(Layer("Fp8MoEMethod", **weights), 3, "layer")
    with pytest.raises(DwdpError, match=said):
        expert_tensors(Layer("Fp8MoEMethod", **weights, **{name: data}), 3, "layer")


def test_a_largest_value_is_no_row_and_nothing_else_is_one() -> None:
    layer = Layer("Fp8MoEMethod", w13_weight=torch.zeros(3, 4, 2), w13_input_scale=torch.tensor(1.0))
    fetched, small = expert_tensors(layer, 3, "layer")
    assert [tensor.name for tensor in (*fetched, *small)] == ["w13_weight"]
    with pytest.raises(DwdpError, match=r"w13_input_scale \[\] is no parameter that .* knows of Unquantized"):
        expert_tensors(Layer(methods.UNQUANTISED, w13_input_scale=torch.tensor(1.0)), 3, "layer")
