"""What a config's quantization_config says about the weights of experts, attention and other products."""

from __future__ import annotations

import fnmatch
from typing import Any, Final, NamedTuple

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.formats import FORMATS, WeightFormat

#: Bytes of a scale of integers.
_SCALE: Final = 2.0


class Formats(NamedTuple):
    """Formats of the routed experts, of attention's projections and of other products (shared experts, dense layers)."""

    experts: WeightFormat
    attention: WeightFormat
    mlp: WeightFormat


def read_formats(config: dict[str, Any], name: str) -> Formats:
    """From `quantization_config` (none: the type of the weights); raises DwdpError on an unknown method."""
    plain = _plain(config)
    quant = config.get("quantization_config") or config.get("compression_config")
    if quant and not isinstance(quant, dict):
        raise DwdpError(f"quantization_config of {name} is {quant!r}: it must be a mapping with quant_method")
    if not isinstance(quant, dict):
        return Formats(plain, plain, plain)
    packed = _with_groups(FORMATS[_format_name(quant, name)], quant, name)
    skipped = [
        str(p)
        for key in ("ignore", "modules_to_not_convert", "exclude_modules", "exclude")
        for p in quant.get(key) or []
    ]

    def of(*probes: str) -> WeightFormat:
        return plain if any(_matches(pattern, probe) for pattern in skipped for probe in probes) else packed

    # A layer in the middle stands for all: first and last layers are often kept back for other reasons.
    prefix = f"model.layers.{int(config.get('num_hidden_layers', 4)) // 2}"
    return Formats(
        of(f"{prefix}.mlp.experts.0.up_proj", f"{prefix}.mlp.experts"),
        of(f"{prefix}.self_attn.o_proj", f"{prefix}.self_attn"),
        of(f"{prefix}.mlp.shared_experts.up_proj", f"{prefix}.mlp.shared_expert.up_proj", f"{prefix}.mlp.up_proj"),
    )


def _plain(config: dict[str, Any]) -> WeightFormat:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return FORMATS[{"float32": "fp32", "float16": "fp16"}.get(dtype, "bf16")]


def _format_name(quant: dict[str, Any], name: str) -> str:
    method = str(quant.get("quant_method") or quant.get("quant_algo") or "").lower()
    algo = str(quant.get("quant_algo") or "").upper()
    if method == "fp8":
        return "fp8_block" if quant.get("weight_block_size") else "fp8"
    # vLLM has its own name in the config that it read.
    if method in ("mxfp4", "gpt_oss_mxfp4"):
        return "mxfp4"
    if method in ("awq", "gptq", "auto-round", "auto_round", "awq_marlin", "gptq_marlin"):
        return _integer(quant.get("bits", 4), name, method)
    if method == "modelopt" or algo:
        if "NVFP4" in algo or "FP4" in algo:
            return "nvfp4"
        if "FP8" in algo:
            return "fp8"
    if method in ("compressed-tensors", "modelopt"):
        return _compressed(quant, name)
    if method == "quark":
        weights = str(quant.get("global_quant_config", {}).get("weight", {}))
        return "mxfp4_a4" if "fp4" in weights or "mx" in weights else "fp8"
    raise DwdpError(
        f"{name} is quantised with {method or quant!r}, which the planner does not know: give --expert-format and "
        f"--linear-format (one of {', '.join(FORMATS)}) with a config without quantization_config"
    )


def _integer(bits: Any, name: str, method: str) -> str:
    if bits not in (4, 8):
        raise DwdpError(f"{name} has {bits}-bit {method} weights: the planner knows 4 and 8 bits")
    return "int4" if bits == 4 else "int8"


def _compressed(quant: dict[str, Any], name: str) -> str:
    groups = quant.get("config_groups") or {}
    for group in groups.values():
        weights = group.get("weights") or {}
        bits, kind = weights.get("num_bits"), str(weights.get("type", "int"))
        if kind == "float" and bits == 4:
            return "mxfp4" if weights.get("group_size") == 32 else "nvfp4"
        if kind == "float" and bits == 8:
            return "fp8_block" if weights.get("block_structure") else "fp8"
        if kind == "int":
            return _integer(bits, name, "integer")
    raise DwdpError(f"the quantization_config of {name} has no readable config_groups: give --expert-format")


def _with_groups(form: WeightFormat, quant: dict[str, Any], name: str) -> WeightFormat:
    """`form` with scales for as many weights as `quant` says, where they are integers: a scale for each group, and a zero
    point. Without groups, one for each output, which counts as none."""
    if not form.name.startswith("int"):
        return form
    weights = [group.get("weights") or {} for group in (quant.get("config_groups") or {}).values()]
    # The group whose format `form` is.
    told = next((each for each in weights if each.get("type", "int") == "int"), quant)
    size = next((told[key] for key in ("group_size", "q_group_size") if key in told), None)
    if size is None and not weights:
        return form
    if size in (None, -1):
        return form._replace(scales=0.0)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DwdpError(f"group_size of {name} is {size!r}: it must be a whole number of weights >= 1, or -1")
    # vLLM keeps zero points of GPTQ, symmetric or not, and AWQ.
    zeros = not weights or told.get("symmetric") is False
    return form._replace(scales=(_SCALE + (form.data if zeros else 0)) / size)


def _matches(pattern: str, probe: str) -> bool:
    if pattern.startswith("re:"):
        import re

        try:
            return re.match(pattern[3:], probe) is not None
        except re.error:
            return False
    if "*" in pattern:
        return fnmatch.fnmatchcase(probe, pattern)
    return pattern == probe or probe.startswith(pattern + ".") or (len(pattern) > 3 and f".{pattern}." in f".{probe}.")
