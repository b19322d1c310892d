"""How far our kernels and vLLM's are from float64: `python -m vllm_dwdp.kernels.bench.accuracy [--json FILE] [--limit-s S]`.

For every shape and number of tokens, three ways of computing a layer's routed experts, on fresh random weights and inputs:

- vLLM: `fused_experts` on one contiguous tensor, which is what the contiguous view runs;
- same: our kernels with vLLM's tiles over experts scattered over two allocations, as slab and slot are in the split view;
- tuned: the same with our tables' tiles (`--tables FOLDER`), where those differ.

The reference is computed in float64 on the same device, from the dequantised weights and the exact 16-bit inputs: of a large
batch for a random sample of tokens, with all of their experts. ERROR is ||result - reference|| / ||reference|| over them,
WORST that of the worst token. With FP8 blocks activations are quantised too, as a part of the method: MODELLED is the error
against a reference that quantises them likewise. APART is the largest distance of a token from vLLM's result, over all
tokens. Outputs and workspaces are full of NaN before (vLLM's own as far as torch's allocator gives poisoned memory back).

Limits: see `exact.LIMITS`; ours may not be 1.1 times farther off than vLLM, must write every value, and with vLLM's tiles
must give its very bits. Exits with 1 where one is broken, or where nothing was compared. The seed of a run is printed;
`--seed` repeats it, case by case. All shapes go through the first round of numbers of tokens before the second.

On a CPU (`--device cpu --tiny`, TRITON_INTERPRET=1) "vLLM" is our kernel over contiguous experts.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from ..tables import FOLDER, chip_of
from .compare import ROUNDS
from .exact import FACTOR, LIMITS, SAMPLED, Row, case
from .precompile import compile_shape
from .shapes import MODELS, TINY_MODELS, ModelShape, Problem, free_memory
from .sides import LOST

TINY_ROUNDS = ((24, 1),)
#: Layers in order of value: every kind of kernel first.
ORDER = ("DeepSeek-V3", "gpt-oss-120b", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Mixtral-8x7B", "E256-bf16")


def case_seed(seed: int, *what: object) -> int:
    """Another one for each weights or batch of a run, from the run's."""
    return zlib.crc32(repr((seed, *what)).encode())


def run(
    models: Sequence[ModelShape], rounds: Sequence[Sequence[int]], device: torch.device, seed: int, *, limit_s: float,
    folder: Path, path: Path | None, workers: int = 14,
) -> tuple[list[Row], int]:  # fmt: skip
    """(all rows, cases left out when time was over), printed and written as they come."""
    ends, left, rows = time.monotonic() + limit_s, 0, []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    head: dict[str, Any] = {
        "device": chip_of(device).name, "chip": chip_of(device)._asdict(), "torch": torch.__version__,
        "triton": triton.__version__, "seed": seed, "sampled": SAMPLED,
        "limits": {kind: limits._asdict() for kind, limits in LIMITS.items()}, "factor": FACTOR,
    }  # fmt: skip
    print(f"{head['device']}, torch {torch.__version__}, Triton {triton.__version__}, seed {seed}")
    print(
        f"{'MODEL':<16} {'TOKENS':>6} {'SEED':>10} {'WHO':<5} {'ERROR':>8} {'WORST':>8} {'MODELLED':>8} {'APART':>8} "
        f"{'BITS':<6} {'SEC':>5}  RESULT, TILES"
    )
    for model, counts in [(model, counts) for counts in rounds for model in models]:
        if time.monotonic() > ends:
            left += len(counts)
            continue
        free_memory(device)
        problem = Problem(model, device, dtype, case_seed(seed, model.name))
        if device.type == "cuda":
            compile_shape(problem, counts, folder, workers)
        for tokens in counts:
            begun = time.monotonic()
            if begun > ends:
                left += 1
                continue
            own_seed = case_seed(seed, model.name, tokens)
            try:
                found = case(problem, tokens, own_seed, folder)
            except Exception as error:
                if any(word in str(error) for word in LOST):
                    raise
                said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
                found = [Row.lost(model.name, model.key(dtype), tokens, own_seed, said)]
            spent = time.monotonic() - begun
            for row in found:
                modelled = "" if row.modelled is None else f"{row.modelled:.2e}"
                print(
                    f"{row.model:<16} {row.tokens:>6} {row.seed:>10} {row.who:<5} {row.error:>8.2e} {row.worst:>8.2e} "
                    f"{modelled:>8} {row.apart:>8.2e} {'same' if row.bitwise else 'differ':<6} {spent:>5.1f}  "
                    f"{'BROKEN: ' + '; '.join(row.broken) if row.broken else 'ok'}  {row.tiles}",
                    flush=True,
                )
            rows += found
            if path:
                path.write_text(json.dumps(head | {"rows": [asdict(row) for row in rows]}, indent=1))
        # Two of the larger layers do not fit at once.
        del problem
    return rows, left


def main() -> int:
    """Command line; returns 1 where a limit is broken or nothing was compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=[], help="only models whose names contain one of these")
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help=f"in one round, instead of {ROUNDS}")
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin no case after so many seconds")
    parser.add_argument("--seed", type=int, default=None, help="of an earlier run, to repeat it")
    parser.add_argument("--tables", type=Path, default=FOLDER, help="folder of the tuned tables")
    parser.add_argument("--json", type=Path, help="also write everything there, after every case")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny layers, for a machine without a GPU")
    options = parser.parse_args()
    by_name = {model.name: model for model in MODELS}
    models = TINY_MODELS if options.tiny else tuple(by_name[name] for name in ORDER)
    models = tuple(m for m in models if not options.shapes or any(s.lower() in m.name.lower() for s in options.shapes))
    rounds = (tuple(options.tokens),) if options.tokens else TINY_ROUNDS if options.tiny else ROUNDS
    seed = secrets.randbelow(1 << 31) if options.seed is None else options.seed
    rows, left = run(
        models, rounds, torch.device(options.device), seed, limit_s=options.limit_s, folder=options.tables,
        path=options.json,
    )  # fmt: skip
    broken = sum(bool(row.broken) for row in rows)
    cases = len({(row.model, row.tokens) for row in rows})
    print(f"accuracy: {cases} cases, {len(rows)} results, {broken} broken; {left} cases left out for time; seed {seed}")
    return 1 if broken or left or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
