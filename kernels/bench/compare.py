"""Split-weight experts beside vLLM's fused_experts: `python -m vllm_dwdp.kernels.bench [--both]`.

A layer's routed experts, whole (quantisation, sorting, both GEMMs, activation, reduction), for shapes of known models and
1 to 32,768 tokens. MODE same: both sides use the same tile configuration (vLLM's choice) and results are compared bit by
bit. MODE own (`--own`): ours uses our tuned tables where there are some (`--tables FOLDER`, by default the shipped ones);
other tiles may round other bits, so there only the error counts. `--both` measures both against the same base.MODE alike
(`--alike`): ours with our tuned tiles; the base is vLLM with its choice or with these same tiles, whichever is faster, so
that both sides are tuned. With `--backends FILE` (what `kernels.backends --json` wrote on this machine) the summary has MODE
fastest too: that, against the fastest backend of vLLM that loads.

The rest is equal: the kernels beside the GEMMs, CUDA graphs, the same batches in turns; ours reads experts scattered over
two allocations. RATIO is vLLM's time by ours: above 1 is faster. Every result is compared with a float32 reference. SHARE is
of the matrix rate of a large product (8192^3, bf16 or fp8) measured in this run. At the end, per number of tokens: the
geometric mean over models and its lower 95 % bound; goals >= 1.00 and >= 0.97. The JSON is written after every row.

On a CPU (`--device cpu --tiny`, TRITON_INTERPRET=1) the base is our kernel over contiguous experts; times mean nothing then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import triton

from ..tables import FOLDER, chip_of
from ..tiles import Tiles
from .precompile import compile_shape
from .rates import matrix_rates
from .shapes import MODELS, TINY_MODELS, ModelShape, Problem, free_memory
from .sides import LOST, describe, errors, own_experts, poisoned, problem_tiles, vllm_experts
from .summary import NO_MODEL, Cell, beside_fastest, summarise
from .timing import Pairs, captured, in_turns, lower_bound

TOKENS = (1, 16, 128, 1024, 8192, 32768)
QUICK_MODELS = ("E256-bf16", "Qwen3-30B-A3B", "DeepSeek-V3", "gpt-oss-120b")
QUICK_TOKENS = (8192, 1, 128, 1024, 16)
#: Tokens in order of value, all models before the second round: a run that is cut has all models at the same numbers.
ROUNDS = ((8192, 1, 128), (1024, 16, 32768))
#: Batches that take turns: enough for caches not to stay warm; fewer where a batch is large.
BATCHES, LARGE, LARGE_BATCHES = 4, 4096, 2
#: Threads that compile.
WORKERS = 14


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
    """Compare and time one number of tokens, once per mode; what has the same tiles on both sides, once for all."""
    few = tokens >= LARGE or problem.device.type != "cuda"
    batches = [problem.batch(tokens, seed) for seed in range(LARGE_BATCHES if few else BATCHES)]
    start = problem_tiles(problem, batches[0], own=False)
    tuned = problem_tiles(problem, batches[0], True, folder) if set(modes) - {"same"} else start
    expected = {start: vllm_experts(problem, batches[0])}
    if "alike" in modes and tuned != start:
        try:
            expected[tuned] = vllm_experts(problem, batches[0], tuned)
        except Exception as error:
            if any(word in str(error) for word in LOST):
                raise
            print(
                f"    vLLM with {describe(tuned)}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:110]}"
            )
    results = {
        tiles: own_experts(problem, batches[0], tiles, workspace=poisoned(problem, tokens))
        for tiles in dict.fromkeys([start, tuned] if "same" in modes else [tuned])
    }
    found = errors(problem, batches[0], [*expected.values(), *results.values()])
    base_off, off = dict(zip(expected, found, strict=False)), dict(zip(results, found[len(expected) :], strict=True))
    same = {(b, t): torch.equal(expected[b], results[t]) for b in expected for t in results}
    bases = list(expected)
    del expected
    ours = list(results)
    del results
    pairs_of: dict[tuple[Tiles, Tiles], Pairs] = {}
    for base_tiles in bases:
        given = None if base_tiles == start else base_tiles
        base = captured([lambda b=b, t=given: vllm_experts(problem, b, t) for b in batches], problem.device)  # type: ignore[misc]
        for tiles in ours if base_tiles == start else [tuned]:
            own = captured([lambda b=b, t=tiles: own_experts(problem, b, t) for b in batches], problem.device)  # type: ignore[misc]
            pairs_of[base_tiles, tiles] = in_turns(base, own, problem.device, pairs, pair_s)
            del own
        del base
    chosen = {
        "same": (start, start),
        "own": (start, tuned),
        "alike": min(((b, tuned) for b in bases), key=lambda both: statistics.median(pairs_of[both].base)),
    }
    tera = problem.model.flops_per_token * tokens / 1e12
    rate = rates.get("fp8" if problem.model.quant == "block" else "bf16", 0.0)
    cells = []
    for mode in modes:
        base_tiles, tiles = chosen[mode]
        timed = pairs_of[base_tiles, tiles]
        base_s, own_s = statistics.median(timed.base), statistics.median(timed.own)
        cell = Cell(
            model=problem.model.name, shape=problem.model.key(problem.dtype), tokens=tokens, mode=mode,
            tiles=describe(tiles), base_tiles=describe(base_tiles), base_us=base_s * 1e6, own_us=own_s * 1e6,
            ratio=statistics.median(timed.ratios), bound=lower_bound([timed.ratios])[1],
            tflops=tera / own_s, base_tflops=tera / base_s,
            share=tera / own_s / rate if rate else 0.0, base_share=tera / base_s / rate if rate else 0.0,
            bitwise=same[base_tiles, tiles], error=off[tiles], base_error=base_off[base_tiles], ratios=timed.ratios,
        )  # fmt: skip
        cells.append(cell)
    return cells


def bench(
    rows: Sequence[tuple[ModelShape, int]], device: torch.device, modes: Sequence[str], *, pairs: int, pair_s: float,
    dtype: torch.dtype, limit_s: float, folder: Path, rates: dict[str, float], written: Callable[[list[Cell]], None],
) -> list[Cell]:  # fmt: skip
    """Measure all, printing as it goes; after `limit_s` seconds nothing new is begun. `written` is called after each row."""
    ends = time.monotonic() + limit_s
    heads = f"{'MODEL':<16} {'TOKENS':>6} {'MODE':<5} {'VLLM us':>10} {'OURS us':>10} {'RATIO':>6} {'TFLOP/s':>8}"
    print(f"{heads} {'SHARE':>5} {'VLLM':>5} {'BITS':<6} {'ERROR':>8}  TILES")
    cells: list[Cell] = []
    problem: Problem | None = None
    for done, (model, count) in enumerate(rows):
        if time.monotonic() > ends:
            print(f"{limit_s:.0f} s are over: {len(rows) - done} of {len(rows)} rows left out")
            break
        if problem is None or problem.model is not model:
            problem = None
            free_memory(device)
            problem = Problem(model, device, dtype)
            if device.type == "cuda":
                here = takewhile(lambda row, model=model: row[0] is model, rows[done:])  # type: ignore[misc]
                compile_shape(
                    problem,
                    [tokens for _, tokens in here],
                    folder,
                    WORKERS,
                    [False] + [True] * (set(modes) != {"same"}),
                )
        for cell in measure(problem, count, modes, pairs=pairs, pair_s=pair_s, folder=folder, rates=rates):
            cells.append(cell)
            print(
                f"{cell.model:<16} {cell.tokens:>6} {cell.mode:<5} {cell.base_us:>10.1f} {cell.own_us:>10.1f} "
                f"{cell.ratio:>6.3f} {cell.tflops:>8.1f} {cell.share:>5.2f} {cell.base_share:>5.2f} "
                f"{'same' if cell.bitwise else 'DIFFER':<6} {cell.error:>8.1e}  {cell.tiles}"
                f"{'' if cell.base_tiles == cell.tiles else f'  (vLLM: {cell.base_tiles})'}",
                flush=True,
            )
        written(cells)
    return cells


def main() -> int:
    """Command line; returns 1 if bits differ under vLLM's tiles, or an error is larger than vLLM's by a half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four shapes, up to 8,192 tokens, at most 3 minutes")
    parser.add_argument(
        "--goal", action="store_true", help="as briefly: all models at 1 to 32,768 tokens, in two rounds"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny layers, for a machine without a GPU")
    parser.add_argument("--own", action="store_true", help="our tuned tiles where there are some")
    parser.add_argument("--both", action="store_true", help="with vLLM's tiles and with our own")
    parser.add_argument("--alike", action="store_true", help="also beside vLLM with our tiles where that is faster")
    parser.add_argument("--backends", type=Path, help="what kernels.backends --json wrote on this machine")
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
    if options.goal:
        pairs, pair_s = 12, 0.02
    if options.tiny:
        models, tokens, pairs, pair_s = TINY_MODELS, (1, 8), 2, 0.0
    if options.model:
        models = tuple(model for model in models if any(part.lower() in model.name.lower() for part in options.model))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    modes = ["same"] * (options.both or not (options.own or options.alike)) + ["own"] * (options.both or options.own)
    modes += ["alike"] * options.alike
    rates = matrix_rates(device) if device.type == "cuda" else {}
    answers = json.loads(options.backends.read_text()) if options.backends else []
    print(f"{chip_of(device).name}, torch {torch.__version__}, Triton {triton.__version__}")
    if rates:
        print("matrix rate, 8192^3: " + ", ".join(f"{name} {rate:.0f} TFLOP/s" for name, rate in rates.items()))
    head: dict[str, Any] = {
        "device": chip_of(device).name, "chip": chip_of(device)._asdict(), "torch": torch.__version__,
        "triton": triton.__version__, "rates": rates,
    }  # fmt: skip

    def written(cells: list[Cell], summary: list[dict[str, Any]] | None = None) -> None:
        if options.json:
            whole = head | {"summary": summary, "cells": [asdict(cell) for cell in cells]}
            options.json.write_text(json.dumps(whole, indent=1))

    rows = [(model, count) for model in models for count in tuple(options.tokens) or tokens]
    if options.goal and not options.tokens:
        rows = [(model, count) for part in ROUNDS for model in models for count in part]
    if (options.quick or options.goal) and not options.tokens:
        # The large layer is there for its share of the matrix rate alone.
        rows = [row for row in rows if row[0].name != NO_MODEL or row[1] == 8192]
    cells = bench(
        rows, device, modes, pairs=pairs, pair_s=pair_s, dtype=dtype, limit_s=options.limit_s or limit_s,
        folder=options.tables, rates=rates, written=written,
    )  # fmt: skip
    cells += beside_fastest(cells, answers) if answers else []
    written(cells, summarise(cells))
    wrong = [
        cell for cell in cells
        if not cell.error <= max(1.5 * cell.base_error, 1e-2) or not (cell.bitwise or cell.tiles != cell.base_tiles)
    ]  # fmt: skip
    for cell in wrong:
        print(
            f"{cell.model}, {cell.tokens} tokens: bits {'agree' if cell.bitwise else 'differ'}, error {cell.error:.1e}"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
