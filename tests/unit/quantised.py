"""Small models whose experts are in the quantised forms of real checkpoints, and vLLM's kernels that take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ci.checks.gpu_cases import ONLINE
from tests.unit.whole_model import Loaded, load
from vllm_dwdp.platform import CUDA

EXPERTS, RANKS = 5, 2
SIZES = {"num_experts": EXPERTS, "num_layers": 2, "hidden": 256, "intermediate": 128}

#: (form of the experts on disk, --moe-backend): all that are admitted and that vLLM's own choice takes on such a GPU.
TAKEN = [
    *((form, kernels) for form in ("fp8-block", "fp8-tensor", "fp8-tensor-static") for kernels in ("triton", "marlin")),
    *((f"ct-fp8-{form}", "cutlass") for form in ("channel", "tensor-static")),
    *((f"ct-fp8-{form}", "triton") for form in ("channel", "block", "tensor-static")),
    *((f"ct-fp8-{form}", "marlin") for form in ("channel", "block", "tensor-static")),
    *((form, "marlin") for form in ("gptq-int4", "gptq-int8", "awq-int4", "ct-int4", "ct-int4-zeros", "ct-int8")),
    *((form, "triton") for form in ("ct-int4", "ct-int4-zeros", "ct-int8", "ct-w8a8")),
    *((form, "marlin") for form in ("nvfp4", "ct-nvfp4", "ct-nvfp4-w4a16", "ct-mxfp4", "mxfp4-each", "mxfp4")),
    ("", "triton"),
    *((f"online-fp8-{form}", "triton") for form in ("tensor", "block", "channel")),
    *((f"online-fp8-{form}", "marlin") for form in ("tensor", "block")),
    ("online-fp8-channel", "cutlass"),
    ("online-int8", "triton"),
]
#: What vLLM gives memory and never writes, nor reads.
UNREAD = {"ct-nvfp4-w4a16": ("w13_input_global_scale", "w2_input_global_scale")}
#: Without cases for GPUs: FlashInfer is not among what is installed there.
FLASHINFER = [
    (form, "flashinfer_cutlass")
    for form in ("", "fp8-block", "fp8-tensor-static", "ct-fp8-block", "ct-fp8-tensor-static", "online-fp8-block")
]


def sizes(form: str) -> dict[str, Any]:
    """Of a checkpoint whose experts are in this form, or become so while it is read; empty for BF16."""
    return {**SIZES, "experts": "" if form in ONLINE else form, **({"family": "gpt_oss"} if form == "mxfp4" else {})}


def options(form: str, kernels: str) -> dict[str, Any]:
    """What vLLM is told of experts in this form."""
    told = ONLINE.get(form, {})
    if told.get("quantization") == "fp8_per_tensor":
        # Linear layers too, and those are computed by kernels of this machine.
        told = {"quantization": "online", "quantization_config": {"moe": "fp8_per_tensor"}}
    return {**told, "moe_backend": kernels}


def plain_of(folder: Path, form: str, kernels: str = "triton") -> Loaded:
    """The whole model, from plain vLLM."""
    return load(folder, 0, 1, **options(form, kernels))


def rank_of(
    folder: Path, rank: int, kernels: str = "triton", view: str = "auto", form: str = "", **more: Any
) -> Loaded:
    """The model with the share of `rank`, as on GPUs; form: where vLLM quantises."""
    return load(folder, rank, RANKS, {"weight_view": view}, platform=CUDA, **options(form, kernels), **more)


def ranks_of(folder: Path, form: str, kernels: str = "triton", view: str = "auto") -> list[Loaded]:
    """All ranks, one after the other; where they ask each other, once more with what all have said."""
    said: dict[str, list[Any]] = {}

    def ask(name: str, value: Any) -> list[Any]:
        said.setdefault(name, []).append(value)
        return [value]

    def loaded(gather: Callable[[str, Any], list[Any]]) -> list[Loaded]:
        return [rank_of(folder, rank, kernels, view, form, gather=gather) for rank in range(RANKS)]

    first = loaded(ask)
    return loaded(lambda name, value: said[name]) if said else first
