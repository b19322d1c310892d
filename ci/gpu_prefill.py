"""Prefill and decode of real engines on GPUs: DWDP against plain vLLM. `python ci/gpu_prefill.py [--json FILE]`.

Layers of Qwen3-30B-A3B's shape with random weights, two ranks. On one GPU: one request at a time, so that one rank
computes, and peers' experts in pinned host memory (transport cuda_pinned): their copies overlap with compute as those over
NVLink do, at PCIe's rate. On two GPUs: a rank on each, experts pulled over the link between them, also by both at once.

The engines of a group are all there at the same time and take turns, in another order each time; plain vLLM is there twice.
A ratio compares what two engines took in one turn, and its bounds are those of the median over turns. Prefill is one step
of one prompt to its first token ("pairs": one such prompt on each rank at a time, beside one on each of two plain
engines); decode is greedy tokens per second of some requests at once. Without torch.compile unless --compile is given.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent))

from gpu_engine import Engine, EngineFailed
from visible import visible_gpus, wanted

REPO = Path(__file__).resolve().parent.parent
ENV = {"VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_HOST_IP": "127.0.0.1"}
PROMPTS = (4096, 8192, 16384, 32768)
BATCHES = (1, 8, 64)
WARM = 4  # turns, so that each of two ranks has had two
TURNS = 15
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
#: The jobs that others are compared with, if they are there.
PLAIN = ("plain", "plain again")


class Job(NamedTuple):
    """An engine and what is timed in it. dwdp: its settings; None is plain vLLM. gpu: the only one it sees."""

    name: str
    dwdp: dict[str, Any] | None
    options: dict[str, Any]
    steps: tuple[str, ...]
    gpu: int | None = None


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
            additional_config={"dwdp": {**job.dwdp, "timeout_s": 60}},
        )
    return made


class Group:
    """Engines that take turns, and what they took: rows as the JSON file has them."""

    def __init__(self, jobs: list[Job], model: Path, folder: Path, args: argparse.Namespace) -> None:
        self.jobs = {job.name: job for job in jobs}
        self.rows: dict[str, dict[str, Any]] = {job.name: {} for job in jobs}
        self._limit_s = args.job_s
        self._engines = {}
        for job in jobs:
            env = ENV if job.gpu is None else {**ENV, "CUDA_VISIBLE_DEVICES": visible_names()[job.gpu]}
            log = folder / f"{job.name.replace(' ', '-')}.log"
            self._engines[job.name] = Engine(options_of(job, model, args.cpu, args.chunk), env, log)
        for name in list(self._engines):
            if found := self._answer(name):
                self.rows[name]["start_s"] = round(found["start_s"], 1)

    def _with(self, step: str) -> list[str]:
        return [name for name in self._engines if step in self.jobs[name].steps]

    def _ask(self, names: list[str], step: str, **words: Any) -> list[dict[str, Any] | None]:
        """The step on all `names` at the same time."""
        for name in names:
            self._engines[name].ask(step, **words)
        return [self._answer(name) for name in names]

    def _answer(self, name: str) -> dict[str, Any] | None:
        """None, and out of the group, where it failed."""
        try:
            return self._engines[name].answer(self._limit_s)
        except EngineFailed as error:
            self.rows[name]["error"] = str(error)
            self._engines.pop(name).stop(1)
            print(f"gpu prefill: {name}: {error}", flush=True)
            return None

    def prefill(self, lengths: list[int], turns: int) -> None:
        """One prompt at a time, by length."""
        rng = random.Random(0)
        for length in lengths:
            for turn in range(WARM + turns):
                names = self._with("prefill")
                for name in rng.sample(names, len(names)):
                    if (found := self._ask([name], "prefill", length=length, prompts=1, seed=turn)[0]) and turn >= WARM:
                        _add(self.rows[name], "prefill", length, found)

    def pairs(self, lengths: list[int], turns: int) -> None:
        """A prompt on each of two ranks, and on each of two plain engines, at a time."""
        rng = random.Random(1)
        for length in lengths:
            for turn in range(WARM + turns):
                names = self._with("pairs")
                units = [[name] for name in names if self.jobs[name].dwdp is not None]
                plain = [name for name in names if name in PLAIN]
                for unit in rng.sample([*units, plain], len(units) + 1):
                    each = 2 // len(unit) if unit else 0
                    found = [
                        item for item in self._ask(unit, "prefill", length=length, prompts=each, seed=turn) if item
                    ]
                    if len(found) == len(unit) > 0 and turn >= WARM:
                        _add(self.rows[unit[0]], "pairs", length, max(found, key=lambda item: item["seconds"]))

    def decode(self, batches: list[int], turns: int) -> None:
        """By requests at once."""
        rng = random.Random(2)
        for batch in batches:
            for turn in range(WARM + turns):
                names = self._with("decode")
                for name in rng.sample(names, len(names)):
                    if (found := self._ask([name], "decode", batch=batch)[0]) and turn >= WARM:
                        cell = self.rows[name].setdefault("decode", {}).setdefault(str(batch), {"all": []})
                        cell["all"].append(found["tokens_per_s"])
                        cell["tokens_per_s"] = statistics.median(cell["all"])

    def profile(self, length: int) -> None:
        """A prompt of each engine under torch's profiler, after everything that is timed."""
        for name in list(self._engines):
            for _ in range(2):  # the first one starts the profiler up
                found = self._ask([name], "profile", length=length)[0]
            self.rows[name]["profile"] = found

    def stop(self) -> None:
        """End all engines."""
        for engine in self._engines.values():
            engine.leave()
        for engine in self._engines.values():
            engine.stop()


