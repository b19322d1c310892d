"""Output tokens/s of DWDP beside vLLM's own ways, in one run: `.venv/bin/python -m ci.bench.two_cores [--json FILE]`.

    plain        one engine on both cores
    tensor       tensor parallelism over two workers, one core each
    replicas     two independent engines, one core and half of the requests each
    inplace      DWDP, two ranks of one core each, weight view inplace
    contiguous   DWDP, two ranks of one core each, weight view contiguous

All engines are built first and stopped (SIGSTOP) while another one is measured. The variants take turns, so that what
else happens on the machine meets all of them; figures and ratios are medians over the turns. `--apart` builds and ends
one variant after the other instead, for machines with little memory. Requests are random token ids, the same for every
variant; prefix caching is off, since every turn repeats them. Prints ratios; it never fails because of one.
"""

import argparse
import gc
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from ci.bench.host import busy_s, cpu_s, memory, two_cores
from ci.bench.run import say
from ci.root import ROOT
from examples.checkpoints import CheckpointSpec, write_checkpoint

CACHE = ROOT / ".cache" / "bench"
#: 32 experts of 1.5 MiB in 15 layers: 755 MB of experts.
SPEC = CheckpointSpec(
    num_experts=32, num_layers=15, hidden=512, intermediate=512, top_k=4, num_heads=8, num_kv_heads=2, head_dim=64
)
SMALL = CheckpointSpec()
START_LIMIT_S = 600
VOCAB = range(8, 500)
KV_CACHE_BYTES = 256 << 20  # per engine
RATIOS = (
    ("inplace", "replicas", ">= 0.95"),
    ("inplace", "tensor", ">= 1.0"),
    ("contiguous", "inplace", ""),
    ("inplace", "plain", ""),
    ("contiguous", "plain", ""),
)


class Engine(NamedTuple):
    """One `LLM`: its options, the cores of its workers ('|' between workers) and which requests it gets."""

    options: dict[str, Any]
    cores: str
    requests: slice


def variants(cores: list[int], concurrency: int) -> dict[str, list[Engine]]:
    """Every variant uses both cores and computes at most `concurrency` requests at a time."""
    first, second = cores
    both, apart = f"{first},{second}", f"{first}|{second}"
    whole = {"max_num_seqs": concurrency}
    half = {"max_num_seqs": concurrency // 2}  # of one rank
    dwdp = {**half, "distributed_executor_backend": "dwdp", "data_parallel_size": 2}
    everything = slice(None)
    return {
        "plain": [Engine(whole, both, everything)],
        "tensor": [Engine({**whole, "tensor_parallel_size": 2}, apart, everything)],
        "replicas": [Engine(half, str(core), slice(i, None, 2)) for i, core in enumerate(cores)],
        **{
            view: [Engine({**dwdp, "additional_config": {"dwdp": {"weight_view": view}}}, apart, everything)]
            for view in ("inplace", "contiguous")
        },
    }


def serve(
    connection: Connection, engine: Engine, model: str, prompts: list[list[int]], output: int, eager: bool
) -> None:
    """In a process of its own: build the engine, then generate once per message until told to stop."""
    # A group of its own, which the bench stops and continues as a whole; no session of its own, since Linux shares out
    # the cores by session, and replicas have two.
    os.setpgid(0, 0)
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND=engine.cores, VLLM_NO_USAGE_STATS="1")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB only, and stronger than the option below
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        max_model_len=len(prompts[0]) + output,
        enforce_eager=eager,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        use_tqdm_on_load=False,
        **engine.options,
    )
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts[engine.requests]]
    llm.generate(requests, sampling, use_tqdm=False)
    connection.send("ready")
    while connection.recv() == "generate":
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        connection.send(sum(len(item.outputs[0].token_ids) for item in outputs))
    del llm
    gc.collect()  # lets go of what vLLM shares between its processes


class Turn(NamedTuple):
    """One measurement. others: part of the cores' time that went to other processes; nothing of it on a quiet machine."""

    speed: float  # output tokens/s
    others: float


