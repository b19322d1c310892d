"""What ci/checks/gpu_e2e.py runs: small random checkpoints under configurations of dwdp and of vLLM."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One model under one configuration, compared with plain vLLM under the same options.

    serve: `vllm serve` and HTTP requests instead of `LLM(...)`. batches: whether a result depends on nothing else in its
    batch, so that logprobs of other batches may be compared.
    """

    model: dict[str, Any]
    ranks: int
    dwdp: dict[str, Any]
    options: dict[str, Any] = MappingProxyType({})  # type: ignore[assignment]
    serve: bool = False
    batches: bool = True


def compiled(**more: Any) -> dict[str, Any]:
    """vLLM's default, torch.compile, with these words of its compilation config."""
    return {"enforce_eager": False, "compilation_config": more}


SIZES = [1, 2, 4, 8, 16, 24]
EAGER = {"enforce_eager": True}
#: Graphs of whole decode steps, without torch.compile.
FULL = compiled(mode=0, cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=SIZES)
#: With torch.compile, in vLLM's default mode of graphs, whole and piecewise; sizes are named, so that they read directly.
DEFAULT = compiled(cudagraph_capture_sizes=SIZES)
NO_GRAPHS = compiled(cudagraph_mode="NONE")
#: A graph for every number of tokens: padding would change which matrix products are taken.
PIECEWISE = compiled(cudagraph_mode="PIECEWISE", cudagraph_capture_sizes=list(range(1, 25)))

SPLIT, CONTIGUOUS, COMPOSITE = ({"weight_view": view} for view in ("split", "contiguous", "composite"))
#: Every forward pulls; and one token reads directly, more pull, so that ways take turns.
TRAVEL = {**SPLIT, "decode": "travel"}
PULLED, TURNS = {**SPLIT, "direct_tokens": 0}, {**SPLIT, "direct_tokens": 1}
QWEN = {"family": "qwen3_moe", "num_experts": 16}
QWEN_FP8 = {**QWEN, "fp8": True, "hidden": 256, "intermediate": 256, "head_dim": 64}
DEEPSEEK = {"family": "deepseek_v3", "num_layers": 4, "hidden": 256, "intermediate": 256, "head_dim": 128}
GPT_OSS = {"family": "gpt_oss", "num_experts": 8}
MIXTRAL = {"family": "mixtral", "num_experts": 7}
#: Of several pages of 2 MiB for each rank, on which neither rows nor shares end.
PAGES = {"num_experts": 15, "hidden": 1024, "intermediate": 384, "num_layers": 3}
#: 4.8 GB and 3.4 GB on disk.
QWEN_BIG = {
    "family": "qwen3_moe", "num_experts": 128, "num_layers": 4, "hidden": 2048, "intermediate": 768, "top_k": 8,
    "num_heads": 32, "num_kv_heads": 4, "head_dim": 128,
}  # fmt: skip
DEEPSEEK_BIG = {
    "family": "deepseek_v3", "fp8": True, "num_experts": 128, "num_layers": 5, "hidden": 2048, "intermediate": 1024,
    "top_k": 8, "num_heads": 16, "head_dim": 128,
}  # fmt: skip

