"""DWDP beside vLLM's own ways under load: real `vllm serve` processes, one client. `python -m ci.bench.loads --json FILE`.

    dpep        data parallel attention with expert parallelism, vLLM's default all-to-all
    dptp        data parallel ranks of two devices each, tensor parallel within, experts spread over all; from 4 devices on
    dwdp        this project, `dwdp:NAME:{"experts_per_rank": 112}` for settings of its own
    tp, tpep    tensor parallel, and with expert parallelism
    replicas    a server of its own on each device, an equal part of the requests each

Ratios are to dpep; where it is not among the systems, to dptp, else to replicas, else to tp.

At most three systems are up side by side on the same devices and are measured in turns, in changing order, the others being
idle. Every load is warmed up on every system first. A turn is a steady load, measured for at least --turn-s seconds; ratios
compare what two systems did in one turn. Results are written after each load, so that a run that is cut off still says
something. With --cpu: a tiny model on two cores, to try the program; figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch

from ci.bench import apart, profiling, tiles
from ci.bench.load import SHAPE, Load, parse_loads
from ci.bench.models import MODELS, model_in
from ci.bench.results import slower_bases
from ci.bench.run import Bench, say
from ci.bench.servers import ServerFailed, check_devices, parse_system, parse_systems
from ci.bench.words import check_numbers, check_places
from ci.report.loads_picture import draw
from vllm_dwdp.errors import DwdpError

#: In order of value; what does not fit into --limit-s is left out.
LOADS = (
    "prefill8k=8192/1/16 apart8k=8192/1/16,spread=0.8 mixed=8192/128/16 decode8=512/128/8 decode1=512/128/1 "
    "uneven=8192/1/16,every=2,uneven bursts=8192/1/16,every=3,burst,spread=0.8 short=2048/256/16 decode64=512/256/64 "
    "prefill2k=2048/1/32 prefill16k=16384/1/8"
)
CPU_LOADS = "decode1=64/32/1 mixed=256/16/4"
SYSTEMS = ["dpep", 'dwdp:dwdp64:{"experts_per_rank": 64}', 'dwdp:dwdp112:{"experts_per_rank": 112}']
CPU_SYSTEMS = ["replicas", 'dwdp:contiguous:{"weight_view": "contiguous"}', 'dwdp:inplace:{"weight_view": "inplace"}']


def devices_of(cpu: bool) -> list[str]:
    """Two cores, or the GPUs that this process sees."""
    if cpu:
        return [str(core) for core in sorted(os.sched_getaffinity(0))[:2]]
    from ci.checks.visible import visible_gpus

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(visible_gpus())]


def check(args: argparse.Namespace) -> None:
    """Of loads.py and starts.py: raises ValueError where no server could come up."""
    if args.model not in MODELS and not (Path(args.model) / "config.json").is_file():
        raise ValueError(f"--model {args.model}: write {', '.join(MODELS)}, or a folder with a config.json")
    if not devices_of(args.cpu):
        raise ValueError("there is no GPU here: --cpu tries this on two cores")


def common_words(args: argparse.Namespace, loads: list[Load]) -> list[str]:
    """Of every `vllm serve`."""
    length = max(load.longest for load in loads) + 8
    words = ["--load-format", args.load_format, "--max-model-len", str(length), "--no-enable-prefix-caching"]
    words += ["--max-num-batched-tokens", str(args.batched_tokens), "--uvicorn-log-level", "warning"]
    words += ["--kv-cache-memory-bytes", str(int(args.kv_gib * 2**30))]
    # Only looked at to see that so much is free.
    words += ["--gpu-memory-utilization", "0.1"]
    words += profiling.words(args.traces) if args.profile else []
    return words + (["--enforce-eager"] if args.cpu else []) + args.more


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--systems", nargs="+", metavar="KIND[:NAME[:JSON]]", help=f"at most three; default: {' '.join(SYSTEMS)}")
    add("--loads", nargs="+", metavar="NAME=IN/OUT/AT_A_TIME[,...]", help=f"{SHAPE}; default: {LOADS}")
    add(
        "--decode",
        metavar="KIND[:NAME[:JSON]]",
        help="systems compute prompts only, this one, on the other devices, decodes for all (see apart.py)",
    )
    add("--prefill-devices", type=int, help="with --decode, on GPUs: the first so many (2); all: shared")
    add("--model", default="", help=f"{', '.join(MODELS)}, or a folder; default: qwen3")
    add("--layers", type=int, help="of a model that is named, instead of its own number")
    add("--load-format", default="dummy", help="of vLLM; weights are made by the servers unless this says otherwise")
    add("--kv-gib", type=float, default=3.0, help="KV cache of an engine and device")
    add("--batched-tokens", type=int, default=16384, help="tokens of a step")
    add(
        "--spread",
        type=float,
        default=0.2,
        help="lengths differ by this part of the mean, unless a load says (%(default)s)",
    )
    add("--temperature", type=float, default=0.0)
    add("--turns", type=int, default=5, help="of each load on each system (%(default)s)")
    add("--turn-s", type=float, default=5.0, help="seconds measured in a turn")
    add("--least-turn-s", type=float, default=5.0, help="a turn may be this short where time is short (%(default)s)")
    add("--ramp-s", type=float, default=0.5, help="after every client's first token, before it is measured")
    add("--limit-s", type=float, default=560.0, help="of everything; loads that do not fit are left out")
    add("--start-s", type=float, default=240.0, help="a server that takes longer is left out")
    add("--answer-s", type=float, default=60.0, help="a system that gives no token for so long is left out")
    add("--one-by-one", action="store_true", help="start servers one after the other")
    add(
        "--vllm-bench",
        action="store_true",
        help="after each load without times of its own: the same by vllm bench serve",
    )
    add("--profile", action="store_true", help="after each load, what a step's time is made of: a turn with a profiler")
    add(
        "--profile-s", type=float, help=f"of such a turn, at most {profiling.MOST_S:g} (default: {profiling.USUAL_S:g})"
    )
    add(
        "--tiles",
        choices=("shipped", "alike"),
        default="shipped",
        help="shipped: those that vLLM and DWDP ship; alike: DWDP's for all systems",
    )
    add("--cpu", action="store_true", help="try this on two cores with a tiny model")
    add("--logs", type=Path, help="keep the servers' logs here, and traces of --profile")
    add(
        "--json",
        type=Path,
        help="write the results here; beside it a picture of ratios, and one (-ttft) of loads with times of their own",
    )
    add("--go", type=Path, help="once servers are up, wait for this file: other benches measure on these devices first")
    add("--earlier", type=Path, help="results of an earlier run: is the base as fast as it was?")
    add("--more", nargs=argparse.REMAINDER, default=[], help="last: words for every `vllm serve`")
    args = parser.parse_args()
    try:
        check_numbers(args, zero=("ramp_s", "temperature", "spread"))
        if args.spread >= 1:
            raise ValueError(f"--spread {args.spread:g}: write less than 1, since lengths are more than 0")
        args.profile_s = profiling.seconds(args)
        check_places(args, "json", "go")
        if args.earlier is not None and not args.earlier.is_file():
            raise ValueError(f"--earlier {args.earlier}: there is no such file: name what --json has written")
        args.systems = parse_systems(args.systems or (CPU_SYSTEMS if args.cpu else SYSTEMS))
        args.loads = parse_loads(args.loads or (CPU_LOADS if args.cpu else LOADS).split(), args.spread)
        args.model = args.model or ("tiny" if args.cpu else "qwen3")
        check(args)
        if args.prefill_devices is not None and (args.cpu or args.decode is None):
            why = "on CPU both sides share the cores" if args.cpu else "it is for --decode"
            raise ValueError(f"--prefill-devices {args.prefill_devices}: {why}: leave it out")
        args.prefill_devices = args.prefill_devices or 2
        for system in args.systems:
            if args.cpu and system.kind in ("dpep", "dptp"):
                raise ValueError(f"system {system.kind}: does not run on CPU; replicas does")
        args.decode = None if args.decode is None else parse_system(args.decode)
        mine = devices_of(args.cpu)
        if args.decode:
            apart.check(args.decode, mine, args.prefill_devices, args.cpu)
            mine, theirs = apart.split(mine, args.prefill_devices, args.cpu)
            check_devices([args.decode], len(theirs))
        check_devices(args.systems, len(mine))
    except ValueError as error:
        parser.error(str(error))
    if args.cpu and args.tiles == "alike":
        parser.error("--tiles alike: on CPU there are no tiles")
    if args.cpu:
        args.kv_gib, args.batched_tokens = min(args.kv_gib, 0.0625), min(args.batched_tokens, 1024)
        args.one_by_one, args.start_s = True, 2 * args.start_s
    return args


def main() -> int:
    """Serve, measure, tell; 1 where a system failed or nothing was measured."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers go with this program
    bench = Bench(args)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        logs = args.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        args.traces = logs / "traces"
        model = model_in(args.model, args.layers, Path(scratch))
        if args.tiles == "alike":
            try:
                where = tiles.write(model, torch.device("cuda"), len(devices_of(args.cpu)), Path(scratch) / "tiles")
            except ValueError as error:
                raise SystemExit(f"bench: {error}") from None
            os.environ["VLLM_TUNED_CONFIG_FOLDER"] = str(where)
        try:
            bench.start(model, common_words(args, args.loads), devices_of(args.cpu), logs)
            if args.go:
                bench.hold(args.go)
            bench.run(model)
            bench.tell()
        except ServerFailed as error:
            raise SystemExit(f"bench: {error}") from None
        finally:
            bench.stop()
    if args.earlier and bench.found["base"]:
        earlier = json.loads(args.earlier.read_text())["summary"]
        for line in slower_bases(bench.found["summary"], earlier, bench.found["base"]):
            say(line)
    if args.json:
        say(f"results in {args.json}")
        try:
            for picture in draw(args.json, args.json.with_suffix(".png")):
                say(f"picture in {picture}")
        except DwdpError as error:
            say(f"no picture: {error}")
    return int(bool(bench.failed) or not bench.found["summary"])


if __name__ == "__main__":
    sys.exit(main())
