"""What dwdp knows of vLLM's methods that compute experts: which parameters they leave, and in which kernels' layouts.

The rule: once vLLM has processed a layer, every parameter has a row per expert in its first dimension, and is spread over
the group or replicated. A method is listed here if that was read in its source, kernel by kernel; all else is refused by
name before weights load. Names are checked too, since a first dimension may be as long as a share by accident.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

#: Names of kernels in vLLM -> what `--moe-backend` calls them.
OPTIONS: Final = {
    "TRITON": "triton",
    "MARLIN": "marlin",
    "VLLM_CUTLASS": "cutlass",
    "FLASHINFER_CUTLASS": "flashinfer_cutlass",
}

#: Why kernels that one may have met are not among those of a method.
_REFUSED: Final = {
    "DEEPGEMM": "lay scales out in strides that slabs do not keep",
    "HUMMING": "put a layout of their own into the layer, without a row per expert",
    "FLASHINFER_TRTLLM": "keep scales and counts of the experts that they were made with",
    "EMULATION": "leave scales without a row per expert",
}


def _init_moe_kernel(method: Any, layer: Any) -> None:
    method._init_moe_kernel(layer)


def _setup_kernel(method: Any, layer: Any) -> None:
    method._setup_kernel(layer)


def _build_moe_kernel(method: Any, layer: Any) -> None:
    method._build_moe_kernel(layer)


def _oracle_kernel(oracle: str, method: Any, layer: Any, names: str = "{}_backend") -> None:
    """As the methods of that oracle of vLLM (fp8, int8, mxfp4, nvfp4) end their processing of weights.

    Of the kernels that are taken none has weights to process after that. names: what the oracle calls its kernels.
    """
    made_by = importlib.import_module(f"vllm.model_executor.layers.fused_moe.oracle.{oracle}")
    method.moe_quant_config = method.get_fused_moe_quant_config(layer)
    method.moe_kernel = getattr(made_by, f"make_{oracle}_moe_kernel")(
        moe_quant_config=method.moe_quant_config,
        moe_config=method.moe,
        experts_cls=method.experts_cls,
        routing_tables=layer._expert_routing_tables(),
        **{names.format(oracle): getattr(method, f"{oracle}_backend")},
    )


#: Parameters of both products.
_BARE: Final = frozenset({"g1_alphas", "g2_alphas"})


def _known_as(name: str) -> str:
    """A parameter's name without the product that it is of; empty where that is none."""
    for prefix in ("w13_", "w2_"):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name if name in _BARE else ""


class Method(NamedTuple):
    """A class of vLLM that computes experts.

    Attributes:
        backend: its attribute that names the kernels.
        kernels: the names of those that are known.
        rows: parameters with a row per expert, whichever of them a layer has: behind w13_ or w2_, or as they stand in _BARE.
        largest: single values that are the largest of the experts which vLLM has loaded.
        rebuild: makes the kernel object once more, of a layer whose parameters and counts are those of all experts.
        undefined: behind w13_ and w2_, what has no value before weights are loaded, and has with other methods.
        one_factor: whether vLLM multiplies all block scales of a product by one number, from the experts that it has loaded.
    """

    backend: str
    kernels: tuple[str, ...]
    rows: tuple[str, ...]
    largest: tuple[str, ...]
    rebuild: Callable[[Any, Any], None]
    undefined: tuple[str, ...] = ()
    one_factor: bool = False

    def has_rows(self, name: str) -> bool:
        """Whether a parameter of this name has a row per expert."""
        return _known_as(name) in self.rows

    def is_largest(self, name: str) -> bool:
        """Whether a parameter of this name is the largest value of the experts that were loaded."""
        return _known_as(name) in self.largest


_FP8_KERNELS: Final = ("TRITON", "MARLIN", "VLLM_CUTLASS", "FLASHINFER_CUTLASS")
_FP8_ROWS: Final = ("weight", "weight_scale", "weight_scale_inv", "bias", "g1_alphas", "g2_alphas")
_PLAIN_ROWS: Final = ("weight", "weight_scale", "bias")
_GPTQ_ROWS: Final = ("qweight", "scales", "qzeros", "bias", "weight")
_WNA16_ROWS: Final = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "bias", "weight")

_NVFP4_ROWS: Final = ("weight", "weight_scale", "weight_scale_2")

UNQUANTISED: Final = "UnquantizedFusedMoEMethod"

#: Methods whose layouts split-weight kernels compute with, where activations are scaled as they come.
_SPLIT: Final = (UNQUANTISED, "Fp8MoEMethod", "Fp8PerTensorOnlineMoEMethod", "Fp8PerBlockOnlineMoEMethod")