class Variant:
    """The running engines of one variant; stopped except while it is measured."""

    def __init__(self, name: str, engines: list[Engine], *arguments: Any) -> None:
        self.name = name
        spawn = multiprocessing.get_context("spawn")
        self._running = []
        try:
            for engine in engines:
                mine, theirs = spawn.Pipe()
                process = spawn.Process(target=serve, args=(theirs, engine, *arguments))
                process.start()
                theirs.close()
                self._running.append((process, mine))
            for _, connection in self._running:
                if not connection.poll(START_LIMIT_S):
                    raise SystemExit(f"bench: {name} is not up after {START_LIMIT_S} s")
                self._receive(connection)
        except BaseException:
            self._signal(signal.SIGKILL)
            raise
        self.memory = self._sum(memory)
        # vLLM's tensor parallelism leaves its segments behind.
        maps = [line.split() for folder in self._folders() for line in (folder / "maps").read_text().splitlines()]
        self._segments = {fields[5] for fields in maps if len(fields) == 6 and fields[5].startswith("/dev/shm/")}
        self._signal(signal.SIGSTOP)

    def measure(self, cores: list[int]) -> Turn:
        """Output tokens/s of all requests, from the first message to the last answer."""
        self._signal(signal.SIGCONT)
        time.sleep(0.5)
        started, busy, own = time.perf_counter(), busy_s(cores), self._sum(cpu_s)
        for _, connection in self._running:
            connection.send("generate")
        tokens = sum(self._receive(connection) for _, connection in self._running)
        seconds = time.perf_counter() - started
        others = busy_s(cores) - busy - (self._sum(cpu_s) - own)
        self._signal(signal.SIGSTOP)
        return Turn(tokens / seconds, max(0.0, others) / seconds / len(cores))

    def close(self) -> None:
        """End the engines, by force where they do not end by themselves."""
        self._signal(signal.SIGCONT)
        for process, connection in self._running:
            with suppress(OSError):
                connection.send("stop")
            process.join(30)
        deadline = time.monotonic() + 5
        while self._folders() and time.monotonic() < deadline:  # Python's resource tracker cleans up last
            time.sleep(0.1)
        self._signal(signal.SIGKILL)
        for segment in self._segments:
            Path(segment).unlink(missing_ok=True)

    def _receive(self, connection: Connection) -> Any:
        try:
            return connection.recv()
        except EOFError:
            raise SystemExit(f"bench: an engine of {self.name} ended; see its messages above") from None

    def _signal(self, number: int) -> None:
        for process, _ in self._running:
            with suppress(ProcessLookupError):
                if process.pid is not None:
                    os.killpg(process.pid, number)

    def _folders(self) -> list[Path]:
        """Of all processes of this variant, under /proc."""
        groups = {process.pid for process, _ in self._running}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(ProcessLookupError):
                if os.getpgid(int(folder.name)) in groups:
                    found.append(folder)
        return found

    def _sum(self, figure: Callable[[Path], float]) -> float:
        return sum(figure(folder) for folder in self._folders())


def run(
    args: argparse.Namespace, cores: list[int], chosen: dict[str, list[Engine]], *arguments: Any
) -> dict[str, dict[str, Any]]:
    """[variant] -> its speed in every turn and its memory."""
    found: dict[str, dict[str, Any]] = {name: {"runs": [], "others": [], "memory": 0} for name in chosen}

    def build(name: str) -> Variant:
        started = time.monotonic()
        variant = Variant(name, chosen[name], *arguments)
        found[name]["memory"] = variant.memory
        say(f"{name} is up after {time.monotonic() - started:.0f} s, {variant.memory / 1e9:.2f} GB")
        return variant

    def turn(variant: Variant) -> None:
        speed, others = variant.measure(cores)
        found[variant.name]["runs"].append(speed)
        found[variant.name]["others"].append(others)
        say(f"{variant.name} {speed:.1f} output tokens/s; other processes had {others:.0%} of the cores")

    with ExitStack() as stack:
        if args.apart:
            for name in chosen:
                with ExitStack() as own:
                    variant = build(name)
                    own.callback(variant.close)
                    for _ in range(args.repetitions):
                        turn(variant)
            return found
        built = []
        for name in chosen:
            built.append(build(name))
            stack.callback(built[-1].close)
        for repetition in range(args.repetitions):
            for variant in built if repetition % 2 == 0 else built[::-1]:
                turn(variant)
    return found


def report(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Print the table and the medians of the ratios; returns these."""
    medians = {name: statistics.median(result["runs"]) for name, result in found.items()}
    print(f"\n{'variant':<12}{'output tokens/s':>16}{'all turns':>36}{'memory GB':>12}{'others at most':>16}")
    for name, result in found.items():
        turns = " ".join(f"{speed:.1f}" for speed in result["runs"])
        others = f"{max(result['others']):.0%}"
        print(f"{name:<12}{medians[name]:>16.1f}{turns:>36}{result['memory'] / 1e9:>12.2f}{others:>16}")
    print()
    ratios = {}
    for above, below, goal in RATIOS:
        if above in medians and below in medians:
            # Turn by turn, so that a machine that grows slower or faster counts for nothing.
            turns = zip(found[above]["runs"], found[below]["runs"], strict=True)
            ratios[f"{above}/{below}"] = ratio = statistics.median(a / b for a, b in turns)
            print(f"{above} / {below}: {ratio:.2f}{f'; goal {goal}' if goal else ''}")
    return ratios


def main() -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint of your own instead of a random one (755 MB of experts)")
    parser.add_argument("--small", action="store_true", help="a tiny random checkpoint, to try the script itself")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens to generate per request")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5, help="turns per variant")
    parser.add_argument("--cores", help="the two CPUs to use, as 0,1")
    parser.add_argument("--only", help="variants to run, by comma")
    parser.add_argument("--compile", action="store_true", help="with torch.compile instead of eager")
    parser.add_argument("--apart", action="store_true", help="one variant after the other")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: ended"))  # engines are stopped: they have to be ended
    cores = [int(core) for core in args.cores.split(",")] if args.cores else two_cores()
    os.sched_setaffinity(0, cores)  # inherited: front ends and engines share the two cores with the workers
    chosen = variants(cores, args.concurrency)
    if args.only:
        chosen = {name: chosen[name] for name in args.only.split(",")}
    spec = SMALL if args.small else SPEC
    model = args.model
    if model is None:
        model = str(write_checkpoint(spec, CACHE / ("small" if args.small else "model")))
    rng = random.Random(0)
    prompts = [rng.choices(VOCAB, k=args.input) for _ in range(args.requests)]
    say(
        f"{args.requests} requests of {args.input} + {args.output} tokens, {args.concurrency} at a time, "
        f"on cores {cores}, {'compiled' if args.compile else 'eager'}"
    )
    found = run(args, cores, chosen, model, prompts, args.output, not args.compile)
    ratios = report(found)
    if args.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "variants": found, "ratios": ratios}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
