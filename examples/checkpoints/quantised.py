"""Experts in the quantised forms that checkpoints of the hub have; everything else of a model stays as it is.

A form is a quantiser's: names of tensors, how they are packed, and what config.json says, so that vLLM takes them for that
quantiser's own. Rounding is to the nearest, and calibrates nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .float4 import INPUT_SCALE, MX_GROUP, NV_GROUP, ct_nvfp4, mxfp4_each, mxfp4_fused, nvfp4_tensors

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

#: Weights that share a scale, along the inputs of a product.
GROUP: Final = 64
#: Rows and columns that share a scale.
BLOCK: Final = 128
#: AutoAWQ's order of eight columns within 32 bits.
AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)


class Form(NamedTuple):
    """pack: the tensors of one matrix [outputs, inputs] by their last names, of the expert with this number; of one that is
    fused by what follows its name, of all experts [E, outputs, inputs].

    config: what config.json says. step: what the inputs and outputs of experts have to be multiples of. bits: of a weight.
    """

    pack: Callable[[torch.Tensor, int], Tensors]
    config: dict[str, Any]
    step: int
    bits: int = 8
    fused: bool = False


def fp8(matrix: torch.Tensor, kind: str, scales: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn, scales of type `scales`): one for a `tensor` [], a `channel` [outputs, 1] or a `block`
    [outputs / 128, ...]."""
    import torch

    values = matrix.float()
    blocks = {
        "tensor": lambda: values.view(1, values.shape[0], 1, -1),
        "channel": lambda: values.view(values.shape[0], 1, 1, -1),
        "block": lambda: values.view(values.shape[0] // BLOCK, BLOCK, -1, BLOCK),
    }[kind]()
    most = torch.finfo(torch.float8_e4m3fn).max
    scale = (blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / most).to(scales)
    # A scale that was rounded down makes the largest value larger than there is.
    scaled = (blocks / scale.float()[:, None, :, None]).clamp(-most, most)
    stored = scaled.to(torch.float8_e4m3fn).view(values.shape)
    return stored, scale.reshape(()) if kind == "tensor" else scale


def integers(matrix: torch.Tensor, bits: int, group: int, zeros: bool) -> tuple[torch.Tensor, ...]:
    """(int32 [outputs, inputs] from 0 on, scales [outputs, groups], int32 zero points [outputs, groups])."""
    import torch

    values = matrix.float().view(matrix.shape[0], -1, group)
    most = (1 << bits) - 1
    if zeros:
        low, high = values.amin(2).clamp(max=0), values.amax(2).clamp(min=0)
        scale = ((high - low) / most).clamp(min=1e-8).to(matrix.dtype)
        zero = (-low / scale.float()).round().clamp(0, most)
    else:
        scale = (values.abs().amax(2) / (most // 2)).clamp(min=1e-8).to(matrix.dtype)
        zero = torch.full(scale.shape, float(1 << bits - 1))
    stored = (values / scale.float()[..., None] + zero[..., None]).round().clamp(0, most)
    return stored.int().view(matrix.shape), scale, zero.int()


def packed(values: torch.Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """int32: as many of `values` along `dim` as fit into 32 bits, the first in the lowest, or in this order."""
    import torch

    count = 32 // bits
    split = values.long().movedim(dim, -1).unflatten(-1, (-1, count))[..., list(order or range(count))]
    shifts = torch.arange(0, 32, bits)
    whole = (split << shifts).sum(-1)
    # What fills the 32nd bit is negative in int32.
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).int().movedim(-1, dim).contiguous()


def _fp8(kind: str, name: str, static: bool = False) -> Callable[[torch.Tensor, int], Tensors]:
    def pack(matrix: torch.Tensor, expert: int) -> Tensors:
        import torch

        stored, scale = fp8(matrix, kind, torch.float32)
        given = {"input_scale": torch.tensor(INPUT_SCALE * (1 + expert))} if static else {}
        return {"weight": stored, name: scale, **given}

    return pack


def _ct_fp8(kind: str, static: bool = False) -> Callable[[torch.Tensor, int], Tensors]:
    """Scales have the model's type there, and one of a tensor is [1]."""

    def pack(matrix: torch.Tensor, expert: int) -> Tensors:
        import torch

        stored, scale = fp8(matrix, kind, matrix.dtype)
        given = torch.tensor([INPUT_SCALE * (1 + expert)], dtype=matrix.dtype)
        scale = scale.reshape(1) if kind == "tensor" else scale
        return {"weight": stored, "weight_scale": scale, **({"input_scale": given} if static else {})}

    return pack


def _gptq(bits: int) -> Callable[[torch.Tensor, int], Tensors]:
    def pack(matrix: torch.Tensor, expert: int) -> Tensors:
        import torch

        stored, scale, zero = integers(matrix, bits, GROUP, zeros=False)
        return {
            "qweight": packed(stored.T, bits, 0),
            "scales": scale.T.contiguous(),
            # One less, as AutoGPTQ writes them.
            "qzeros": packed(zero.T - 1, bits, 1),
            "g_idx": (torch.arange(matrix.shape[1]) // GROUP).int(),
        }

    return pack


def _awq(matrix: torch.Tensor, expert: int) -> Tensors:
    stored, scale, zero = integers(matrix, 4, GROUP, zeros=True)
    return {
        "qweight": packed(stored.T, 4, 1, AWQ_ORDER),
        "scales": scale.T.contiguous(),
        "qzeros": packed(zero.T, 4, 1, AWQ_ORDER),
    }


def _wna16(bits: int, zeros: bool = False) -> Callable[[torch.Tensor, int], Tensors]:
    def pack(matrix: torch.Tensor, expert: int) -> Tensors:
        import torch

        stored, scale, zero = integers(matrix, bits, GROUP, zeros)
        given = {"weight_zero_point": packed(zero, bits, 0)} if zeros else {}
        shape = torch.tensor(matrix.shape)
        return {"weight_packed": packed(stored, bits, 1), "weight_scale": scale, "weight_shape": shape, **given}

    return pack


def _w8a8(matrix: torch.Tensor, expert: int) -> Tensors:
    import torch

    stored, scale, _ = integers(matrix, 8, matrix.shape[1], zeros=False)
    return {"weight": (stored - 128).to(torch.int8), "weight_scale": scale}


def _own(method: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": method, **more}


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """As the library compressed-tensors writes it."""
    common = {"symmetric": True, "dynamic": False, "group_size": None, "block_structure": None}
    group = {
        "targets": ["Linear"],
        "weights": {**common, **weights},
        "input_activations": None if inputs is None else {**common, **inputs},
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$", "re:.*shared_expert.*"],
    }


_FLOAT8: Final = {"num_bits": 8, "type": "float"}
_GPTQ: Final = {"group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
#: What an FP8 checkpoint leaves as it is, by the names of its layers; filled in for each model.
IGNORED: Final = "modules_to_not_convert"
_ACTIVATIONS: Final = {**_FLOAT8, "strategy": "token", "dynamic": True}


def _int(bits: int, symmetric: bool = True) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": symmetric}


_INT8: Final = {"num_bits": 8, "type": "int"}
_NVFP4: Final = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": NV_GROUP}
_MXFP4: Final = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": MX_GROUP}

FORMS: Final[dict[str, Form]] = {
    "fp8-block": Form(
        _fp8("block", "weight_scale_inv"),
        _own("fp8", activation_scheme="dynamic", weight_block_size=[BLOCK, BLOCK], **{IGNORED: []}),
        BLOCK,
    ),
    "fp8-tensor": Form(_fp8("tensor", "weight_scale"), _own("fp8", activation_scheme="dynamic", **{IGNORED: []}), 16),
    "fp8-tensor-static": Form(
        _fp8("tensor", "weight_scale", static=True), _own("fp8", activation_scheme="static", **{IGNORED: []}), 16
    ),
    "ct-fp8-channel": Form(
        _ct_fp8("channel"),
        _compressed("float-quantized", {**_FLOAT8, "strategy": "channel"}, _ACTIVATIONS),
        16,
    ),
    "ct-fp8-block": Form(
        _ct_fp8("block"),
        _compressed(
            "float-quantized",
            {**_FLOAT8, "strategy": "block", "block_structure": [BLOCK, BLOCK]},
            {**_FLOAT8, "strategy": "group", "group_size": BLOCK, "dynamic": True},
        ),
        BLOCK,
    ),
    "ct-fp8-tensor-static": Form(
        _ct_fp8("tensor", static=True),
        _compressed("float-quantized", {**_FLOAT8, "strategy": "tensor"}, {**_FLOAT8, "strategy": "tensor"}),
        16,
    ),
    "gptq-int4": Form(_gptq(4), _own("gptq", bits=4, **_GPTQ), GROUP, 4),
    "gptq-int8": Form(_gptq(8), _own("gptq", bits=8, **_GPTQ), GROUP),
    "awq-int4": Form(_awq, _own("awq", bits=4, group_size=GROUP, zero_point=True, version="gemm"), GROUP, 4),
    "ct-int4": Form(_wna16(4), _compressed("pack-quantized", _int(4)), GROUP, 4),
    "ct-int4-zeros": Form(_wna16(4, zeros=True), _compressed("pack-quantized", _int(4, False)), GROUP, 4),
    "ct-int8": Form(_wna16(8), _compressed("pack-quantized", _int(8)), GROUP),
    "ct-w8a8": Form(
        _w8a8,
        _compressed("int-quantized", {**_INT8, "strategy": "channel"}, {**_INT8, "strategy": "token", "dynamic": True}),
        16,
    ),
    "nvfp4": Form(
        nvfp4_tensors,
        _own("modelopt", quant_algo="NVFP4", group_size=NV_GROUP, ignore=["lm_head", "*self_attn*", "*mlp.gate"]),
        64,
        4,
    ),
    "ct-nvfp4": Form(
        ct_nvfp4(True), _compressed("nvfp4-pack-quantized", _NVFP4, {**_NVFP4, "dynamic": "local"}), 64, 4
    ),
    "ct-nvfp4-w4a16": Form(ct_nvfp4(False), _compressed("nvfp4-pack-quantized", _NVFP4), 64, 4),
    "ct-mxfp4": Form(mxfp4_each("weight_packed"), _compressed("mxfp4-pack-quantized", _MXFP4), 64, 4),
    "mxfp4-each": Form(mxfp4_each("weight"), _own("mxfp4", **{IGNORED: []}), 64, 4),
    # As gpt-oss is published.
    "mxfp4": Form(mxfp4_fused, _own("mxfp4", **{IGNORED: []}), MX_GROUP, 4, fused=True),
}


def quantise_experts(weights: Tensors, form: str) -> tuple[Tensors, dict[str, Any]]:
    """(tensors as on disk with every matrix of an expert in `form`, quantization_config)."""
    found, kept = {}, []
    for name, tensor in weights.items():
        stem, _, last = name.rpartition(".")
        _, dot, rest = stem.rpartition(".experts.")
        if dot and last == "weight" and tensor.dim() == 2:
            made = FORMS[form].pack(tensor, int(rest.partition(".")[0]))
            found.update({f"{stem}.{part}": value for part, value in made.items()})
            continue
        if FORMS[form].fused and tensor.dim() == 3 and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            # Stored input-major by gpt-oss.
            made = FORMS[form].pack(tensor.transpose(1, 2), -1)
            found.update({f"{name}{part}": value for part, value in made.items()})
            continue
        found[name] = tensor
        if last == "weight" and tensor.dim() == 2 and "embed" not in name:
            kept.append(stem)
    config = dict(FORMS[form].config)
    if IGNORED in config:
        config[IGNORED] = kept
    return found, config
