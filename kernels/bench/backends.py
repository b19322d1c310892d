"""Which of vLLM's MoE backends load on this machine, and how fast they are: `python -m vllm_dwdp.kernels.bench.backends`.

The bench's base is vLLM's function `fused_experts` (Triton). This asks every other backend of vLLM 0.32.0 that computes such
layers, by name: those that cannot be imported or refuse the device or the quantisation are printed with their reason; the
others run as vLLM's modular kernel on the same weights and batch, are compared with `fused_experts` and timed in turns with
it. RATIO is the time of `fused_experts` by theirs.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .shapes import MODELS, Batch, Problem
from .sides import LOST, quant_config, vllm_experts
from .timing import captured, in_turns

#: Name -> module and class below vllm.model_executor.layers.fused_moe.experts.
BACKENDS = {
    "Triton (modular)": ("triton_moe", "TritonExperts"),
    "DeepGEMM": ("deep_gemm_moe", "DeepGemmExperts"),
    "Triton or DeepGEMM": ("triton_deep_gemm_moe", "TritonOrDeepGemmExperts"),
    "CUTLASS FP8": ("cutlass_moe", "CutlassExpertsFp8"),
    "Triton or CUTLASS": ("triton_cutlass_moe", "TritonOrCutlassExperts"),
    "FlashInfer CUTLASS": ("flashinfer_cutlass_moe", "FlashInferExperts"),
    "FlashInfer TRTLLM": ("trtllm_fp8_moe", "TrtLlmFp8ExpertsModular"),
    "FlashInfer TRTLLM BF16": ("trtllm_bf16_moe", "TrtLlmBf16ExpertsModular"),
}
DEFAULT_MODELS = ("DeepSeek-V3", "Qwen3-30B-A3B", "gpt-oss-120b")
TOLERANCE = 3e-2


@dataclass(frozen=True)
class Answer:
    """ratio and us: None where it did not run; `said` then says why."""

    model: str
    tokens: int
    backend: str
    us: float | None
    ratio: float | None
    said: str


def refusal(cls: Any, problem: Problem) -> str:
    """Why a class does not compute such a layer here, or ''; asked of the class itself."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.quantization.utils import quant_utils

    keys = (None, None)
    if problem.model.quant == "block":
        keys = (quant_utils.kFp8Static128BlockSym, quant_utils.kFp8Dynamic128Sym)
    if not cls._supports_current_device():
        return "refuses this device, or its library does not load"
    if not cls._supports_quant_scheme(*keys):
        return f"does not compute {'FP8 with block scales' if keys[0] else 'unquantised experts'}"
    if not cls._supports_activation(MoEActivation.from_str(problem.model.activation.kind)):
        return f"has no activation {problem.model.activation.kind}"
    return ""


def made(cls: Any, problem: Problem) -> Any:
    """A call (batch) -> result of a backend's class as vLLM's modular kernel."""
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.prepare_finalize import MoEPrepareAndFinalizeNoDPEPModular

    model = problem.model
    activation = MoEActivation.from_str(model.activation.kind)
    config = FusedMoEConfig(
        num_experts=model.experts,
        experts_per_token=model.top_k,
        hidden_dim=model.hidden,
        intermediate_size=model.width,
        num_local_experts=model.experts,
        num_logical_experts=model.experts,
        activation=activation,
        device=problem.device,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=problem.dtype,
        max_num_tokens=32768,
        has_bias=model.bias,
    )
    kernel = modular_kernel.FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), cls(config, quant_config(problem)))
    w13, w2 = problem.dense
    if "flashinfer" in cls.__module__ or "trtllm" in cls.__module__:
        # Those want up before gate.
        w13 = torch.cat(w13.chunk(2, dim=1)[::-1], dim=1)

    def run(batch: Batch) -> torch.Tensor:
        result: torch.Tensor = kernel.apply(
            hidden_states=batch.hidden, w1=w13, w2=w2, topk_weights=batch.weights, topk_ids=batch.ids,
            activation=activation, global_num_experts=model.experts, expert_map=None, apply_router_weight_on_input=False,
        )  # fmt: skip
        return result

    return run


def ask(name: str, problem: Problem, tokens: int) -> Answer:
    """Load, compare, time; whatever goes wrong is the answer."""

    def answer(said: str, us: float | None = None, ratio: float | None = None) -> Answer:
        return Answer(problem.model.name, tokens, name, us, ratio, said)

    module, cls_name = BACKENDS[name]
    try:
        cls = getattr(importlib.import_module(f"vllm.model_executor.layers.fused_moe.experts.{module}"), cls_name)
        reason = refusal(cls, problem)
        if reason:
            return answer(reason)
        run = made(cls, problem)
        batches = [problem.batch(tokens, seed) for seed in range(2)]
        expected, found = vllm_experts(problem, batches[0]).float(), run(batches[0]).float()
        off = float((found - expected).abs().max() / expected.abs().max())
        if not off < TOLERANCE:
            return answer(f"results are off by {off:.1e}: not comparable")
        base = captured([lambda batch=batch: vllm_experts(problem, batch) for batch in batches], problem.device)  # type: ignore[misc]
        theirs = captured([lambda batch=batch: run(batch) for batch in batches], problem.device)  # type: ignore[misc]
        measured = in_turns(base, theirs, problem.device, 9, 0.02)
        return answer("ran", statistics.median(measured.own) * 1e6, statistics.median(measured.ratios))
    except Exception as error:
        if any(word in str(error) for word in LOST):
            raise
        return answer(f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=list(DEFAULT_MODELS), help="names, or parts of them")
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 8192, 1])
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin nothing new after so many seconds")
    parser.add_argument("--json", type=Path, help="also write the answers there, after each")
    options = parser.parse_args()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.worker.workspace import init_workspace_manager

    device, ends = torch.device("cuda", 0), time.monotonic() + options.limit_s
    answers: list[Answer] = []
    init_workspace_manager(device)
    with set_current_vllm_config(VllmConfig()):
        for model in [m for m in MODELS if any(part.lower() in m.name.lower() for part in options.model)]:
            if time.monotonic() > ends:
                break
            problem = Problem(model, device)
            for tokens in options.tokens:
                for name in BACKENDS:
                    refused = any(a.model == model.name and a.backend == name and a.us is None for a in answers)
                    if refused or time.monotonic() > ends:
                        continue
                    answers.append(ask(name, problem, tokens))
                    last = answers[-1]
                    figures = "" if last.us is None else f"{last.us:.1f} us, ratio {last.ratio:.3f}"
                    print(f"{last.model:<16} {last.tokens:>6} {name:<22} {figures} {last.said}", flush=True)
                    if options.json:
                        options.json.write_text(json.dumps([asdict(a) for a in answers], indent=1))
            del problem
            gc.collect()
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