#: In order of value.
CASES = {
    "qwen3-split": Case(QWEN, 2, SPLIT, EAGER),
    "qwen3-contiguous": Case(QWEN, 2, CONTIGUOUS, EAGER),
    "qwen3-vmm-split": Case(QWEN, 2, {**SPLIT, "transport": "vmm"}, FULL),
    "qwen3-vmm-contiguous": Case(QWEN, 2, {**CONTIGUOUS, "transport": "vmm"}, EAGER),
    "qwen3-full-split": Case(QWEN, 2, SPLIT, FULL),
    "qwen3-travel": Case(QWEN, 2, TRAVEL, FULL),
    "qwen3-direct": Case(QWEN, 2, {**SPLIT, "decode": "direct"}, FULL),
    "qwen3-fp8-travel": Case(QWEN_FP8, 2, TRAVEL, EAGER),
    "gpt_oss-travel": Case(GPT_OSS, 2, {**TRAVEL, "experts_per_rank": 5, "num_slots": 3}, DEFAULT),
    "qwen3-composite": Case({**QWEN, **PAGES}, 2, COMPOSITE, FULL),
    "gpt_oss-composite": Case(
        {**GPT_OSS, **PAGES, "num_experts": 8}, 2, {**COMPOSITE, "experts_per_rank": 5, "num_slots": 3}, DEFAULT
    ),
    # vLLM's FP8 kernels on GPUs want a router of 16 experts or a multiple.
    "qwen3-fp8-composite": Case(
        {**QWEN_FP8, **PAGES, "num_experts": 16}, 2, {**COMPOSITE, "experts_per_rank": 9}, EAGER
    ),
    "qwen3-serve": Case(QWEN, 2, {}, FULL, serve=True),
    "qwen3-serve-default": Case(QWEN, 2, {}, DEFAULT, serve=True),
    "qwen3-pulled": Case(QWEN, 2, PULLED, EAGER),
    "qwen3-turns": Case(QWEN, 2, TURNS, EAGER),
    "qwen3-mp": Case(QWEN, 2, {"launcher": "mp"}, FULL),
    "qwen3-ray": Case(QWEN, 2, {"launcher": "ray"}, EAGER),
    "deepseek-fp8-split": Case({**DEEPSEEK, "fp8": True}, 2, SPLIT, EAGER),
    "deepseek-split": Case(DEEPSEEK, 2, SPLIT, EAGER),
    "qwen3-default-split": Case(QWEN, 2, SPLIT, DEFAULT),
    "qwen3-default-contiguous": Case(QWEN, 2, CONTIGUOUS, NO_GRAPHS),
    "qwen3-compiled-split": Case(QWEN, 2, SPLIT, NO_GRAPHS),
    "qwen3-piecewise-split": Case(QWEN, 2, SPLIT, PIECEWISE),
    "deepseek-default-split": Case(DEEPSEEK, 2, SPLIT, DEFAULT),
    "qwen3-fp8-split": Case(QWEN_FP8, 2, SPLIT, EAGER),
    "qwen3-fp8-contiguous": Case(QWEN_FP8, 2, CONTIGUOUS, EAGER),
    "gpt_oss-split": Case(GPT_OSS, 2, {**SPLIT, "experts_per_rank": 5, "num_slots": 3}, EAGER),
    "mixtral-split-3": Case(MIXTRAL, 3, SPLIT, EAGER),
    "deepseek-full-split": Case(DEEPSEEK, 2, SPLIT, FULL),
    "qwen3-full-split-4": Case(QWEN, 4, SPLIT, FULL),
    "qwen3-contiguous-4": Case(QWEN, 4, CONTIGUOUS, EAGER),
    "big-qwen3-split-4": Case(QWEN_BIG, 4, SPLIT, FULL),
    "big-qwen3-contiguous": Case(QWEN_BIG, 2, CONTIGUOUS, EAGER),
    "big-deepseek-fp8-split": Case(DEEPSEEK_BIG, 2, SPLIT, EAGER),
    "big-deepseek-fp8-serve-4": Case(DEEPSEEK_BIG, 4, {}, FULL, serve=True),
    # `--only four-`: what two ranks cannot show. 18 experts: shares of 5, 5, 4 and 4.
    "four-travel": Case(QWEN, 4, TRAVEL, FULL),
    "four-groups-of-two": Case(QWEN, 4, {**SPLIT, "group_size": 2}, FULL),
    "four-overlapping": Case(QWEN, 4, {**SPLIT, "experts_per_rank": 7}, FULL),
    "four-uneven": Case({**QWEN, "num_experts": 18}, 4, TURNS, FULL),
    "four-composite": Case({**QWEN, **PAGES}, 4, COMPOSITE, FULL),
    "four-fp8-travel": Case(QWEN_FP8, 4, {**TRAVEL, "experts_per_rank": 5}, DEFAULT),
    "four-gpt_oss-travel": Case(GPT_OSS, 4, {**TRAVEL, "experts_per_rank": 3, "num_slots": 3}, DEFAULT),
    "four-deepseek": Case({**DEEPSEEK, "fp8": True}, 4, SPLIT, EAGER),
    "four-serve-default": Case(QWEN, 4, {}, DEFAULT, serve=True),
    "qwen3-pinned-split": Case(QWEN, 2, {**SPLIT, "transport": "cuda_pinned"}, EAGER),
}

