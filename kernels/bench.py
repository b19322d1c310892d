"""Split-weight experts beside vLLM's fused_experts: `python -m vllm_dwdp.kernels.bench [--both]`.

A layer's routed experts, whole (quantisation, sorting, both GEMMs, activation, reduction), for shapes of known models and
1 to 32,768 tokens. MODE same: both sides use the same tile configuration (vLLM's choice) and results are compared bit by
bit. MODE own (`--own`): ours uses our tuned tables where there are some (`--tables FOLDER`, by default the shipped ones);
other tiles may round other bits, so there only the error counts. `--both` measures both against the same base. The rest is
equal: the kernels beside the GEMMs, CUDA graphs, the same batches in turns; ours reads experts scattered over two
allocations. RATIO is vLLM's time by ours: above 1 is faster. Every result is compared with a float32 reference. SHARE is
of the matrix rate of a large product (8192^3, bf16 or fp8) measured in this run. At the end, per number of tokens: the
geometric mean over shapes and its lower 95 % bound; goals >= 1.00 and >= 0.97. The JSON is written after every row.

On a CPU (`--device cpu --tiny`, TRITON_INTERPRET=1) the base is our kernel over contiguous experts; times mean nothing then.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from .configs import FOLDER, device_name, layer_shape, tiles_for
from .rates import matrix_rates
from .reference import reference_experts
from .shapes import BLOCK, MODELS, TINY_MODELS, Batch, ModelShape, Problem
from .split_moe import Workspace, split_experts
from .tiles import Tiles
from .timing import Pairs, captured, in_turns, lower_bound
from .torch_ops import quantize_fp8

TOKENS = (1, 16, 128, 1024, 8192, 32768)
QUICK_MODELS = ("E256-bf16", "Qwen3-30B-A3B", "DeepSeek-V3", "gpt-oss-120b")
QUICK_TOKENS = (8192, 1, 128, 1024, 16)
GOAL_MEAN, GOAL_BOUND = 1.00, 0.97
#: Tokens of a batch that the reference computes.
SAMPLED = 32
#: Batches that take turns: enough for caches not to stay warm; fewer where a batch is large.
BATCHES, LARGE, LARGE_BATCHES = 4, 4096, 2


@dataclass(frozen=True)
class Cell:
    """One shape and number of tokens. error: largest difference from the reference, by the largest value there.

    mode: 'same' tiles as vLLM or our 'own'. share: of the matrix rate of the weights' dtype in this run, 0 if not measured.
    """

    model: str
    tokens: int
    mode: str
    tiles: str
    base_us: float
    own_us: float
    ratio: float
    tflops: float
    base_tflops: float
    share: float
    base_share: float
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


def poisoned(problem: Problem, tokens: int) -> Workspace:
    """A workspace full of NaN, so that rows that no kernel wrote are seen."""
    w13, w2 = problem.tables
    like = torch.empty(0, dtype=problem.dtype, device=problem.device)
    made = Workspace.allocate(tokens * problem.model.top_k, problem.ops().width(w13.rows), w13, w2, like)
    for memory in (made.activated, made.gemm):
        memory.fill_(float("nan"))
    return made


def problem_tiles(problem: Problem, batch: Batch, own: bool, folder: Path = FOLDER) -> Tiles:
    """vLLM's choice for this batch, or ours by the tables in `folder`."""
    block = (BLOCK, BLOCK) if problem.model.quant == "block" else None
    shape = layer_shape(problem.tables[0], problem.tables[1], problem.model.top_k)
    return tiles_for(shape, batch.hidden.shape[0], problem.device, block, own=own, folder=folder)


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


