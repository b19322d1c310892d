"""Prefill and decode of real engines on GPUs: DWDP against plain vLLM. `python ci/gpu_prefill.py [--json FILE]`.

Layers of Qwen3-30B-A3B's shape with random weights, two ranks. On one GPU: one request at a time, so that one rank
computes, and peers' experts in pinned host memory (transport cuda_pinned): their copies overlap with compute as those over
NVLink do, at PCIe's rate. On two GPUs: a rank on each, experts pulled over the link between them, also by both at once.

Engines run one after the other, without torch.compile (whole decode steps in graphs); each figure is a median over turns
within one engine, and plain vLLM runs twice. Prefill is one step of one prompt to its first token ("pairs": one such prompt
on each rank at a time); decode is greedy tokens per second of some requests at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent))

from visible import visible_gpus

REPO = Path(__file__).resolve().parent.parent
ENV = {"VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_HOST_IP": "127.0.0.1"}
PROMPTS = (4096, 8192, 16384, 32768)
BATCHES = (1, 8, 64)
TURNS = 7
DECODED = 64
#: Whole decode steps in CUDA graphs, everything else eager.
GRAPHS = {
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 4, 8, 32, 64],
    }
}
EAGER = {"enforce_eager": True}
REAL = {
    "num_experts": 128, "num_layers": 4, "hidden": 2048, "intermediate": 768, "top_k": 8, "num_heads": 32, "num_kv_heads": 4,
    "head_dim": 128, "max_position": 40960,
}  # fmt: skip
TINY = {"num_experts": 16, "max_position": 40960}


class Job(NamedTuple):
    """An engine and what is timed in it. dwdp: its settings; None is plain vLLM."""

    name: str
    dwdp: dict[str, Any] | None
    options: dict[str, Any]
    steps: tuple[str, ...]


def jobs(gpus: int) -> list[Job]:
    """In order of value. gpus: 0 on CPU."""
    if not gpus:
        steps = ("prefill", "pairs", "decode")
        return [Job("plain", None, EAGER, ("prefill", "decode")), Job("dwdp", {}, EAGER, steps)]
    if gpus > 1:
        link = {"launcher": "mp", "transport": "cupy_ipc"}
        return [
            Job("plain graphs", None, GRAPHS, ("prefill", "decode")),
            Job("split 64 link", {**link, "weight_view": "split"}, GRAPHS, ("prefill", "pairs", "decode")),
            Job("plain again", None, GRAPHS, ("prefill",)),
            Job("contiguous 64 link", {**link, "weight_view": "contiguous"}, GRAPHS, ("prefill", "pairs")),
            Job("split 64 link, 1 MiB", {**link, "weight_view": "split", "slice_bytes": 1 << 20}, GRAPHS, ("pairs",)),
            Job(
                "split 96 link",
                {**link, "weight_view": "split", "experts_per_rank": 96},
                GRAPHS,
                ("prefill", "pairs", "decode"),
            ),
        ]
    pinned = {"transport": "cuda_pinned", "ranks_per_device": 2, "launcher": "mp"}
    ipc = {**pinned, "transport": "cupy_ipc", "experts_per_rank": 112}
    return [
        Job("plain graphs", None, GRAPHS, ("prefill", "decode")),
        Job("split 112 pinned", {**pinned, "experts_per_rank": 112, "weight_view": "split"}, GRAPHS, ("prefill",)),
        Job(
            "contiguous 112 pinned",
            {**pinned, "experts_per_rank": 112, "weight_view": "contiguous"},
            GRAPHS,
            ("prefill",),
        ),
        Job("split 112 ipc graphs", {**ipc, "weight_view": "split"}, GRAPHS, ("decode", "prefill")),
        Job("split 64 pinned", {**pinned, "experts_per_rank": 64, "weight_view": "split"}, GRAPHS, ("prefill",)),
        Job("plain again", None, GRAPHS, ("prefill", "decode")),
        Job("split 112 ipc eager", {**ipc, "weight_view": "split"}, EAGER, ("decode",)),
        Job("plain eager", None, EAGER, ("decode",)),
    ]


def prefill(llm: Any, lengths: list[int], turns: int, prompts: int = 1) -> dict[str, Any]:
    """By prompt length: seconds of `prompts` requests for one token, median and all, and the exposed wait of all ranks.

    The client sends a request to the rank with the fewest, so that two prompts are one on each of two ranks.
    """
    import random

    from vllm import SamplingParams

    rng, found = random.Random(0), {}
    for length in lengths:
        seconds, before = [], {}
        for turn in range(turns + 4):  # both ranks warm up twice
            if turn == 4:
                before = waits(llm)
            batch = [{"prompt_token_ids": [rng.randrange(100, 200) for _ in range(length)]} for _ in range(prompts)]
            started = time.perf_counter()
            llm.generate(batch, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
            seconds.append(time.perf_counter() - started)
        exposed = {key: value - before[key] for key, value in waits(llm).items()}
        found[str(length)] = {"median_s": statistics.median(seconds[4:]), "seconds": seconds[4:], **exposed}
    return found


def decode(llm: Any, batches: list[int]) -> dict[str, Any]:
    """By requests at once: tokens per second, median of nine turns after two to warm up, and all."""
    from vllm import SamplingParams

    found = {}
    for batch in batches:
        rates = []
        for _ in range(11):
            params = SamplingParams(temperature=0, max_tokens=DECODED, ignore_eos=True)
            prompts = [{"prompt_token_ids": [100 + i, 101, 102, 103]} for i in range(batch)]
            started = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            rates.append(batch * DECODED / (time.perf_counter() - started))
        found[str(batch)] = {"tokens_per_s": statistics.median(rates[2:]), "all": rates[2:]}
    return found


def waits(llm: Any) -> dict[str, float]:
    """Sums over ranks; nothing with plain vLLM."""
    import vllm_dwdp

    try:
        ranks = vllm_dwdp.counters(llm)
    except Exception:
        return {}
    return {
        "exposed_s": sum(rank["exposed_wait_ns"] for rank in ranks) / 1e9,
        "waits": sum(rank["slot_waits"] for rank in ranks),
        "pulled_bytes": sum(rank["pulled_bytes"] for rank in ranks),
    }


def run_one(spec_file: Path, out: Path) -> None:
    """In a process of its own: start the engine of a spec, time its steps, write them."""
    spec = json.loads(spec_file.read_text())
    from vllm import LLM

    started = time.monotonic()
    llm = LLM(spec["model"], **spec["options"])
    found: dict[str, Any] = {"start_s": time.monotonic() - started}
    for step in spec["steps"]:
        if step == "decode":
            found[step] = decode(llm, spec["batches"])
        else:
            found[step] = prefill(llm, spec["prompts"], spec["turns"], 2 if step == "pairs" else 1)
        out.write_text(json.dumps(found))
    del llm


def options_of(job: Job, cpu: bool) -> dict[str, Any]:
    """Keyword arguments of `LLM`."""
    longest = 1024 if cpu else PROMPTS[-1]
    made: dict[str, Any] = {
        "max_model_len": longest + 128,
        "max_num_batched_tokens": longest + 128,
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory_bytes": (256 << 20) if cpu else (2 << 30),
        **job.options,
    }
    if not cpu:
        made["attention_backend"] = "TRITON_ATTN" if os.environ.get("DWDP_BENCH_TRITON_ATTN") else "FLASH_ATTN"
    if job.dwdp is not None:
        made.update(
            distributed_executor_backend="dwdp",
            data_parallel_size=2,
            additional_config={"dwdp": {**job.dwdp, "timeout_s": 60}},
        )
    return made


def main() -> int:
    """Run the jobs and print ratios to plain vLLM's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write-only", action="store_true", help="write the checkpoint and stop")
    parser.add_argument(
        "--cpu", action="store_true", help="a tiny model on CPU, to try this script: times mean nothing"
    )
    parser.add_argument("--only", default="", help="jobs whose name contains this, by comma")
    parser.add_argument("--job-s", type=float, default=120, help="abort an engine after this many seconds")
    parser.add_argument("--limit-s", type=float, default=400, help="begin no engine after this many seconds")
    parser.add_argument("--job", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        run_one(*args.job)
        return 0
    from vllm_dwdp.checkpoints import CheckpointSpec, write_checkpoint

    begun = time.monotonic()
    sizes = TINY if args.cpu else REAL
    model = write_checkpoint(
        CheckpointSpec(dtype="bfloat16", **sizes),  # type: ignore[arg-type]
        REPO / ".cache" / "gpu" / f"prefill-{'tiny' if args.cpu else 'qwen3-30b'}",
    )
    print(f"gpu prefill: checkpoint there after {time.monotonic() - begun:.0f} s", flush=True)
    if args.write_only:
        return 0
    gpus = 0 if args.cpu else visible_gpus()
    begun, rows = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs(gpus):
            if args.only and not any(part in job.name for part in args.only.split(",")):
                continue
            if time.monotonic() - begun > args.limit_s:
                print(f"gpu prefill: {job.name} not run: out of time", flush=True)
                continue
            rows[job.name] = found = run_job(Path(folder), job, model, args)
            print(f"gpu prefill: {job.name}: {json.dumps(found)[:300]}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))
    table(rows)
    return int(any("error" in row for row in rows.values()))


def run_job(folder: Path, job: Job, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a job wrote, also where it was aborted later; `error` says how it ended then."""
    spec, out, log = (folder / f"job.{kind}" for kind in ("spec", "json", "log"))
    out.unlink(missing_ok=True)
    spec.write_text(
        json.dumps(
            {
                "model": str(model),
                "options": options_of(job, args.cpu),
                "steps": job.steps,
                "prompts": [256, 1024] if args.cpu else PROMPTS,
                "batches": [1, 4] if args.cpu else BATCHES,
                "turns": 2 if args.cpu else TURNS,
            }
        )
    )
    env = {**os.environ, **ENV, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, __file__, "--job", str(spec), str(out)],
            env=env,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            error = None if process.wait(timeout=args.job_s) == 0 else f"ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            error = f"not done after {args.job_s:.0f} s"
    found = json.loads(out.read_text()) if out.exists() else {}
    if error:
        lines = [line for line in log.read_text().splitlines() if "Error" in line]
        return {**found, "error": f"{error}: {' / '.join(lines[:4])[:600]}"}
    return dict(found)


def table(rows: dict[str, dict[str, Any]]) -> None:
    """Prefill: milliseconds, plain by this (above 1: faster than plain), share exposed. Decode: tokens/s, this by plain.

    Pairs are compared with plain vLLM's single prompts: two replicas would share nothing.
    """
    for step, figure in (("prefill", "median_s"), ("pairs", "median_s"), ("decode", "tokens_per_s")):
        plain = next((row[key] for row in rows.values() for key in (step, "prefill") if key in row), None)
        if plain is None:
            continue
        if not any(step in row for row in rows.values()):
            continue
        print(f"\n{step:22}" + "".join(f"{key:>26}" for key in plain))
        for name, row in rows.items():
            cells = []
            for key, base in plain.items():
                if key not in row.get(step, {}):
                    continue
                mine = row[step][key]
                if step == "decode":
                    cells.append(f"{mine[figure]:10.0f} tok/s {mine[figure] / base[figure]:6.3f}")
                else:
                    ranks = 2 if step == "pairs" else 1
                    exposed = mine.get("exposed_s", 0.0) / sum(mine["seconds"]) / ranks
                    cells.append(
                        f"{mine[figure] * 1e3:8.2f} ms {base[figure] / mine[figure]:6.3f} {100 * exposed:5.1f}%"
                    )
            print(
                f"{name:22}"
                + "".join(f"{cell:>26}" for cell in cells)
                + (f"  {row['error']}" if "error" in row else "")
            )


if __name__ == "__main__":
    sys.exit(main())
