"""Searches tiles for this GPU and writes them to kernels/configs: `python -m vllm_dwdp.kernels.bench.tune [--limit-s S]`.

For each layer and number of tokens: vLLM's choice first, then a short list (candidates.py), then changes of the winner's
stages and grouping. All kernels of a list are compiled beforehand in parallel threads; each candidate's result is compared
with vLLM's choice's over poisoned memory, and timed in turns with the best so far, not for long where it is clearly slower.
What beats vLLM's choice by at least 1 % goes into FOLDER/<device>.json, which `configs.tiles_for` reads before vLLM's
tables; other tiles may round other bits, within the same tolerance of a float32 reference. The table is written after
every row, and rows that it has are skipped, so that a run can be cut and begun again. Rows go first that no table has an
entry for, neither this device's nor the shipped one of a device like it. `--thorough` descends coordinate by coordinate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_dwdp.errors import DwdpError

from ..configs import default_tiles, layer_shape, tiles_for
from ..tables import FOLDER, Table, chip_of, measured, read, write
from ..tile_math import INTERPRETED
from ..tiles import Tiles
from .candidates import CHOICES, fits, listed, neighbours
from .precompile import compile_all, gemms
from .shapes import BLOCK, MODELS, TINY_MODELS, Batch, ModelShape, Problem, free_memory
from .sides import LOST, describe, errors, own_experts, poisoned
from .timing import Call, captured, in_turns, seconds

TOKENS = (8192, 1, 128, 1024, 16, 32768)
#: The layer whose share of the matrix rate is a goal goes first, then those with most to gain.
ORDER = ("E256-bf16", "gpt-oss-120b", "DeepSeek-V3", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Mixtral-8x7B")
GAIN = 1.01
ROUNDS = 3
#: A candidate slower than this in a first look is not measured further.
HOPELESS = 0.93
#: A layer that takes longer is measured fewer times, and from LARGE tokens on only a few candidates are tried.
SLOW_S, LARGE, FEW = 0.004, 16384, 4
#: Largest difference from the result of vLLM's tiles, by the largest value there; right 16-bit results differ by less.
#: With FP8 blocks a value may fall to its other neighbour between the GEMMs: vLLM is 2 % off the reference itself there.
TOLERANCE = {"none": 2e-2, "block": 5e-2}

#: (candidate, best so far) -> how many times faster the candidate is, or None if it cannot run.
Compare = Callable[[Tiles, Tiles], float | None]


def search(start: Tiles, itemsize: int, compare: Compare, rounds: int = ROUNDS) -> tuple[Tiles, float]:
    """The best tiles found from `start` on, and how many times faster than `start` they are (product of the steps)."""
    best, gain, tried = start, 1.0, {start}
    for _ in range(rounds):
        begun = best
        for candidate in neighbours(best, itemsize):
            # Made from what was the best at the start of the round: put the change onto what is the best now.
            changed = {
                name: getattr(candidate, name) for name in CHOICES if getattr(candidate, name) != getattr(begun, name)
            }
            candidate = replace(best, **changed)
            if candidate in tried or not fits(candidate, itemsize):
                continue
            tried.add(candidate)
            ratio = compare(candidate, best)
            if ratio is not None and ratio >= GAIN:
                best, gain = candidate, gain * ratio
        if best == begun:
            break
    return best, gain


def pick(start: Tiles, candidates: Iterable[Tiles], compare: Compare) -> tuple[Tiles, float]:
    """The best of a list, and how many times faster than `start` it is (product of the steps)."""
    best, gain = start, 1.0
    for candidate in candidates:
        ratio = None if candidate == best else compare(candidate, best)
        if ratio is not None and ratio >= GAIN:
            best, gain = candidate, gain * ratio
    return best, gain


class Trials:
    """Times candidates on one layer and number of tokens."""

    def __init__(self, problem: Problem, tokens: int, start: Tiles, ends: float) -> None:
        self.problem, self.ends, self.tried = problem, ends, 0
        self.batches = [problem.batch(tokens, seed) for seed in range(2)]
        self.workspace = poisoned(problem, tokens)
        self.expected = self._run(self.batches[0], start)
        self.tolerance = TOLERANCE[problem.model.quant]
        found = errors(problem, self.batches[0], [self.expected])[0]
        if not found < self.tolerance:
            raise DwdpError(
                f"{problem.model.name}, {tokens} tokens: off by {found:.1e} with {describe(start)}; not tuned"
            )
        self._best = (start, self._calls(start))
        self.start_s = seconds(self._best[1][0], 3, problem.device)

    def _run(self, batch: Batch, tiles: Tiles) -> torch.Tensor:
        return own_experts(self.problem, batch, tiles, workspace=self.workspace)

    def _calls(self, tiles: Tiles) -> list[Call]:
        self.workspace.gemm.fill_(float("nan"))
        self.workspace.activated.fill_(float("nan"))
        found = self._run(self.batches[0], tiles).float()
        off = (found - self.expected.float()).abs().max() / self.expected.float().abs().max()
        if not float(off) < self.tolerance:
            raise DwdpError(f"off by {float(off):.1e}")
        return captured([lambda batch=batch: self._run(batch, tiles) for batch in self.batches], self.problem.device)  # type: ignore[misc]

    def compile(self, candidates: Sequence[Tiles], workers: int) -> None:
        """Both GEMMs of every candidate, in parallel; what fails will fail again where it is compared."""
        if not INTERPRETED:
            compile_all(
                [job for tiles in candidates for job in gemms(self.problem, self.batches[0], tiles, self.workspace)],
                workers,
            )

    def compare(self, candidate: Tiles, best: Tiles) -> float | None:
        """See `Compare`; None as well when time is over, and for wrong results, which are printed."""
        if time.monotonic() > self.ends:
            return None
        self.tried += 1
        device = self.problem.device
        try:
            own = self._calls(candidate)
            if best != self._best[0]:
                self._best = (best, self._calls(best))
            slow = self.start_s > SLOW_S
            ratio = statistics.median(in_turns(self._best[1], own, device, 1 if slow else 3, 0.004).ratios)
            if ratio >= HOPELESS:
                ratio = statistics.median(in_turns(self._best[1], own, device, 3 if slow else 7, 0.02).ratios)
        except Exception as error:
            # Whatever a compiler or a launch cannot do; a wrong result is worth knowing.
            said = (str(error).splitlines() or [""])[0][:110]
            print(f"    {describe(candidate)}: {type(error).__name__}: {said}")
            if any(word in str(error) for word in LOST):
                raise
            return None
        if ratio >= GAIN:
            self._best = (candidate, own)
        return ratio


def tune_row(
    problem: Problem,
    tokens: int,
    ends: float,
    workers: int,
    thorough: bool,
    kernels: Sequence[str],
    hints: Sequence[Tiles] = (),
    row_s: float = 1e9,
) -> tuple[Tiles, float] | None:
    """Search for one layer and number of tokens, for `row_s` seconds after compiling; prints a line.

    None where time was over before anything was compared.
    """
    begun, model, itemsize = time.monotonic(), problem.model, problem.tables[0].dtype.itemsize
    blocked = model.quant == "block"
    shape = layer_shape(problem.tables[0], problem.tables[1], model.top_k)
    start = tiles_for(shape, tokens, problem.device, (BLOCK, BLOCK) if blocked else None, own=False)
    trials = Trials(problem, tokens, start, ends)
    candidates = [t for t in listed(tokens * model.top_k / model.experts, blocked) if fits(t, itemsize)]
    candidates = [t for t in dict.fromkeys([*hints, *candidates]) if t.kernel in kernels and t != start]
    if tokens >= LARGE:
        candidates = candidates[:FEW]
    trials.compile(candidates, workers)
    trials.ends = min(ends, time.monotonic() + row_s)
    compiled = time.monotonic() - begun
    if thorough:
        best, gain = search(start, itemsize, trials.compare)
    else:
        best, gain = pick(start, candidates, trials.compare)
        polished = list(neighbours(best, itemsize, ("num_stages", "group_m"))) if tokens < LARGE else []
        trials.compile(polished, workers)
        best, more = pick(best, polished, trials.compare)
        gain *= more
    spent, us = time.monotonic() - begun, trials.start_s / gain * 1e6
    rate = model.flops_per_token * tokens / us / 1e6
    print(
        f"{model.name:<16} {tokens:>6} {gain:>6.3f} {us:>10.1f} {rate:>8.1f} {trials.tried:>5} "
        f"{compiled:>5.1f} {spent:>5.1f}  {describe(best)}  (vLLM: {describe(start)})",
        flush=True,
    )
    if candidates and not trials.tried:
        return None
    # An entry stands for its neighbourhood, so vLLM's own choice is kept where nothing was better.
    return (best, gain) if gain >= GAIN else (start, 1.0)


def tune(
    models: Sequence[ModelShape], tokens: Sequence[int], device: torch.device, path: Path, *,
    limit_s: float = 1e9, workers: int = 14, thorough: bool = False, again: bool = False,
    kernels: Sequence[str] = CHOICES["kernel"],
) -> None:  # fmt: skip
    """Search for all, writing each row as it is found; after `limit_s` seconds nothing new is begun."""
    ends, chip = time.monotonic() + limit_s, chip_of(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    known = measured(path.parent, chip)
    rows = wanted(models, tokens, dtype, {} if again else read(path)["shapes"], known)
    print(
        f"{'MODEL':<16} {'TOKENS':>6} {'GAIN':>6} {'us':>10} {'TFLOP/s':>8} {'TRIED':>5} {'COMP':>5} {'SEC':>5}  TILES"
    )
    problem: Problem | None = None
    for done, (model, count) in enumerate(rows):
        if time.monotonic() > ends:
            print(f"{limit_s:.0f} s are over: {len(rows) - done} of {len(rows)} rows left; run again to go on")
            return
        if problem is None or problem.model is not model:
            problem = None
            free_memory(device)
            problem = Problem(model, device, dtype)
        key = model.key(dtype)
        # What won on a device like this one is tried first; large batches also try what won for others.
        hints = [known[key][count]] if count in known.get(key, {}) else []
        if count >= LARGE:
            found = read(path)["shapes"].get(key, {})
            hints += [Tiles(**entry["tiles"]) for tried, entry in found.items() if int(tried) >= 8192]
        # A row may take twice its part of what is left.
        row_s = 2 * (ends - time.monotonic()) / (len(rows) - done)
        try:
            row = tune_row(problem, count, ends, workers, thorough, kernels, hints, row_s)
        except (DwdpError, torch.OutOfMemoryError) as error:
            print(f"{model.name:<16} {count:>6} left out: {str(error).splitlines()[0][:150]}", flush=True)
            continue
        if row is not None:
            write(path, key, {count: row}, chip)


def wanted(
    models: Sequence[ModelShape], tokens: Sequence[int], dtype: torch.dtype, own: Mapping[str, Any], known: Table
) -> list[tuple[ModelShape, int]]:
    """Rows to search: none that `own` (a file's "shapes") has; first those that `known` lacks too."""
    rows = [(model, count) for model in models for count in tokens if str(count) not in own.get(model.key(dtype), {})]
    return sorted(rows, key=lambda row: row[1] in known.get(row[0].key(dtype), {}))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=[], help="only models whose names contain one of these")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the table goes")
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin nothing new after so many seconds")
    parser.add_argument("--workers", type=int, default=14, help="threads that compile")
    parser.add_argument("--thorough", action="store_true", help="descend from vLLM's choice instead of trying a list")
    parser.add_argument("--kernel", nargs="*", default=list(CHOICES["kernel"]), help="only these kernels")
    parser.add_argument("--again", action="store_true", help="also rows that the table has")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny layers, for a machine without a GPU")
    parser.add_argument("--dry-run", action="store_true", help="print what would be tried, and measure nothing")
    options = parser.parse_args()
    by_name = {model.name: model for model in MODELS}
    models = [*TINY_MODELS] if options.tiny else [by_name[name] for name in ORDER]
    models = [m for m in models if not options.model or any(part.lower() in m.name.lower() for part in options.model)]
    if options.dry_run:
        for model in models:
            blocked = model.quant == "block"
            for count in options.tokens:
                start = default_tiles("fp8_block" if blocked else "bf16", count)
                tried = [start, *listed(count * model.top_k / model.experts, blocked)]
                print(f"{model.name}, {count} tokens: {', '.join(describe(tiles) for tiles in tried)}")
        return 0
    device = torch.device(options.device)
    tune(
        models, options.tokens, device, options.folder / f"{chip_of(device).name}.json", limit_s=options.limit_s,
        workers=options.workers, thorough=options.thorough, kernels=options.kernel, again=options.again,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