def measure(
    problem: Problem,
    tokens: int,
    modes: Sequence[str],
    *,
    pairs: int,
    pair_s: float,
    folder: Path,
    rates: dict[str, float],
) -> list[Cell]:
    """Compare and time one number of tokens, once per mode; where our tiles are vLLM's, once for both."""
    few = tokens >= LARGE or problem.device.type != "cuda"
    batches = [problem.batch(tokens, seed) for seed in range(LARGE_BATCHES if few else BATCHES)]
    chosen = {mode: problem_tiles(problem, batches[0], mode == "own", folder) for mode in modes}
    results = {"base": vllm_experts(problem, batches[0])}
    for tiles in set(chosen.values()):
        results[describe(tiles)] = own_experts(problem, batches[0], tiles, workspace=poisoned(problem, tokens))
    off = dict(zip(results, errors(problem, batches[0], list(results.values())), strict=True))
    same = {name: torch.equal(results["base"], result) for name, result in results.items()}
    del results
    base = captured([lambda batch=batch: vllm_experts(problem, batch) for batch in batches], problem.device)  # type: ignore[misc]
    measured: dict[Tiles, Pairs] = {}
    for tiles in set(chosen.values()):
        calls = [lambda batch=batch, tiles=tiles: own_experts(problem, batch, tiles) for batch in batches]  # type: ignore[misc]
        measured[tiles] = in_turns(base, captured(calls, problem.device), problem.device, pairs, pair_s)
    tera = problem.model.flops_per_token * tokens / 1e12
    rate = rates.get("fp8" if problem.model.quant == "block" else "bf16", 0.0)
    cells = []
    for mode, tiles in chosen.items():
        base_s, own_s = statistics.median(measured[tiles].base), statistics.median(measured[tiles].own)
        name = describe(tiles)
        cell = Cell(
            model=problem.model.name, tokens=tokens, mode=mode, tiles=name, base_us=base_s * 1e6, own_us=own_s * 1e6,
            ratio=statistics.median(measured[tiles].ratios), tflops=tera / own_s, base_tflops=tera / base_s,
            share=tera / own_s / rate if rate else 0.0, base_share=tera / base_s / rate if rate else 0.0,
            bitwise=same[name], error=off[name], base_error=off["base"], ratios=measured[tiles].ratios,
        )  # fmt: skip
        cells.append(cell)
    return cells