#: No forms on disk: vLLM quantises a BF16 checkpoint while it reads it. The first quantises linear layers too, among them a
#: router, of 16 experts.
ONLINE = {
    "online-fp8-tensor": {"quantization": "fp8_per_tensor"},
    "online-fp8-block": {"quantization": "online", "quantization_config": {"moe": "fp8_per_block"}},
    "online-fp8-channel": {"quantization": "online", "quantization_config": {"moe": "fp8_per_channel"}},
    "online-int8": {"quantization": "online", "quantization_config": {"moe": "int8_per_channel_weight_only"}},
}

_VIEWS = {"composite": (COMPOSITE, FULL), "contiguous": (CONTIGUOUS, EAGER), "split": (SPLIT, FULL)}
_BOTH = ("composite", "contiguous")
#: (form of the experts, see examples/checkpoints/quantised.py; --moe-backend; views), in order of value.
_QUANTISED = (
    ("fp8-block", "triton", (*_BOTH, "split")),
    ("gptq-int4", "marlin", _BOTH),
    ("ct-fp8-channel", "cutlass", _BOTH),
    ("mxfp4", "marlin", _BOTH),
    ("fp8-tensor-static", "triton", _BOTH),
    ("awq-int4", "marlin", _BOTH),
    ("ct-int4", "marlin", _BOTH),
    ("fp8-block", "marlin", _BOTH),
    ("fp8-tensor", "triton", (*_BOTH, "split")),
    ("ct-w8a8", "triton", _BOTH),
    ("gptq-int8", "marlin", _BOTH),
    ("ct-int4-zeros", "marlin", _BOTH),
    ("ct-int4", "triton", _BOTH),
    ("ct-fp8-tensor-static", "cutlass", _BOTH),
    ("ct-fp8-block", "triton", _BOTH),
    ("ct-fp8-channel", "triton", _BOTH),
    ("ct-int8", "marlin", _BOTH),
    ("fp8-tensor", "marlin", ("composite",)),
    ("fp8-tensor-static", "marlin", ("composite",)),
    ("ct-fp8-channel", "marlin", ("composite",)),
    ("ct-fp8-block", "marlin", ("composite",)),
    ("ct-fp8-tensor-static", "triton", ("composite",)),
    ("ct-fp8-tensor-static", "marlin", ("composite",)),
    ("ct-int4-zeros", "triton", ("composite",)),
    ("ct-int8", "triton", ("composite",)),
    ("nvfp4", "marlin", _BOTH),
    ("online-fp8-tensor", "triton", (*_BOTH, "split")),
    ("ct-nvfp4", "marlin", _BOTH),
    ("ct-mxfp4", "marlin", _BOTH),
    ("mxfp4-each", "marlin", ("composite",)),
    ("ct-nvfp4-w4a16", "marlin", ("composite",)),
    ("online-fp8-block", "triton", (*_BOTH, "split")),
    ("online-fp8-channel", "cutlass", _BOTH),
    ("online-int8", "triton", _BOTH),
    ("online-fp8-channel", "triton", ("composite",)),
    ("online-fp8-tensor", "marlin", ("composite",)),
    ("online-fp8-block", "marlin", ("composite",)),
)


def _quantised(form: str, kernels: str, view: str) -> Case:
    model = {**(GPT_OSS if form == "mxfp4" else QWEN), **PAGES, "intermediate": 768}
    more = {"num_experts": 16} if form in ONLINE else {"experts": form}
    dwdp, options = _VIEWS[view]
    # 15 experts of 2 ranks are shares of 8 and 7; of 16 a rank has 9.
    overlapping = {"experts_per_rank": 9} if form in ONLINE else {}
    return Case(
        {**model, **more},
        2,
        {**dwdp, **overlapping},
        {**options, **ONLINE.get(form, {}), "moe_backend": kernels},
        # Activations of a whole batch share a scale.
        batches=(form.removeprefix("online-"), kernels) != ("fp8-tensor", "triton"),
    )


#: `--quantised`: FORM-KERNELS-VIEW.
QUANTISED = {
    f"{form}-{kernels}-{view}": _quantised(form, kernels, view) for form, kernels, views in _QUANTISED for view in views
}