def _add(row: dict[str, Any], step: str, length: int, found: dict[str, Any]) -> None:
    cell = row.setdefault(step, {}).setdefault(str(length), {"seconds": []})
    cell["seconds"].append(found.pop("seconds"))
    cell["median_s"] = statistics.median(cell["seconds"])
    for kind in ("host_s", "device_s"):
        told = [item[kind] for item in found["steps"] if kind in item]
        if told:
            cell.setdefault(f"steps_{kind}", []).append(sum(told))
    for key in ("exposed_s", "waits", "pulled_bytes"):
        if key in found:
            cell[key] = cell.get(key, 0) + found[key]


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
    parser.add_argument("--steps", default="prefill,pairs,decode", help="of %(default)s")
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
    lengths, batches, turns = (
        ([256, 1024], [1, 4], min(3, args.turns)) if args.cpu else (list(PROMPTS), list(BATCHES), args.turns)
    )
    begun = time.monotonic()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = args.logs or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        for number, whole in enumerate(groups(gpus, COMPILED if args.compile else GRAPHS)):
            names = [*PLAIN, *wanted([job.name for job in whole], args.only)]
            jobs = [job for job in whole if job.name in names]
            if all(job.dwdp is None for job in jobs):
                continue
            if time.monotonic() - begun > args.limit_s:
                print(f"gpu prefill: {', '.join(job.name for job in jobs)} not run: out of time", flush=True)
                continue
            group = Group(jobs, model, folder, args)
            print(f"gpu prefill: engines there after {time.monotonic() - begun:.0f} s", flush=True)
            try:
                for step, sizes_of in (("prefill", lengths), ("pairs", lengths), ("decode", batches)):
                    if step in args.steps.split(","):
                        getattr(group, step)(sizes_of, turns)
                if args.profile:
                    group.profile(args.profile)
            finally:
                group.stop()
            table(group.rows)
            suffix = f", group {number + 1}" if number else ""
            rows |= {name + (suffix if name in rows else ""): row for name, row in group.rows.items()}
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))
    return int(any("error" in row for row in rows.values()))


def ratios(base: list[list[float]], mine: list[float]) -> list[float]:
    """By turn: the mean of the plain engines over this one's."""
    return [statistics.fmean(turn[:-1]) / turn[-1] for turn in zip(*base, mine, strict=False)]


def bounds(values: list[float]) -> tuple[float, float, float]:
    """(median, lower, upper 95 % bound) of the median, by drawing turns again."""
    rng = random.Random(0)
    drawn = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(1000))
    return statistics.median(values), drawn[25], drawn[974]


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
