"""Split-weight experts beside vLLM's fused_experts: `python -m vllm_dwdp.kernels.bench [--quick] [--json FILE]`.

A layer's routed experts, whole (quantisation, sorting, both GEMMs, activation, reduction), for shapes of known models and
1 to 32,768 tokens. Both sides use the same tile configuration (vLLM's choice), the same kernels beside the GEMMs, CUDA
graphs, and the same batches in turns; ours reads experts scattered over two allocations. RATIO is vLLM's time by ours:
above 1 is faster. Every result is compared bit by bit with vLLM's and with a float32 reference. At the end, per number of
tokens: the geometric mean over shapes and its lower 95 % bound; goals >= 1.00 and >= 0.97.

`--own` uses our tuned tables where there are some. On a CPU (`--device cpu --tiny`, TRITON_INTERPRET=1) the base is our
kernel over contiguous experts; times mean nothing then.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from .configs import device_name, layer_shape, tiles_for
from .reference import reference_experts
from .shapes import BLOCK, MODELS, TINY_MODELS, Batch, ModelShape, Problem
from .split_moe import Workspace, split_experts
from .tiles import Tiles
from .timing import captured, in_turns, lower_bound
from .torch_ops import quantize_fp8

TOKENS = (1, 16, 128, 1024, 8192, 32768)
QUICK_MODELS = ("Qwen3-30B-A3B", "DeepSeek-V3", "gpt-oss-120b")
QUICK_TOKENS = (1, 16, 128, 1024, 8192)
GOAL_MEAN, GOAL_BOUND = 1.00, 0.97
#: Tokens of a batch that the reference computes.
SAMPLED = 32
#: Batches that take turns: enough for caches not to stay warm; fewer where a batch is large.
BATCHES, LARGE, LARGE_BATCHES = 4, 4096, 2


@dataclass(frozen=True)
class Cell:
    """One shape and number of tokens. error: largest difference from the reference, by the largest value there."""

    model: str
    tokens: int
    tiles: str
    base_us: float
    own_us: float
    ratio: float
    tflops: float
    bitwise: bool
    error: float
    base_error: float
    ratios: list[float]


def describe(tiles: Tiles) -> str:
    """Short: 128x128x64 g16 8w3s."""
    own = "" if tiles.kernel == "pointer" else f" {tiles.kernel}"
    return (
        f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k} g{tiles.group_m} {tiles.num_warps}w{tiles.num_stages}s{own}"
    )


def vllm_experts(problem: Problem, batch: Batch) -> torch.Tensor:
    """The layer by vLLM; on a CPU by our kernel, over contiguous experts."""
    if problem.device.type != "cuda":
        return own_experts(problem, batch, problem_tiles(problem, batch, own=False), scattered=False)
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    w13, w2 = problem.dense
    fp8 = problem.model.quant == "block"
    config = FusedMoEQuantConfig.make(
        torch.float8_e4m3fn if fp8 else None,
        block_shape=[BLOCK, BLOCK] if fp8 else None,
        w1_scale=problem.scales[0],
        w2_scale=problem.scales[1],
        w1_bias=problem.biases[0],
        w2_bias=problem.biases[1],
    )
    activation = MoEActivation.from_str(problem.model.activation.kind)
    result: torch.Tensor = fused_experts(
        batch.hidden, w13, w2, batch.weights, batch.ids, activation=activation, quant_config=config
    )
    return result


def own_experts(
    problem: Problem, batch: Batch, tiles: Tiles, scattered: bool = True, workspace: Workspace | None = None
) -> torch.Tensor:
    """The layer by our kernels."""
    w13, w2 = problem.tables if scattered else problem.contiguous
    return split_experts(
        batch.hidden, w13, w2, batch.weights, batch.ids, ops=problem.ops(), tiles=tiles, workspace=workspace
    )


def problem_tiles(problem: Problem, batch: Batch, own: bool) -> Tiles:
    """vLLM's choice for this batch, or ours."""
    block = (BLOCK, BLOCK) if problem.model.quant == "block" else None
    shape = layer_shape(problem.tables[0], problem.tables[1], problem.model.top_k)
    return tiles_for(shape, batch.hidden.shape[0], problem.device, block, own=own)


def errors(problem: Problem, batch: Batch, results: Sequence[torch.Tensor]) -> list[float]:
    """Of each result on the first tokens, relative to the largest value of the reference."""

    def rounding(x: torch.Tensor) -> torch.Tensor:
        if problem.model.quant == "none":
            return x.to(problem.dtype)
        stored, scale = quantize_fp8(x.to(problem.dtype), "block", BLOCK)
        return stored.float() * scale.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]

    w13, w2 = problem.wide()
    head = Batch(*(part[:SAMPLED] for part in batch))
    expected = reference_experts(
        head.hidden, w13, w2, head.weights, head.ids, problem.model.activation,
        bias13=problem.biases[0], bias2=problem.biases[1], rounding=rounding,
    )  # fmt: skip
    return [float((found[:SAMPLED].float() - expected).abs().max() / expected.abs().max()) for found in results]


