"""Real engines on a GPU: DWDP against plain vLLM. `python -m ci.checks.gpu_e2e [--quantised] [--json FILE] [--only NAME]`.

One GPU is enough: several ranks share it (`ranks_per_device`); more are used as far as there are ranks. Every case of
ci/checks/gpu_cases.py writes a small random checkpoint, runs plain vLLM and DWDP, and compares: bytes of every expert as the
kernels see them on every rank, greedy tokens one request at a time on every rank, the first token's logprob in batches.
Where code is compiled, plain vLLM runs twice, with a cache for each, and either's tokens do: `plain_agrees` tells whether
they are the same. A case of `vllm serve` compares tokens over HTTP, pinned to each rank. Several cases run at a time. Exits
with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from ci.checks.gpu_cases import CASES, QUANTISED, Case
from ci.checks.in_time import InTime
from ci.checks.visible import gpus_for, wanted
from examples.checkpoints import CheckpointSpec, write_checkpoint
from tests.e2e.engines import REPO, run_job
from tests.e2e.server import start_server

CACHE = REPO / ".cache" / "gpu"
#: What a machine without FlashInfer and DeepGEMM needs; harmless elsewhere.
ENV = {"VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_HOST_IP": "127.0.0.1"}
#: Otherwise two runs of plain vLLM may differ: Inductor takes the tiles that were faster while it compiled.
ENV["TORCHINDUCTOR_DETERMINISTIC"] = "1"
# Images may allow one, with which an engine compiles for minutes.
ENV["TORCHINDUCTOR_COMPILE_THREADS"] = "8"
STEPS = ["digests", "tokens_each_rank", "batch", "counters"]
BATCH_TOLERANCE = 0.1
KV_BYTES = 256 << 20
#: With a KV cache of a given size only looked at to see that so much is free; other programs may use the GPU too.
UTILISATION = 0.05
PROMPTS = ("The experts of a layer", "No rank waits", "Two slots")
NOT_BEGUN = "not begun: out of time"
SHOWN = ("view", "experts_held", "slab_bytes", "slot_bytes", "forwards", "direct_forwards", "pulled_bytes",
         "on_demand_fetches", "kernels_compiled_after_start", "travel_requests", "travel_late", "travel_served")  # fmt: skip


class Plain:
    """Results of plain vLLM, found once for all cases that share them, whichever thread asks first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._found: dict[str, Any] = {}

    def get(self, key: str, find: Callable[[], Any]) -> Any:
        """What `find` gave for `key`; one that failed is tried again."""
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._found:
                self._found[key] = find()
            return self._found[key]


def attention(family: str) -> str:
    """The attention backend that needs nothing but Triton."""
    return "TRITON_MLA" if family == "deepseek_v3" else "TRITON_ATTN"


_WRITING: Final = threading.Lock()  # transformers sets torch's default type, which all threads share


def checkpoint(case: Case) -> tuple[Path, str]:
    """A case's model, written if it is not there, one at a time, and what identifies it."""
    spec = CheckpointSpec(**{"dtype": "bfloat16", **case.model})
    key = json.dumps(spec.as_json(), sort_keys=True)
    with _WRITING:
        return write_checkpoint(spec, CACHE / f"{spec.family}-{zlib.crc32(key.encode()):08x}"), key