def summarise(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Per mode and number of tokens: geometric mean and lower bound, printed as they are."""
    rows = []
    for mode, tokens in sorted({(cell.mode, cell.tokens) for cell in cells}, key=lambda key: (key[0] == "own", key[1])):
        chosen = [cell for cell in cells if (cell.mode, cell.tokens) == (mode, tokens)]
        mean, bound = lower_bound([cell.ratios for cell in chosen])
        rows.append({"mode": mode, "tokens": tokens, "shapes": len(chosen), "mean": mean, "bound": bound})
        missed = "" if mean >= GOAL_MEAN and bound >= GOAL_BOUND else "  below the goal"
        print(
            f"{mode:<4} {tokens:>6} tokens, {len(chosen)} shapes: ratio {mean:.3f}, lower 95 % bound {bound:.3f}{missed}"
        )
    return rows


def bench(
    rows: Sequence[tuple[ModelShape, int]], device: torch.device, modes: Sequence[str], *, pairs: int, pair_s: float,
    dtype: torch.dtype, limit_s: float, folder: Path, rates: dict[str, float], written: Callable[[list[Cell]], None],
) -> list[Cell]:  # fmt: skip
    """Measure all, printing as it goes; after `limit_s` seconds nothing new is begun. `written` is called after each row."""
    ends = time.monotonic() + limit_s
    heads = f"{'MODEL':<16} {'TOKENS':>6} {'MODE':<4} {'VLLM us':>10} {'OURS us':>10} {'RATIO':>6} {'TFLOP/s':>8}"
    print(f"{heads} {'SHARE':>5} {'VLLM':>5} {'BITS':<6} {'ERROR':>8}  TILES")
    cells: list[Cell] = []
    problem: Problem | None = None
    for done, (model, count) in enumerate(rows):
        if time.monotonic() > ends:
            print(f"{limit_s:.0f} s are over: {len(rows) - done} of {len(rows)} rows left out")
            break
        if problem is None or problem.model is not model:
            problem = None
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            problem = Problem(model, device, dtype)
        for cell in measure(problem, count, modes, pairs=pairs, pair_s=pair_s, folder=folder, rates=rates):
            cells.append(cell)
            print(
                f"{cell.model:<16} {cell.tokens:>6} {cell.mode:<4} {cell.base_us:>10.1f} {cell.own_us:>10.1f} "
                f"{cell.ratio:>6.3f} {cell.tflops:>8.1f} {cell.share:>5.2f} {cell.base_share:>5.2f} "
                f"{'same' if cell.bitwise else 'DIFFER':<6} {cell.error:>8.1e}  {cell.tiles}",
                flush=True,
            )
        written(cells)
    return cells


def main() -> int:
    """Command line; returns 1 if bits differ under vLLM's tiles, or an error is larger than vLLM's by a half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four shapes, up to 8,192 tokens, at most 3 minutes")
    parser.add_argument("--tiny", action="store_true", help="tiny layers, for a machine without a GPU")
    parser.add_argument("--own", action="store_true", help="our tuned tiles where there are some")
    parser.add_argument("--both", action="store_true", help="with vLLM's tiles and with our own")
    parser.add_argument("--tables", type=Path, default=FOLDER, help="folder of the tuned tables")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", nargs="*", default=[], help="only models whose names contain one of these")
    parser.add_argument("--tokens", type=int, nargs="*", default=[])
    parser.add_argument("--limit-s", "--budget-s", type=float, help="begin nothing new after so many seconds")
    parser.add_argument("--json", type=Path, help="also write everything there, after every row")
    options = parser.parse_args()
    device = torch.device(options.device)
    models: Sequence[ModelShape] = MODELS
    tokens: Sequence[int] = TOKENS
    pairs, pair_s, limit_s = 20, 0.03, 3600.0
    if options.quick:
        models = sorted((m for m in MODELS if m.name in QUICK_MODELS), key=lambda m: QUICK_MODELS.index(m.name))
        tokens, pairs, pair_s, limit_s = QUICK_TOKENS, 12, 0.02, 150.0
    if options.tiny:
        models, tokens, pairs, pair_s = TINY_MODELS, (1, 8), 2, 0.0
    if options.model:
        models = tuple(model for model in models if any(part.lower() in model.name.lower() for part in options.model))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    modes = ("same", "own") if options.both else ("own",) if options.own else ("same",)
    rates = matrix_rates(device) if device.type == "cuda" else {}
    print(f"{device_name(device)}, torch {torch.__version__}, Triton {triton.__version__}")
    if rates:
        print("matrix rate, 8192^3: " + ", ".join(f"{name} {rate:.0f} TFLOP/s" for name, rate in rates.items()))
    head: dict[str, Any] = {
        "device": device_name(device), "torch": torch.__version__, "triton": triton.__version__, "rates": rates,
    }  # fmt: skip

    def written(cells: list[Cell], summary: list[dict[str, Any]] | None = None) -> None:
        if options.json:
            whole = head | {"summary": summary, "cells": [asdict(cell) for cell in cells]}
            options.json.write_text(json.dumps(whole, indent=1))

    rows = [(model, count) for model in models for count in tuple(options.tokens) or tokens]
    if options.quick and not options.tokens:
        # The large layer is there for its share of the matrix rate alone.
        rows = [row for row in rows if row[0].name != "E256-bf16" or row[1] == 8192]
    cells = bench(
        rows, device, modes, pairs=pairs, pair_s=pair_s, dtype=dtype, limit_s=options.limit_s or limit_s,
        folder=options.tables, rates=rates, written=written,
    )  # fmt: skip
    written(cells, summarise(cells))
    wrong = [
        cell for cell in cells
        if not cell.error <= max(1.5 * cell.base_error, 1e-2) or not (cell.bitwise or cell.mode == "own")
    ]  # fmt: skip
    for cell in wrong:
        print(
            f"{cell.model}, {cell.tokens} tokens: bits {'agree' if cell.bitwise else 'differ'}, error {cell.error:.1e}"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
