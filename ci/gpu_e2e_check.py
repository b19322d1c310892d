"""Real engines on a GPU: DWDP against plain vLLM. `python ci/gpu_e2e_check.py [--json FILE] [--only NAME]`.

Several ranks share the first GPU (`ranks_per_device`), so one is enough. Every case writes a small random checkpoint,
runs plain vLLM and DWDP, and compares: bytes of every expert as the kernels see them on every rank, greedy tokens one
request at a time on every rank, the first token's logprob in batches. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.e2e.engines import REPO, run_job
from vllm_dwdp.checkpoints import CheckpointSpec, write_checkpoint

CACHE = REPO / ".cache" / "gpu"
#: What a machine without FlashInfer and DeepGEMM needs; harmless elsewhere.
ENV = {"VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_HOST_IP": "127.0.0.1"}
STEPS = ["digests", "tokens_each_rank", "batch", "counters"]
BATCH_TOLERANCE = 0.1


class Case(NamedTuple):
    """One model under one configuration of dwdp and of vLLM."""

    model: dict[str, Any]
    ranks: int
    dwdp: dict[str, Any]
    options: dict[str, Any] = MappingProxyType({})  # type: ignore[assignment]


QWEN = {"family": "qwen3_moe", "num_experts": 16}
FP8 = {**QWEN, "fp8": True, "hidden": 256, "intermediate": 256, "head_dim": 64}
CASES = {
    "qwen3-split-2": Case(QWEN, 2, {"weight_view": "split"}),
    "qwen3-contiguous-2": Case(QWEN, 2, {"weight_view": "contiguous"}),
    "qwen3-auto-ray-2": Case(QWEN, 2, {"launcher": "ray"}),
    "qwen3-split-compiled-2": Case(QWEN, 2, {"weight_view": "split", "compile_on_gpu": True}, {"enforce_eager": False}),
    "deepseek-split-2": Case({"family": "deepseek_v3", "num_layers": 4}, 2, {"weight_view": "split"}),
    "qwen3-fp8-split-2": Case(FP8, 2, {"weight_view": "split"}),
    "qwen3-fp8-contiguous-2": Case(FP8, 2, {"weight_view": "contiguous"}),
    "gpt_oss-split-2": Case(
        {"family": "gpt_oss", "num_experts": 8}, 2, {"weight_view": "split", "experts_per_rank": 5, "num_slots": 3}
    ),
    "mixtral-split-3": Case({"family": "mixtral", "num_experts": 7}, 3, {"weight_view": "split"}),
    "qwen3-contiguous-4": Case(QWEN, 4, {"weight_view": "contiguous"}),
}


def launcher(case: Case) -> str:
    """Processes, unless the case is about Ray."""
    return str(case.dwdp.get("launcher", "mp"))


def attention(family: str) -> dict[str, Any]:
    """The attention backend that needs nothing but Triton."""
    return {"attention_backend": "TRITON_MLA" if family == "deepseek_v3" else "TRITON_ATTN"}


def check(name: str, case: Case, folder: Path, plain: dict[str, Any], limit_s: float, cpu: bool) -> dict[str, Any]:
    """Run a case; what differs is listed under `wrong`."""
    spec = CheckpointSpec(**{"dtype": "bfloat16", **case.model})
    model = write_checkpoint(
        spec, CACHE / f"{spec.family}-{zlib.crc32(json.dumps(spec.as_json(), sort_keys=True).encode()):08x}"
    )
    env = {**ENV, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    options = {**({} if cpu else attention(spec.family)), "kv_cache_memory_bytes": 256 << 20, **case.options}
    key = json.dumps([spec.as_json(), options], sort_keys=True)
    if key not in plain:
        started = time.monotonic()
        plain[key] = run_job(folder, model, ["digests", "tokens", "batch"], env, limit_s, **options)
        print(f"gpu e2e: plain vLLM took {time.monotonic() - started:.0f} s", flush=True)
    config = {"ranks_per_device": case.ranks, "timeout_s": 60, "launcher": launcher(case), **case.dwdp}
    if cpu:
        del config["ranks_per_device"]
    started = time.monotonic()
    job = run_job(
        folder,
        model,
        STEPS,
        env,
        limit_s,
        **options,
        distributed_executor_backend="dwdp",
        data_parallel_size=case.ranks,
        additional_config={"dwdp": config},
    )
    usual, wrong = plain[key], []
    if any(digests != usual["digests"][0] for digests in job["digests"]):
        wrong.append("bytes")
    if job["tokens_each_rank"] != [[tokens] * 2 for tokens in usual["tokens"]]:
        wrong.append("tokens")
    pairs = list(zip(usual["batch"], job["batch"], strict=True))
    same = [(a, b) for a, b in pairs if a["first"] == b["first"]]
    largest = max((abs(a["logprob"] - b["logprob"]) for a, b in same), default=float("inf"))
    if len(same) < 0.9 * len(pairs) or largest > BATCH_TOLERANCE:
        wrong.append("logprobs")
    if job["left"]:
        wrong.append(f"left behind: {job['left']}")
    first = job["counters"][0]
    return {
        "case": name,
        "wrong": wrong,
        "seconds": time.monotonic() - started,
        "start_s": job["start_s"],
        "logprob": largest,
        **{
            key: first[key] for key in ("view", "experts_held", "slab_bytes", "slot_bytes", "pulled_bytes", "on_demand")
        },
    }


def main() -> int:
    """Run the cases and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this, by comma")
    parser.add_argument("--cpu", action="store_true", help="on CPU, to try this script: choose cases with --only")
    parser.add_argument("--job-s", type=float, default=150, help="abort an engine after this many seconds")
    parser.add_argument("--limit-s", type=float, default=450, help="begin no case after this many seconds")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    plain: dict[str, Any] = {}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            if args.only and not any(part in name for part in args.only.split(",")):
                continue
            if time.monotonic() - begun > args.limit_s:
                rows.append({"case": name, "wrong": ["not run: out of time"]})
                continue
            try:
                rows.append(check(name, case, Path(folder), plain, args.job_s, args.cpu))
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                traceback.print_exc(limit=1)
                rows.append({"case": name, "wrong": [f"{type(error).__name__}: {str(error)[:200]}"]})
            print(f"gpu e2e: {rows[-1]}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))
    print(
        f"\n{'case':26} {'result':10} {'view':11} {'held':>5} {'slabs MB':>9} {'slots MB':>9} {'logprob':>8} {'s':>5}"
    )
    for row in rows:
        result = "equal" if not row["wrong"] else "WRONG"
        if "view" not in row:
            print(f"{row['case']:26} {result:10} {row['wrong'][0].splitlines()[0][:80]}")
            continue
        print(
            f"{row['case']:26} {result:10} {row['view']:11} {row['experts_held']:5} {row['slab_bytes'] / 1e6:9.2f} "
            f"{row['slot_bytes'] / 1e6:9.2f} {row['logprob']:8.4f} {row['seconds']:5.0f} {', '.join(row['wrong'])}"
        )
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