def measure(problem: Problem, tokens: int, pairs: int, pair_s: float, own: bool) -> Cell:
    """Compare and time one number of tokens."""
    few = tokens >= LARGE or problem.device.type != "cuda"
    batches = [problem.batch(tokens, seed) for seed in range(LARGE_BATCHES if few else BATCHES)]
    tiles = problem_tiles(problem, batches[0], own)
    found = [vllm_experts(problem, batches[0]), own_experts(problem, batches[0], tiles)]
    base_error, error = errors(problem, batches[0], found)
    same = torch.equal(*found)
    del found
    base = captured([lambda batch=batch: vllm_experts(problem, batch) for batch in batches], problem.device)  # type: ignore[misc]
    ours = captured([lambda batch=batch: own_experts(problem, batch, tiles) for batch in batches], problem.device)  # type: ignore[misc]
    measured = in_turns(base, ours, problem.device, pairs, pair_s)
    base_s, own_s = statistics.median(measured.base), statistics.median(measured.own)
    return Cell(
        model=problem.model.name,
        tokens=tokens,
        tiles=describe(tiles),
        base_us=base_s * 1e6,
        own_us=own_s * 1e6,
        ratio=statistics.median(measured.ratios),
        tflops=problem.model.flops_per_token * tokens / own_s / 1e12,
        bitwise=same,
        error=error,
        base_error=base_error,
        ratios=measured.ratios,
    )


def summarise(cells: Sequence[Cell]) -> list[tuple[int, float, float]]:
    """(tokens, geometric mean, lower bound), printed as they are."""
    rows = []
    for tokens in sorted({cell.tokens for cell in cells}):
        mean, bound = lower_bound([cell.ratios for cell in cells if cell.tokens == tokens])
        rows.append((tokens, mean, bound))
        reached = mean >= GOAL_MEAN and bound >= GOAL_BOUND
        print(
            f"{tokens:>6} tokens: ratio {mean:.3f}, lower 95 % bound {bound:.3f}{'' if reached else '  below the goal'}"
        )
    return rows


def bench(
    models: Sequence[ModelShape], tokens: Sequence[int], device: torch.device, *, pairs: int, pair_s: float, own: bool,
    dtype: torch.dtype, budget_s: float,
) -> list[Cell]:  # fmt: skip
    """Measure all, printing as it goes; after `budget_s` seconds nothing new is begun."""
    ends = time.monotonic() + budget_s
    heads = f"{'MODEL':<16} {'TOKENS':>6} {'VLLM us':>10} {'OURS us':>10} {'RATIO':>6} {'TFLOP/s':>8}"
    print(f"{heads} {'BITS':<6} {'ERROR':>8}  TILES")
    cells: list[Cell] = []
    for model in models:
        if time.monotonic() > ends:
            print(f"{model.name}: left out, {budget_s:.0f} s are over")
            continue
        problem = Problem(model, device, dtype)
        for count in tokens:
            if time.monotonic() > ends:
                print(f"{model.name}, {count} tokens: left out, {budget_s:.0f} s are over")
                continue
            cell = measure(problem, count, pairs, pair_s, own)
            cells.append(cell)
            print(
                f"{cell.model:<16} {cell.tokens:>6} {cell.base_us:>10.1f} {cell.own_us:>10.1f} {cell.ratio:>6.3f} "
                f"{cell.tflops:>8.1f} {'same' if cell.bitwise else 'DIFFER':<6} {cell.error:>8.1e}  {cell.tiles}",
                flush=True,
            )
        del problem
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return cells


def main() -> int:
    """Command line; returns 1 if bits differ under vLLM's tiles, or an error is larger than vLLM's by a half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three models, up to 8,192 tokens, at most 3 minutes")
    parser.add_argument("--tiny", action="store_true", help="tiny layers, for a machine without a GPU")
    parser.add_argument("--own", action="store_true", help="our tuned tiles where there are some")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", nargs="*", default=[], help="only models whose names contain one of these")
    parser.add_argument("--tokens", type=int, nargs="*", default=[])
    parser.add_argument("--budget-s", type=float, help="begin nothing new after so many seconds")
    parser.add_argument("--json", type=Path, help="also write everything there")
    options = parser.parse_args()
    device = torch.device(options.device)
    models: Sequence[ModelShape] = MODELS
    tokens: Sequence[int] = TOKENS
    pairs, pair_s, budget_s = 30, 0.04, 3600.0
    if options.quick:
        models, tokens = tuple(model for model in MODELS if model.name in QUICK_MODELS), QUICK_TOKENS
        pairs, pair_s, budget_s = 15, 0.02, 150.0
    if options.tiny:
        models, tokens, pairs, pair_s = TINY_MODELS, (1, 8), 2, 0.0
    if options.model:
        models = tuple(model for model in models if any(part.lower() in model.name.lower() for part in options.model))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    print(f"{device_name(device)}, torch {torch.__version__}, Triton {triton.__version__}")
    cells = bench(
        models, tuple(options.tokens) or tokens, device, pairs=pairs, pair_s=pair_s, own=options.own, dtype=dtype,
        budget_s=options.budget_s or budget_s,
    )  # fmt: skip
    summary = summarise(cells)
    if options.json:
        head = {"device": device_name(device), "torch": torch.__version__, "triton": triton.__version__}
        rows = [{"tokens": count, "mean": mean, "bound": bound} for count, mean, bound in summary]
        options.json.write_text(
            json.dumps(head | {"summary": rows, "cells": [asdict(cell) for cell in cells]}, indent=1)
        )
    wrong = [
        cell for cell in cells if cell.error > max(1.5 * cell.base_error, 1e-2) or not (cell.bitwise or options.own)
    ]
    for cell in wrong:
        print(
            f"{cell.model}, {cell.tokens} tokens: bits {'agree' if cell.bitwise else 'differ'}, error {cell.error:.1e}"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