def settings(case: Case, gpus: int) -> dict[str, Any]:
    """Of dwdp. gpus: 0 on CPU."""
    shared = {"ranks_per_device": -(-case.ranks // gpus)} if gpus else {}
    # Of models this small, memory would have a rank hold all experts but one.
    return {**shared, "experts_per_rank": "partition", "timeout_s": 60, **case.dwdp}


def environ(cache: Path) -> dict[str, str]:
    """cache: of compiled code. vLLM's own may hold some that was compiled under other settings of Inductor."""
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    return {**ENV, "PYTHONPATH": path, "VLLM_CACHE_ROOT": str(cache)}


def left_behind(left: list[str], alone: bool) -> list[str]:
    """What stayed after an engine; names of vLLM's queues tell no owner, so that beside other engines they do not count."""
    stayed = [name for name in left if alone or not name.startswith("psm_")]
    return [f"left behind: {stayed}"] if stayed else []


def compiles(options: dict[str, Any]) -> bool:
    """Whether an engine with these options compiles its code, so that two of them may round otherwise."""
    return not options.get("enforce_eager") and options.get("compilation_config", {}).get("mode") != 0


def are_of(found: list[list[list[int]]], plains: list[list[list[int]]]) -> bool:
    """Whether the tokens of every prompt on every rank are those of one of the plain engines for that prompt."""
    by_prompt = zip(found, *plains, strict=True)
    return all(tokens in expected for ranks, *expected in by_prompt for tokens in ranks)


def furthest(found: list[dict[str, Any]], plains: list[list[dict[str, Any]]]) -> float:
    """How far a first token's logprob is from that of the nearer plain engine for the same token, at most.

    Where two tokens are about as likely, batches decide which is taken; infinite for one that no plain engine finds likely.
    """

    def apart(mine: dict[str, Any], others: list[dict[str, Any]]) -> float:
        likely = [dict(map(tuple, other["likely"])).get(mine["first"], float("-inf")) for other in others]
        return min(abs(mine["logprob"] - logprob) for logprob in likely)

    return max(apart(mine, others) for mine, *others in zip(found, *plains, strict=True))


def check(case: Case, folder: Path, plain: Plain, args: argparse.Namespace) -> dict[str, Any]:
    """Run a case of `LLM(...)`; what differs is listed under `wrong`."""
    model, key = checkpoint(case)
    common: dict[str, Any] = {"kv_cache_memory_bytes": KV_BYTES, "gpu_memory_utilization": UTILISATION}
    if not args.cpu:
        common["attention_backend"] = attention(case.model["family"])
    options = {**common, **case.options}

    # Of four ranks some have prompts in a batch that they have not had before, and others in the KV cache.
    asked = ["batch", *(["batch_of_four"] if case.ranks == 4 else [])]

    def ask_plain(cache: str) -> dict[str, Any]:
        return run_job(folder, model, ["digests", "tokens", *asked], environ(folder / cache), args.job_s, **options)

    words = key + json.dumps([asked, options], sort_keys=True)
    caches = {words: "cache-plain"} | ({f"again {words}": "cache-again"} if compiles(options) else {})
    with ThreadPoolExecutor(len(caches)) as both:
        plains = list(both.map(lambda key: plain.get(key, lambda: ask_plain(caches[key])), caches))
    usual = plains[0]
    started = time.monotonic()
    job = run_job(
        folder,
        model,
        STEPS,
        environ(folder / "cache-dwdp"),
        args.job_s,
        **options,
        distributed_executor_backend="dwdp",
        data_parallel_size=case.ranks,
        additional_config={"dwdp": settings(case, args.gpus)},
    )
    wrong = []
    if any(digests != usual["digests"][0] for digests in job["digests"]):
        wrong.append("bytes")
    same_tokens = are_of(job["tokens_each_rank"], [found["tokens"] for found in plains])
    if not same_tokens:
        wrong.append("tokens")
    largest = furthest(job["batch"], [found[name] for found in plains for name in asked])
    if case.batches and largest > BATCH_TOLERANCE:
        wrong.append("logprobs")
    late = [counted["kernels_compiled_after_start"] for counted in job["counters"]]
    if any(late):
        wrong.append(f"kernels compiled after start: {late}")
    wrong += left_behind(job["left"], args.parallel == 1)
    first = job["counters"][0]
    return {
        "wrong": wrong,
        "seconds": time.monotonic() - started,
        "start_s": job["start_s"],
        "gpus": min(case.ranks, args.gpus),
        "same_tokens": same_tokens,
        "plain_agrees": all(found["tokens"] == usual["tokens"] for found in plains),
        "logprob": largest,
        "plain_apart": furthest(usual[asked[-1]], [usual["batch"]]),
        **{name: first[name] for name in SHOWN},
    }


def check_serve(case: Case, folder: Path, plain: Plain, args: argparse.Namespace) -> dict[str, Any]:
    """Run a case of `vllm serve`: tokens of every rank over HTTP, metrics, the end."""
    model, key = checkpoint(case)
    common = ["--kv-cache-memory-bytes", str(KV_BYTES), "--gpu-memory-utilization", str(UTILISATION)]
    if not args.cpu:
        common += ["--attention-backend", attention(case.model["family"])]

    def words(options: dict[str, Any]) -> list[str]:
        found = ["--enforce-eager"] if options.get("enforce_eager") else []
        compilation = options.get("compilation_config")
        return found + (["--compilation-config", json.dumps(compilation)] if compilation else [])

    def ask(more: list[str], ranks: int) -> tuple[list[Any], dict[str, float], list[str]]:
        server = start_server(folder, model, *common, *more, env=environ(folder / f"cache-serve-{ranks}"))
        try:
            pinned = [None] if ranks == 1 else list(range(ranks))
            found = [[server.complete(prompt, 12, rank=rank) for prompt in PROMPTS] for rank in pinned]
            time.sleep(3)  # counters are published once a second
            metrics = server.metrics()
            server.stop()
            return found, metrics, server.left()
        finally:
            server.kill()

    given = words(case.options)
    usual = plain.get(" ".join(["serve", key, *given]), lambda: ask(given, 1)[0][0])
    started = time.monotonic()
    config = json.dumps({"dwdp": settings(case, args.gpus)})
    backend = ["--distributed-executor-backend", "dwdp", "--data-parallel-size", str(case.ranks)]
    found, metrics, left = ask([*given, *backend, "--additional-config", config], case.ranks)
    same_tokens = all(tokens == usual for tokens in found)
    wrong = [] if same_tokens else ["tokens"]
    forwards = [value for name, value in metrics.items() if name.startswith("dwdp:forwards_total")]
    if len(forwards) != case.ranks or not all(forwards):
        wrong.append(f"metrics: forwards {forwards}")
    late = [value for name, value in metrics.items() if name.startswith("dwdp:kernels_compiled_after_start_total")]
    if len(late) != case.ranks or any(late):
        wrong.append(f"metrics: kernels compiled after start {late}")
    wrong += left_behind(left, args.parallel == 1)
    return {"wrong": wrong, "seconds": time.monotonic() - started, "same_tokens": same_tokens, "metrics": metrics}


def attempt(name: str, folder: Path, plain: Plain, args: argparse.Namespace) -> dict[str, Any]:
    """The row of a case, also where it fails."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    case = (QUANTISED if args.quantised else CASES)[name]
    try:
        row = (check_serve if case.serve else check)(case, place, plain, args)
    except Exception as error:
        traceback.print_exc(limit=1)
        row = {"wrong": [f"{type(error).__name__}: {str(error)[-1500:]}"]}
    print(f"gpu e2e: {name}: {json.dumps(row)[:400]}", flush=True)
    return {"case": name, **row}


def table(rows: list[dict[str, Any]]) -> None:
    heads = f"{'view':11} {'held':>5} {'slabs MB':>9} {'slots MB':>9} {'tokens':9} {'logprob':>8} {'s':>5}"
    print(f"\n{'case':32} {'result':10} {heads}")
    for row in rows:
        result = "left out" if row["wrong"] == [NOT_BEGUN] else "WRONG" if row["wrong"] else "ok"
        line = f"{row['case']:32} {result:10} "
        tokens = "equal" if row.get("same_tokens") else "differ"
        if "view" in row:
            line += f"{row['view']:11} {row['experts_held']:5} {row['slab_bytes'] / 1e6:9.2f} "
            line += f"{row['slot_bytes'] / 1e6:9.2f} {tokens:9} {row['logprob']:8.4f} {row['seconds']:5.0f} "
        elif "seconds" in row:
            line += f"{'':37} {tokens:9} {'':8} {row['seconds']:5.0f} "
        print(line + ", ".join(text.splitlines()[-1][:100] if text else "" for text in row["wrong"]))


def main() -> int:
    """Run the cases and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quantised", action="store_true", help="the cases of quantised experts, instead of the others"
    )
    parser.add_argument("--only", default="", help="cases of these names, or whose names contain this, by comma")
    parser.add_argument("--skip", default="", help="cases of these names, by comma, are left out")
    parser.add_argument("--logs", type=Path, help="folder in which the engines' logs are kept")
    parser.add_argument("--cpu", action="store_true", help="on CPU, to try this script: choose cases with --only")
    parser.add_argument("--parallel", type=int, default=1, help="cases at a time")
    parser.add_argument("--job-s", type=float, default=200, help="abort an engine after this many seconds")
    parser.add_argument("--limit-s", type=float, default=450, help="begin no case that would probably not end by then")
    args = parser.parse_args()
    in_time = InTime(args.limit_s)
    args.gpus = gpus_for(parser, args.cpu)
    cases = QUANTISED if args.quantised else CASES
    names = wanted(cases, args.only, args.skip)
    rows: dict[str, dict[str, Any]] = {}
    plain, writing = Plain(), threading.Lock()

    def one(name: str) -> None:
        # Its model is written by itself: beside other engines those of all 28 took five minutes.
        with in_time.case(name) as begins:
            row = attempt(name, Path(folder), plain, args) if begins else {"case": name, "wrong": [NOT_BEGUN]}
        with writing:
            rows[name] = row
            if args.json:
                args.json.write_text(json.dumps([rows[name] for name in names if name in rows], indent=1))

    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(args.parallel) as pool:
        folder = args.logs or made
        list(pool.map(one, names))
    table([rows[name] for name in names])
    if in_time.left_out:
        print(f"not begun, {len(in_time.left_out)} of {len(names)} cases: {','.join(sorted(in_time.left_out))}")
    return int(any(row["wrong"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
