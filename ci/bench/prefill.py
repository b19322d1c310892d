"""Prefill and decode of real engines on GPUs: DWDP against plain vLLM. `python -m ci.bench.prefill [--json FILE]`.

Layers of Qwen3-30B-A3B's shape with random weights, two ranks. On one GPU: one request at a time, so that one rank
computes, and peers' experts in pinned host memory (transport cuda_pinned): their copies overlap with compute as those over
NVLink do, at PCIe's rate. On two GPUs: a rank on each, experts pulled over the link between them, also by both at once.

The engines of a group are all there at the same time and take turns, in another order each time; plain vLLM is there twice.
A ratio compares what two engines took in one turn, and its bounds are those of the median over turns. Prefill is one step
of one prompt to its first token ("pairs": one such prompt on each rank at a time, beside one on each of two plain
engines); decode is greedy tokens per second of some requests at once, on both ranks of DWDP beside one plain engine; on two
GPUs that is two beside one. Without torch.compile unless --compile is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ci.bench.turns import PLAIN, Group, Job, bounds, ratios
from ci.checks.visible import gpus_for, visible_gpus, wanted
from ci.root import ROOT

ENV = {"VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_HOST_IP": "127.0.0.1"}
PROMPTS = (4096, 8192, 16384, 32768)
BATCHES = (1, 8, 64)
TURNS = 15
STEPS = ("prefill", "pairs", "decode")
SIZES = [1, 4, 8, 32, 64]
#: Whole decode steps in CUDA graphs, everything else eager.
GRAPHS = {
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES},
}
#: The same with torch.compile: DWDP's default.
COMPILED = {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES}}
EAGER = {"enforce_eager": True}
REAL = {
    "num_experts": 128, "num_layers": 4, "hidden": 2048, "intermediate": 768, "top_k": 8, "num_heads": 32, "num_kv_heads": 4,
    "head_dim": 128, "max_position": 40960,
}  # fmt: skip
TINY = {"num_experts": 16, "max_position": 40960}


def groups(gpus: int, graphs: dict[str, Any]) -> list[list[Job]]:
    """In order of value. gpus: 0 on CPU."""
    both = ("prefill", "decode")
    if not gpus:
        return [
            [
                Job("plain", None, EAGER, ("prefill", "pairs", "decode")),
                Job("contiguous", {"weight_view": "contiguous"}, EAGER, ("prefill", "pairs", "decode")),
            ]
        ]
    if gpus > 1:
        every = ("prefill", "pairs", "decode")
        split = {"transport": "cupy_ipc", "weight_view": "split"}
        return [
            [
                Job("plain", None, graphs, every, 0),
                Job("plain again", None, graphs, every, 1),
                Job("split 64 link", split, graphs, every),
                Job("split 96 link", {**split, "experts_per_rank": 96}, graphs, every),
                Job("contiguous 64 link", {**split, "weight_view": "contiguous"}, graphs, every),
                Job("split 64 link mp", {**split, "launcher": "mp"}, graphs, every),
            ]
        ]
    pinned = {"transport": "cuda_pinned", "ranks_per_device": 2, "weight_view": "split", "experts_per_rank": 112}
    ipc = {**pinned, "transport": "cupy_ipc"}
    return [
        [
            Job("plain", None, graphs, both),
            Job("plain again", None, graphs, both),
            Job("plain mp", None, {**graphs, "distributed_executor_backend": "mp"}, both),
            Job("split 112 pinned", pinned, graphs, ("prefill",)),
            Job("split 112 pinned mp", {**pinned, "launcher": "mp"}, graphs, ("prefill",)),
            Job("contiguous 112 pinned", {**pinned, "weight_view": "contiguous"}, graphs, ("prefill",)),
            Job("split 112 ipc", ipc, graphs, both),
        ],
        [
            Job("plain", None, graphs, both),
            Job("plain eager", None, EAGER, both),
            Job("split 64 pinned", {**pinned, "experts_per_rank": 64}, graphs, ("prefill",)),
            Job("split 112 ipc eager", ipc, EAGER, both),
            Job("split 112 ipc mp", {**ipc, "launcher": "mp"}, graphs, both),
        ],
    ]


def options_of(job: Job, model: Path, cpu: bool, chunk: int | None) -> dict[str, Any]:
    """Keyword arguments of `LLM`. chunk: tokens of a step at most."""
    longest = 1024 if cpu else PROMPTS[-1]
    made: dict[str, Any] = {
        "model": str(model),
        "max_model_len": longest + 128,
        "max_num_batched_tokens": chunk or longest + 128,
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
        # Nothing is measured with it: the KV cache has a fixed size, and other engines are there.
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": (256 << 20) if cpu else (1 << 30),
        **job.options,
    }
    if not cpu:
        made["attention_backend"] = "TRITON_ATTN" if os.environ.get("DWDP_BENCH_TRITON_ATTN") else "FLASH_ATTN"
    if job.dwdp is not None:
        made.update(
            distributed_executor_backend="dwdp",
            data_parallel_size=2,
            additional_config={"dwdp": {"experts_per_rank": "partition", **job.dwdp, "timeout_s": 60}},
        )
    return made


def environment_of(job: Job) -> dict[str, str]:
    """What its engine needs, and the GPU it sees."""
    return ENV if job.gpu is None else {**ENV, "CUDA_VISIBLE_DEVICES": visible_names()[job.gpu]}


def visible_names() -> list[str]:
    """The GPUs of this process as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(visible_gpus())]