METHODS: Final = {
    UNQUANTISED: Method(
        "unquantized_backend", ("TRITON", "FLASHINFER_CUTLASS"), ("weight", "bias"), (), _init_moe_kernel
    ),
    # vLLM gives this one no kernels of its own CUTLASS.
    "Fp8MoEMethod": Method(
        "fp8_backend", ("TRITON", "MARLIN", "FLASHINFER_CUTLASS"), _FP8_ROWS, ("input_scale",), _init_moe_kernel
    ),
    "CompressedTensorsW8A8Fp8MoEMethod": Method(
        "fp8_backend", _FP8_KERNELS, _FP8_ROWS, ("input_scale",), partial(_oracle_kernel, "fp8")
    ),
    "CompressedTensorsW8A8Int8MoEMethod": Method(
        "int8_backend", ("TRITON",), _PLAIN_ROWS, (), partial(_oracle_kernel, "int8")
    ),
    # Online: vLLM quantises each expert by itself. Its scales are no parameters before that.
    "Fp8PerTensorOnlineMoEMethod": Method(
        "fp8_backend", ("TRITON", "MARLIN"), _PLAIN_ROWS, (), partial(_oracle_kernel, "fp8")
    ),
    "Fp8PerBlockOnlineMoEMethod": Method(
        "fp8_backend", ("TRITON", "MARLIN", "FLASHINFER_CUTLASS"), _FP8_ROWS, (), partial(_oracle_kernel, "fp8")
    ),
    "Fp8PtpcOnlineMoEMethod": Method(
        "fp8_backend", ("TRITON", "VLLM_CUTLASS"), _PLAIN_ROWS, (), partial(_oracle_kernel, "fp8")
    ),
    "Int8OnlineMoEMethod": Method(
        "int8_backend", ("TRITON",), ("weight", "scale", "bias"), (), partial(_oracle_kernel, "int8")
    ),
    "CompressedTensorsWNA16MoEMethod": Method("wna16_backend", ("MARLIN", "TRITON"), _WNA16_ROWS, (), _setup_kernel),
    "AutoGPTQMoEMethod": Method("wna16_moe_backend", ("MARLIN",), _GPTQ_ROWS, (), _setup_kernel),
    # Triton's own kernels for it keep weights in tensors that are no parameters.
    "GptOssMxfp4MoEMethod": Method("mxfp4_backend", ("MARLIN",), _PLAIN_ROWS, (), partial(_oracle_kernel, "mxfp4")),
    "AutoAWQMoEMethod": Method("wna16_moe_backend", ("MARLIN",), _GPTQ_ROWS, (), _setup_kernel),
    # Other kernels of NVFP4 want FP4 of the device, and scales of activations over all experts.
    "ModelOptNvFp4FusedMoE": Method(
        "nvfp4_backend",
        ("MARLIN",),
        (*_NVFP4_ROWS, "input_scale"),
        (),
        _build_moe_kernel,
        undefined=("weight_scale",),
        one_factor=True,
    ),
    "CompressedTensorsW4A4Nvfp4MoEMethod": Method(
        "nvfp4_backend",
        ("MARLIN",),
        (*_NVFP4_ROWS, "weight_packed", "weight_global_scale", "input_global_scale"),
        (),
        partial(_oracle_kernel, "nvfp4", names="backend"),
        undefined=("weight_scale",),
        one_factor=True,
    ),
    "CompressedTensorsW4A4Mxfp4MoEMethod": Method(
        "mxfp4_backend",
        ("MARLIN",),
        (*_PLAIN_ROWS, "weight_packed"),
        (),
        partial(_oracle_kernel, "mxfp4"),
        undefined=("weight_scale",),
    ),
    "Mxfp4MoEMethod": Method("mxfp4_backend", ("MARLIN",), _PLAIN_ROWS, (), partial(_oracle_kernel, "mxfp4")),
}


def method_of(module: Any) -> Method | None:
    """What is known of the method that computes a layer; None where nothing is."""
    return METHODS.get(type(getattr(module, "quant_method", None)).__name__)


def kernels_of(method: Any) -> str | None:
    """The name of the kernels that vLLM's `method` computes with; None for one that is not known."""
    known = METHODS.get(type(method).__name__)
    return None if known is None else getattr(getattr(method, known.backend, None), "name", None)


def why_not(method: Any, on_cpu: bool) -> str | None:
    """None where layers that vLLM's `method` computes can be shared; else what is wrong with "experts of <layer>"."""
    name = type(method).__name__
    known = METHODS.get(name)
    if known is None or (on_cpu and name != UNQUANTISED):
        return f"use {name}, which this release of dwdp does not support" + (" on CPU" if known else "")
    if on_cpu:
        return None
    inputs = getattr(method, "input_dtype", None)
    if inputs is not None and inputs.itemsize == 1:
        # Its global scale is the largest of the experts that were loaded, and nobody has looked at the rest.
        return f"take activations in {inputs}, as VLLM_MARLIN_INPUT_DTYPE asks, which dwdp does not support: unset it"
    kernels = kernels_of(method)
    if kernels in known.kernels:
        return None
    why = f", which {_REFUSED[kernels]}" if kernels in _REFUSED else ""
    options = ", ".join(OPTIONS[kernel] for kernel in known.kernels)
    return f"use {name} with the kernels {kernels}{why}: dwdp needs --moe-backend {options.replace(', ', ' or ')}"


def why_not_split(method: Any) -> str | None:
    """None where split-weight kernels can compute what `method` does; else what is wrong with "experts of <layer>"."""
    name = type(method).__name__
    if (kernels := kernels_of(method)) not in (None, "TRITON"):
        return f"are computed by the kernels {kernels}, which find no experts by their addresses"
    static = getattr(getattr(method, "quant_config", None), "activation_scheme", "dynamic") != "dynamic"
    if name in METHODS and (name not in _SPLIT or static):
        return f"are computed by {name}{' with static scales' if static else ''}, for which there is no split-weight kernel"
    return None


def rebuild_kernel(module: Any) -> None:
    """vLLM's kernel object of a layer once more: scales, biases and the number of experts that it keeps are now those of all
    E."""
    known = method_of(module)
    (known.rebuild if known else _init_moe_kernel)(module.quant_method, module)
