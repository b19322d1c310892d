"""How long servers take to be up, without caches and with: `python -m ci.bench.starts --json FILE`.

The systems of loads.py, one after the other, each twice: first with an empty cache of its own (torch.compile, Triton, vLLM),
then with what the first start left there. Seconds are those from the command to the first answer of /health; of replicas, to
that of the last one.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from ci.bench.loads import check, devices_of
from ci.bench.models import MODELS, model_in
from ci.bench.results import as_text
from ci.bench.run import command, machine, say, versions
from ci.bench.servers import Server, ServerFailed, System, check_devices, parse_system
from ci.bench.words import check_numbers, check_places

#: What keeps compiled code from one start to the next.
_CACHES: Final = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def start(system: System, model: Path, words: list[str], args: argparse.Namespace, caches: Path, log: Path) -> float:
    """Seconds to health, caches under `caches`; the server is gone afterwards. Raises ServerFailed."""
    for name in _CACHES:
        os.environ[name] = str(caches / name)
    begun = time.monotonic()
    server = Server(system, model, words, devices_of(args.cpu), args.cpu, log)
    try:
        server.wait(begun + args.start_s)
        return time.monotonic() - begun
    finally:
        server.stop()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--systems", nargs="+", metavar="KIND[:NAME[:JSON]]", help="as of loads.py; default: all that run here")
    add("--model", default="", help=f"{', '.join(MODELS)}, or a folder; default: qwen3, or tiny with --cpu")
    add("--layers", type=int, help="of a model that is named, instead of its own number")
    add("--load-format", default="dummy", help="of vLLM")
    add("--again", type=int, default=1, help="starts with caches (%(default)s)")
    add("--start-s", type=float, default=400.0, help="a server that takes longer failed")
    add("--limit-s", type=float, default=560.0, help="no start begins later")
    add("--cpu", action="store_true", help="on two cores with a tiny model")
    add("--logs", type=Path, help="keep the servers' logs here")
    add("--json", type=Path, help="write the results here")
    add("--more", nargs=argparse.REMAINDER, default=[], help="last: words for every `vllm serve`")
    args = parser.parse_args()
    texts = args.systems or (["replicas", "dwdp"] if args.cpu else ["dwdp", "dpep", "replicas", "tp"])
    try:
        check_numbers(args, zero=("again",))
        check_places(args, "json")
        args.systems = [parse_system(text) for text in texts]
        args.model = args.model or ("tiny" if args.cpu else "qwen3")
        check(args)
        check_devices(args.systems, len(devices_of(args.cpu)))
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    """Start, time, tell; 1 where a system did not start."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server goes with this program
    words = ["--load-format", args.load_format, "--max-model-len", "256", "--uvicorn-log-level", "warning"]
    words += ["--kv-cache-memory-bytes", str(64 << 20 if args.cpu else 3 << 30), "--gpu-memory-utilization", "0.1"]
    words += (["--enforce-eager"] if args.cpu else []) + args.more
    deadline, failed = time.monotonic() + args.limit_s, False
    found: dict[str, Any] = {
        "machine": machine(args.cpu), "model": args.model, "layers": args.layers, "command": command(),
        "versions": versions(), "seconds": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        logs = args.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        model = model_in(args.model, args.layers, Path(scratch))
        for system in args.systems:
            took: list[float] = []
            for number in range(1 + args.again):
                if time.monotonic() > deadline:
                    say(f"{system.name}: start {number} was not made: out of time")
                    break
                log = logs / f"start-{number}"
                log.mkdir(exist_ok=True)
                try:
                    took.append(start(system, model, words, args, Path(scratch) / system.name, log))
                except ServerFailed as error:
                    say(f"{system.name} failed: {error}")
                    failed = True
                    break
                say(f"{system.name}: up after {took[-1]:.1f} s, {'with' if number else 'without'} caches")
            found["seconds"][system.name] = [round(seconds, 1) for seconds in took]
            if args.json:
                args.json.write_text(as_text(found))
    for name, seconds in found["seconds"].items():
        told = " ".join(f"{each:>7.1f}" for each in seconds)
        print(f"{name:<14} {told}   s without caches, then with")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