def main() -> int:
    """Run the groups and print ratios to plain vLLM's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write-only", action="store_true", help="write the checkpoint and stop")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on CPU, to try this: times mean nothing")
    parser.add_argument(
        "--only", default="", help="plain vLLM and jobs of this name, or whose name contains it, by comma"
    )
    parser.add_argument("--steps", default=",".join(STEPS), help="of %(default)s")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument(
        "--chunk", type=int, help="tokens of a step at most: longer prompts take several steps in a row"
    )
    parser.add_argument("--profile", type=int, default=0, metavar="TOKENS", help="also profile a prompt of this length")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--logs", type=Path, help="keep the engines' logs here")
    parser.add_argument("--job-s", type=float, default=150, help="an engine that takes longer for anything is ended")
    parser.add_argument("--limit-s", type=float, default=400, help="begin no group after this many seconds")
    args = parser.parse_args()
    chosen = [] if args.write_only else choose(parser, args, gpus_for(parser, args.cpu))
    from examples.checkpoints import CheckpointSpec, write_checkpoint

    begun = time.monotonic()
    sizes = TINY if args.cpu else REAL
    model = write_checkpoint(
        CheckpointSpec(dtype="bfloat16", **sizes),  # type: ignore[arg-type]
        ROOT / ".cache" / "gpu" / f"prefill-{'tiny' if args.cpu else 'qwen3-30b'}",
    )
    print(f"gpu prefill: checkpoint there after {time.monotonic() - begun:.0f} s", flush=True)
    if args.write_only:
        return 0
    steps = args.steps.split(",")
    lengths, batches, turns = (
        ([256, 1024], [1, 4], min(3, args.turns)) if args.cpu else (list(PROMPTS), list(BATCHES), args.turns)
    )
    begun = time.monotonic()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = args.logs or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        for number, jobs in chosen:
            if time.monotonic() - begun > args.limit_s:
                print(f"gpu prefill: {', '.join(job.name for job in jobs)} not run: out of time", flush=True)
                continue

            def save(found: dict[str, dict[str, Any]], number: int = number) -> None:
                suffix = f", group {number}" if number > 1 else ""
                for name, row in found.items():
                    rows[name + suffix] = {"group": number, **row}
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1))

            group = Group(jobs, save, args.job_s)
            try:
                group.start(lambda job: options_of(job, model, args.cpu, args.chunk), environment_of, folder)
                print(f"gpu prefill: engines there after {time.monotonic() - begun:.0f} s", flush=True)
                for step, of in (("prefill", lengths), ("pairs", lengths), ("decode", batches)):
                    if step in steps:
                        getattr(group, step)(of, turns)
                if args.profile:
                    group.profile(args.profile)
            finally:
                group.stop()
            save(group.rows)
            table(group.rows)
    return int(any("error" in row for row in rows.values()))


def choose(parser: argparse.ArgumentParser, args: argparse.Namespace, gpus: int) -> list[tuple[int, list[Job]]]:
    """(number of a group, its jobs that are wanted and the plain ones beside them); ends the program if there are none."""
    all_groups = groups(gpus, COMPILED if args.compile else GRAPHS)
    chosen = []
    for number, jobs in enumerate(all_groups, 1):
        names = wanted([job.name for job in jobs], args.only)
        if names and (not args.only or set(names) - set(PLAIN)):
            chosen.append((number, [job for job in jobs if job.name in names or job.name in PLAIN]))
    if not chosen:
        known = ", ".join(repr(job.name) for jobs in all_groups for job in jobs if job.name not in PLAIN)
        parser.error(f"--only {args.only!r} names no job to compare with plain vLLM: there are {known}")
    if unknown := set(args.steps.split(",")) - set(STEPS):
        parser.error(f"--steps has {', '.join(sorted(unknown))}: there are {', '.join(STEPS)}")
    return chosen


def table(rows: dict[str, dict[str, Any]]) -> None:
    """Prefill: milliseconds, of which on the device, plain by this (above 1: faster than plain), share exposed. Decode:
    tokens/s, this by plain. A plain engine is compared with the others of its kind."""
    for step, kind in (("prefill", "seconds"), ("pairs", "seconds"), ("decode", "all")):
        sizes = list(dict.fromkeys(key for row in rows.values() for key in row.get(step, {})))
        if not sizes:
            continue
        print(f"\n{step:32}" + "".join(f"{size:>40}" for size in sizes))
        for name, row in rows.items():
            cells = []
            for size in sizes:
                cell = row.get(step, {}).get(size)
                others = [
                    rows[p][step][size][kind] for p in PLAIN if p != name and size in rows.get(p, {}).get(step, {})
                ]
                cells.append(_cell_text(step, cell, others) if cell else "")
            if any(cells):
                print(f"{name:32}" + "".join(f"{cell:>40}" for cell in cells))
        print(flush=True)
    for name, row in rows.items():
        if "error" in row:
            print(f"{name}: {row['error']}", flush=True)


def _cell_text(step: str, cell: dict[str, Any], others: list[list[float]]) -> str:
    values = cell["all" if step == "decode" else "seconds"]
    found = ratios(others, values) if others else []
    if step == "decode":
        found = [1 / ratio for ratio in found]
        text = f"{cell['tokens_per_s']:.0f} tok/s"
    else:
        device = cell.get("steps_device_s")
        text = f"{cell['median_s'] * 1e3:.2f}" + (f" ({statistics.median(device) * 1e3:.2f})" if device else "")
    if found:
        text += " {:.3f} [{:.3f} {:.3f}]".format(*bounds(found))
    if "exposed_s" in cell:
        text += f" {100 * cell['exposed_s'] / sum(values) / (2 if step == 'pairs' else 1):.1f}%"
    return text


if __name__ == "__main__":
    sys.exit(main())
