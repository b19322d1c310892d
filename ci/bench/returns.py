"""A rank dies under load and returns: what do the others notice? `python -m ci.bench.returns --json FILE [--ranks 4]`

A `vllm serve` on each of --ranks GPUs, a rank of one group each (docs/ranks_apart.md), get steady load, each from clients of
its own and without a router, so that what is seen of a rank is what that rank does. All processes of rank 1's server get
SIGKILL; after a while it is started again as it was. Measured for each rank, before, while rank 1 is dead, while it starts,
and after: tokens/s, requests that failed, the slowest, and the longest time without an answer. Digests of all experts as the
kernels of every rank see them are taken before the load and after it.

With --extra an extra rank joins after that, on a GPU of its own, is asked too, and leaves in order: measured for the others
while it starts, is there, and has left.

With --plain vLLM's own data parallel launch of as many ranks with expert parallelism, which is up beside them and idle until
they have ended, gets the same load; then the engine of its rank 1 gets SIGKILL, and what becomes of the other ones' requests
is told.

Exit status 1: a request failed at another rank than 1, or at rank 1 while it was there; one of the others gave no answer
around the kill for a second longer than before; digests differ; rank 1 did not adopt its experts, or a GPU has more in use
after than before, by half a share; the extra rank failed a request, or did not end in order; a rank did not see it, or rank
1, go or come; a server did not start; or something was left: a process, a segment, memory of a GPU.

With --cpu: a tiny model on two cores, to try the program; figures mean nothing, and vLLM has there no data parallel launch
with expert parallelism to compare with.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from ci.bench.load import SHAPE, parse_load, requests
from ci.bench.models import MODELS, vocabulary, write_model
from ci.bench.results import as_text
from ci.bench.returns_apart import Apart
from ci.bench.returns_apart import table as table_apart
from ci.bench.returns_plain import Plain
from ci.bench.returns_plain import table as table_plain
from ci.bench.returns_servers import Left, NotUp, say
from ci.bench.run import await_go, command, machine, versions
from ci.bench.weights import why_not, write_weights
from ci.bench.words import check_numbers, check_places
from ci.checks.visible import visible_gpus

from servers import Servers, run_with_servers  # isort: skip

_SHM: Final = Path("/dev/shm")
#: On GPUs, of everything but the first start: the parts, a second start, which finds what the first has compiled, and ends.
_REST_S: Final = 270.0
#: Of an extra rank: it finds what others have compiled, but not its experts in memory.
_EXTRA_S: Final = 150.0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="of the group; on GPUs one each (%(default)s)")
    add("--model", default="", help=f"{', '.join(MODELS)} (default: qwen3, or tiny with --cpu); its weights are made")
    add("--layers", type=int, help="of the model, instead of its own number (default: 5 of qwen3)")
    add("--load", default="", help=f"on each server, {SHAPE} (default: prefill8k=8192/1/8, or small=96/1/2 with --cpu)")
    add("--part-s", type=float, default=10.0, help="seconds of before, of being dead, and of after (%(default)s)")
    add("--settle-s", type=float, default=4.0, help="seconds of load before it is measured, also after the return")
    add("--kv-gib", type=float, default=4.0, help="KV cache of each rank")
    add("--batched-tokens", type=int, default=16384, help="tokens of a step")
    add("--extra", action="store_true", help="then an extra rank joins, serves and leaves; on GPUs it takes one more")
    add("--eager", action="store_true", help="no torch.compile and no CUDA graphs")
    add("--plain", action="store_true", help="vLLM's own data parallel launch too (GPUs only)")
    add(
        "--start-s",
        type=float,
        help="a server that takes longer has failed (default: 60 and 45 a rank; on CPU twice)",
    )
    add("--answer-s", type=float, default=60.0, help="a request that waits longer has failed")
    add("--limit-s", type=float, help="of everything (default: --start-s and 270, with --extra 420; on CPU twice)")
    add("--cpu", action="store_true", help="try this on two cores with a tiny model")
    add("--scratch", type=Path, help="where the checkpoint is written and removed (default: /dev/shm if it has room)")
    add("--logs", type=Path, help="keep the servers' logs here")
    add("--json", type=Path, help="write the results here")
    add("--go", type=Path, help="once servers are up, wait for this file: other benches measure on these GPUs first")
    add("--more", nargs=argparse.REMAINDER, default=[], help="last: words for every `vllm serve`")
    args = parser.parse_args()
    args.model = args.model or ("tiny" if args.cpu else "qwen3")
    try:
        check_numbers(args, zero=("settle_s",))
        if args.ranks < 2:
            raise ValueError(f"--ranks {args.ranks}: nobody would be left to serve: write 2 or more")
        args.start_s = args.start_s or start_limit(args.ranks) * (2 if args.cpu else 1)
        args.limit_s = args.limit_s or args.start_s + (_REST_S + _EXTRA_S * args.extra) * (2 if args.cpu else 1)
        check_places(args, "json", "go")
        if args.scratch is not None and not args.scratch.is_dir():
            raise ValueError(f"--scratch {args.scratch}: there is no such folder: make it, or leave it out")
        if (least := (3 + 2 * args.extra) * args.part_s + 2 * args.settle_s) > args.limit_s:
            raise ValueError(
                f"--limit-s {args.limit_s:g}: parts and settling alone take {least:g} s: write more, or shorten them"
            )
        args.layers = args.layers or (5 if args.model == "qwen3" else None)
        args.load = parse_load(args.load or ("small=96/1/2" if args.cpu else "prefill8k=8192/1/8"))
        if args.model not in MODELS:
            raise ValueError(f"--model {args.model}: write {', '.join(MODELS)}")
        if reason := why_not(args.model):
            raise ValueError(reason)
        if args.load.every or args.load.uneven:
            raise ValueError(f"load {args.load.name}: its clients ask one request after the other, all alike")
        if not args.cpu and (gpus := visible_gpus()) < (wanted := args.ranks + args.extra):
            raise ValueError(f"this takes {wanted} GPUs, and {gpus} can be seen: --cpu tries it on two cores")
    except ValueError as error:
        parser.error(str(error))
    if args.cpu:
        args.kv_gib, args.batched_tokens = min(args.kv_gib, 0.0625), min(args.batched_tokens, 1024)
    return args


def start_limit(ranks: int) -> float:
    """Seconds for the first start of so many servers at once, on GPUs: two took 137 without caches, on 32 cores."""
    return 60.0 + 45.0 * ranks


def place_for(nbytes: int, asked: Path | None) -> Path | None:
    """A folder for a checkpoint of about so many bytes; None for the usual one for temporary files."""
    if asked is not None:
        return asked
    return _SHM if _SHM.is_dir() and shutil.disk_usage(_SHM).free > 2 * nbytes else None


def checkpoint_bytes(args: argparse.Namespace) -> int:
    """About how large the checkpoint is."""
    spec, vocab = MODELS[args.model]
    experts = (args.layers or spec.num_layers) * spec.num_experts * sum(spec.expert_bytes)
    return round(1.1 * experts) + 4 * vocab * spec.hidden


def hold(go: Path) -> None:
    """See await_go; --limit-s stands still meanwhile."""
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, 0.0)
    try:
        await_go(go, say)
    finally:
        signal.setitimer(signal.ITIMER_REAL, left_s)


def measure(servers: Servers, model: Path, args: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """All of it; what is found is in `found` however far it comes. Returns what is wrong."""
    left, wrong = Left(), list[str]()
    pool = requests(args.load, vocabulary(model), temperature=0.0)
    apart = Apart(servers, model, args, left)
    plain = Plain(servers, model, args, left) if args.plain and not args.cpu else None
    found["apart"] = apart.found
    try:
        apart.wait()
        if plain is not None:
            try:
                plain.wait()
            except NotUp as error:
                wrong.append(str(error))
                servers.stop(plain.server)
                plain = None
        if args.go:
            hold(args.go)
        apart.tell(pool)
        wrong += apart.wrong
        servers.stop(*(server for server in servers.started if plain is None or server is not plain.server))
        if plain is not None:
            found["plain"] = plain.found
            plain.tell(pool)
    except (NotUp, OSError, ValueError) as error:
        wrong += [*apart.wrong, f"{type(error).__name__}: {error}"]
    if servers.started:
        servers.stop()
    return wrong + [f"left behind: {name}" for name in left.look()]


def run(servers: Servers, args: argparse.Namespace) -> int:
    """0 where all is as it must be."""
    found: dict[str, Any] = {
        "machine": machine(args.cpu), "model": f"{args.model}, {args.layers or MODELS[args.model][0].num_layers} layers",
        "command": command(), "versions": versions(), "ranks": args.ranks,
        "load": args.load._asdict(),
    }  # fmt: skip
    began, wrong = time.monotonic(), ["it was cut off"]
    if args.plain and args.cpu:
        say("--plain is left out: on CPU vLLM has no data parallel launch with expert parallelism")
    try:
        with tempfile.TemporaryDirectory(
            prefix="returns-", dir=place_for(checkpoint_bytes(args), args.scratch)
        ) as folder:
            model = write_model(args.model, args.layers, Path(folder))
            nbytes = write_weights(args.model, model)
            say(f"{nbytes / 2**30:.2f} GiB of weights in {folder}, after {time.monotonic() - began:.0f} s")
            wrong = measure(servers, model, args, found)
    finally:
        found |= {"wrong": wrong, "seconds": round(time.monotonic() - began, 1)}
        if args.logs:
            args.logs.mkdir(parents=True, exist_ok=True)
            for log in servers.folder.glob("*.log"):
                shutil.copy(log, args.logs)
        if args.json:
            args.json.write_text(as_text(found))
    if "parts" in found.get("apart", {}):
        print("\n".join(table_apart(found["apart"])))
    if "others" in found.get("plain", {}):
        print("\n".join(table_plain(found["plain"])))
    for line in wrong:
        say(f"wrong: {line}")
    say(f"{found['seconds']:.0f} s in all{f', results in {args.json}' if args.json else ''}")
    return 1 if wrong else 0


def main() -> int:
    """Run with servers that are stopped however it ends."""
    args = arguments()

    def end(*_: object) -> None:
        raise SystemExit(f"it took longer than {args.limit_s:.0f} s")

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, args.limit_s)
    return run_with_servers("returns", functools.partial(run, args=args))


if __name__ == "__main__":
    sys.exit(main())
