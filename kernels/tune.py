"""Searches tiles for this GPU and writes them beside this file: `python -m vllm_dwdp.kernels.tune [--model NAME ...]`.

Starts from vLLM's choice and changes one thing at a time (coordinate descent) while the layer gets faster. Every step is
timed in turns with the best so far. What beats vLLM's choice by at least 1 % goes into configs/<device>.json, which
`configs.tiles_for` reads before vLLM's tables. `--dry-run` prints what would be tried, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_dwdp.errors import DwdpError

from .configs import FOLDER, default_tiles, device_name, layer_shape, tiles_for
from .shapes import BLOCK, MODELS, ModelShape, Problem
from .tiles import Tiles

TOKENS = (1, 4, 16, 64, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
CHOICES: dict[str, tuple[Any, ...]] = {
    "kernel": ("pointer", "persistent"),
    "block_m": (16, 32, 64, 128),
    "block_n": (32, 64, 128, 256),
    "block_k": (64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
    "group_m": (1, 4, 16, 64),
}
#: Bytes of shared memory that a program can have; stages that need more are not tried.
SHARED = 227 * 1024
GAIN = 1.01
ROUNDS = 3

#: (candidate, best so far) -> how many times faster the candidate is, or None if it cannot run.
Compare = Callable[[Tiles, Tiles], float | None]


def fits(tiles: Tiles, itemsize: int) -> bool:
    """Whether the stages of A and W tiles fit the shared memory, and the accumulator the registers."""
    stage = (tiles.block_m + tiles.block_n) * tiles.block_k * itemsize
    accumulator = tiles.block_m * tiles.block_n * 4 / (tiles.num_warps * 32)
    return stage * (tiles.num_stages - 1) <= SHARED and accumulator <= 4 * 128


def neighbours(tiles: Tiles, itemsize: int) -> Iterator[Tiles]:
    """Every configuration that differs in one thing."""
    for name, values in CHOICES.items():
        for value in values:
            if value == getattr(tiles, name):
                continue
            found = replace(tiles, **{name: value})
            if found.kernel == "persistent" and found.group_m == 1:
                # There a group is what keeps an expert's row blocks together.
                found = replace(found, group_m=16)
            if fits(found, itemsize):
                yield found


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


def comparing(problem: Problem, tokens: int) -> Compare:
    """Times on this GPU."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from .bench import own_experts
    from .timing import captured, in_turns

    batches = [problem.batch(tokens, seed) for seed in range(2)]

    def calls(tiles: Tiles) -> list[Callable[[], object]]:
        made = [lambda batch=batch: own_experts(problem, batch, tiles) for batch in batches]  # type: ignore[misc]
        return captured(made, problem.device)

    def compare(candidate: Tiles, best: Tiles) -> float | None:
        try:
            own = calls(candidate)
        except (CompilationError, OutOfResources, PTXASError, DwdpError):
            return None
        return statistics.median(in_turns(calls(best), own, problem.device, 7, 0.02).ratios)

    return compare


def write(path: Path, key: str, found: dict[int, tuple[Tiles, float]]) -> None:
    """Put the entries of one shape into a table, in place of those it had."""
    whole: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"shapes": {}}
    whole["shapes"][key] = {
        str(tokens): {"gain": round(gain, 3), "tiles": tiles.to_json()}
        for tokens, (tiles, gain) in sorted(found.items())
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def tune(model: ModelShape, tokens: tuple[int, ...], device: torch.device, folder: Path) -> None:
    """Search for one model and write what was found, after each number of tokens."""
    problem = Problem(model, device)
    shape = layer_shape(problem.tables[0], problem.tables[1], model.top_k)
    block = (BLOCK, BLOCK) if model.quant == "block" else None
    found: dict[int, tuple[Tiles, float]] = {}
    for count in tokens:
        start = tiles_for(shape, count, device, block, own=False)
        best, gain = search(start, problem.tables[0].dtype.itemsize, comparing(problem, count))
        print(f"{model.name}, {count} tokens: {gain:.3f} times vLLM's choice with {best}", flush=True)
        # An entry stands for its neighbourhood, so vLLM's own choice is kept where nothing was better.
        found[count] = (best, gain) if gain >= GAIN else (start, 1.0)
        write(folder / f"{device_name(device)}.json", shape.key, found)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=[], help="only models whose names contain one of these")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the table goes")
    parser.add_argument("--dry-run", action="store_true", help="print the first round and measure nothing")
    options = parser.parse_args()
    models = [m for m in MODELS if not options.model or any(part.lower() in m.name.lower() for part in options.model)]
    for model in models:
        if not options.dry_run:
            tune(model, tuple(options.tokens), torch.device("cuda"), options.folder)
            continue
        itemsize = 1 if model.quant == "block" else 2
        for count in options.tokens:
            start = default_tiles("fp8_block" if itemsize == 1 else "bf16", count)
            print(
                f"{model.name}, {count} tokens: {sum(1 for _ in neighbours(start, itemsize))} candidates around {start}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
