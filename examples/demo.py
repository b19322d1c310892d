"""The main job in one go: plain vLLM, then DWDP on two ranks in each weight view, same tokens?

On GPUs where there are some: each rank on its own, or several on one. On the CPU elsewhere.

Writes a small random MoE checkpoint, generates the same prompts each way, one request at a time, prints what every rank
held, pulled and served, and exits with 1 if any token differs.

    python examples/demo.py [--ranks 2] [--family qwen3_moe] [--model PATH]
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from devices import SMALL_CACHE, count_gpus, dwdp_settings, engine_options

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

PROMPTS = [
    "The experts of a layer",
    "Every rank serves its own requests and",
    "A copy engine pulls",
    "No rank waits",
    "Attention comes first, then",
    "Weights travel one layer ahead because",
    "Two slots are enough when",
    "A peer does nothing while",
]
HEADER = ("view", "rank", "experts", "slab MB", "slot MB", "layers", "pulled MB", "waited ms", "requests")


def say(text: str) -> None:
    """One line of progress, at once."""
    print(f"demo: {text}", flush=True)


def generate(model: str, tokens: int, **options: Any) -> tuple[list[list[int]], list[dict[str, Any]], float]:
    """Greedy tokens of every prompt, the counters of every rank (none for plain vLLM), and seconds of generation."""
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    llm = LLM(model, max_model_len=256, max_num_seqs=1, enforce_eager=True, **options)
    say(f"  engine up after {time.monotonic() - started:.0f} s, generating {len(PROMPTS)} x {tokens} tokens")
    started = time.monotonic()
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
    seconds = time.monotonic() - started
    counters: list[dict[str, Any]] = []
    if "data_parallel_size" in options:
        import vllm_dwdp

        counters = vllm_dwdp.counters(llm)
    del llm
    gc.collect()
    return [list(output.outputs[0].token_ids) for output in outputs], counters, seconds


def table(rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns under HEADER."""
    widths = [max(len(row[i]) for row in (HEADER, *rows)) for i in range(len(HEADER))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (HEADER, *rows)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def row(view: str, counter: dict[str, Any]) -> list[str]:
    """One rank's line of the table."""
    return [
        view,
        str(counter["rank"]),
        str(counter["experts_held"]),
        f"{counter['slab_bytes'] / 1e6:.2f}",
        f"{counter['slot_bytes'] / 1e6:.2f}",
        str(counter["layers"]),
        f"{counter['pulled_bytes'] / 1e6:.1f}",
        f"{counter['exposed_wait_ns'] / 1e6:.1f}",
        str(counter["requests"]),
    ]


def bind_like_a_rank(ranks: int) -> None:
    """Have plain vLLM on CPU use as many threads as a rank: the same kernels in the same order, so the same tokens."""
    from vllm_dwdp.engine.cores import physical_cores, split_cores

    cores = split_cores(physical_cores(), ranks)[0]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))


def main() -> int:
    """Run the demo; 0 when every token is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--family", default="qwen3_moe")
    parser.add_argument("--model", help="a checkpoint of your own instead of a small random one")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="dwdp-demo-") as folder:
        model = args.model
        if model is None:
            from checkpoints import CheckpointSpec, write_checkpoint

            say(f"writing a small random {args.family} checkpoint")
            model = str(write_checkpoint(CheckpointSpec(family=args.family, num_experts=16), Path(folder) / "model"))
        options = engine_options(args.ranks)
        if gpus := count_gpus():
            # The expert kernels that DWDP takes; vLLM might choose others, which round otherwise.
            options["moe_backend"] = "triton"
            # Engines follow each other here, and the one before may still hold memory.
            options |= SMALL_CACHE
            views = ("contiguous", "split")
            say(f"plain vLLM, one engine on one of {gpus} GPUs")
        else:
            views = ("contiguous", "inplace")
            say("plain vLLM, one engine on as many cores as a rank gets")
            bind_like_a_rank(args.ranks)
        expected, _, plain_s = generate(model, args.tokens, **options)
        os.environ.pop("VLLM_CPU_OMP_THREADS_BIND", None)
        rows: list[list[str]] = []
        different = 0
        # GPUs would hold all experts but one of a model this small.
        settings = {"experts_per_rank": "partition", **dwdp_settings(args.ranks)}
        for view in views:
            say(f"DWDP, {args.ranks} ranks, weight view {view}")
            tokens, counters, seconds = generate(
                model,
                args.tokens,
                distributed_executor_backend="dwdp",
                data_parallel_size=args.ranks,
                additional_config={"dwdp": {"weight_view": view, **settings}},
                **options,
            )
            same = sum(a == b for a, b in zip(tokens, expected, strict=True))
            different += len(expected) - same
            say(
                f"  {same} of {len(expected)} requests have plain vLLM's tokens ({seconds:.1f} s; plain {plain_s:.1f} s)"
            )
            rows += [row(view, counter) for counter in counters]
    print()
    print(table(rows))
    print()
    print(
        "All tokens are identical to plain vLLM's."
        if not different
        else f"{different} requests DIFFER from plain vLLM."
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
