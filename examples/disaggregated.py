"""Disaggregated prefill on this machine: DWDP ranks compute prompts, a plain vLLM decodes, vllm-router stands in front.

    python examples/disaggregated.py [--model PATH] [--ranks 2] [--keep]

Starts all three, asks one prompt at a time and compares the tokens with those of the plain vLLM alone, sends prompts of
uneven length at once, prints which rank computed how many, the bytes of KV cache that moved, TTFT and ITL, and stops
everything; with --keep at Ctrl-C. Needs the extra `disaggregated`. On CPU, or on GPUs: decode gets the first one that no
rank has, or shares one.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

from devices import SMALL_CACHE, as_arguments, count_gpus, dwdp_settings, engine_options
from servers import BIN, Server, Servers, free_ports, run_with_servers, series, small_checkpoint

START_LIMIT_S = 600
PROMPTS = [
    "The experts of a layer",
    "Every rank serves its own requests and",
    "A copy engine pulls the weights of the next layer while this one computes, so",
    "No rank waits",
    "Attention comes first, then",
    "Two slots are enough when",
]


class Plan(NamedTuple):
    """What is started: ranks of prefill, ranks of decode (1: a plain vLLM), weight view and more words of both."""

    model: str
    ranks: int = 2
    decode_ranks: int = 1
    view: str = "auto"
    words: tuple[str, ...] = ()


class Answer(NamedTuple):
    """Token ids, seconds to the first one, and the seconds between one and the next."""

    tokens: list[int]
    ttft: float
    gaps: list[float]


def say(text: str) -> None:
    """One line of progress, at once."""
    print(f"disaggregated: {text}", flush=True)


def devices_of(plan: Plan, decode: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Options and environment that say on what prefill, or decode, computes."""
    if not (gpus := count_gpus()):
        # Unbound, but on as many threads as a rank has: the same kernels in the same order, so the same tokens.
        from vllm_dwdp.engine.cores import physical_cores, split_cores

        threads = len(split_cores(physical_cores(), plan.ranks)[-1])
        unbound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)} if decode else {}
        return {}, {"UCX_TLS": "tcp,sm,self", **unbound}
    if gpus > plan.ranks and plan.decode_ranks == 1:
        theirs = [plan.ranks] if decode else range(plan.ranks)
        return engine_options(plan.ranks), {"CUDA_VISIBLE_DEVICES": ",".join(map(str, theirs))}
    return {**engine_options(plan.ranks), **SMALL_CACHE}, {}


def start_engines(servers: Servers, plan: Plan, decode: bool, port: int = 0) -> Server:
    """`vllm serve` for prefill or for decode, at `port` or a free one."""
    ranks = plan.decode_ranks if decode else plan.ranks
    options, environ = devices_of(plan, decode)
    options |= {"max_model_len": 1024, "served_model_name": "demo", "api_server_count": 1}
    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_consumer" if decode else "kv_producer"}
    options["kv_transfer_config"] = transfer if count_gpus() else {**transfer, "kv_buffer_device": "cpu"}
    if ranks > 1:
        options |= {"distributed_executor_backend": "dwdp", "data_parallel_size": ranks}
        options["additional_config"] = {"dwdp": {"weight_view": plan.view, **dwdp_settings(ranks)}}
    else:
        environ["TMPDIR"] = str(servers.folder)  # a plain vLLM leaves its sockets, and a file, where they are
    port = port or free_ports(1)
    # Rank i of a launch listens at this port + i.
    environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_ports(ranks))
    command = [str(BIN / "vllm"), "serve", plan.model, "--port", str(port), "--enforce-eager", *as_arguments(options)]
    command += plan.words
    return servers.start("decode" if decode else "prefill", port, command, environ)


def start_router(servers: Servers, prefill: Server, decode: Server) -> Server:
    """vllm-router, which asks each server for its ranks and takes them in turn."""
    port, metrics = free_ports(1), free_ports(1)
    command = [str(BIN / "vllm-router"), "--vllm-pd-disaggregation", "--kv-connector", "nixl", "--port", str(port)]
    command += ["--prefill", prefill.url, "--decode", decode.url, "--policy", "round_robin"]
    command += ["--prometheus-port", str(metrics), "--worker-startup-check-interval", "1"]
    # A server that comes back gets requests again within seconds.
    command += ["--health-check-interval-secs", "2", "--cb-timeout-duration-secs", "5"]
    return servers.start("router", port, command, {})


def ask(url: str, prompt: str, tokens: int, **more: Any) -> Answer:
    """Stream one greedy completion."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True, **more}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    ids: list[int] = []
    times = [time.perf_counter()]
    with urlopen(request, timeout=120) as reply:
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            if "choices" not in (part := json.loads(line[6:])):
                raise SystemExit(f"the stream ended with {part.get('error', part)}")
            if new := part["choices"][0].get("token_ids"):
                ids += new
                times.append(time.perf_counter())
    if len(ids) != tokens:
        raise SystemExit(f"{len(ids)} of {tokens} tokens came for {prompt[:40]!r}")
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    return Answer(ids, gaps[0], gaps[1:])


def alone(decode: Server, prompt: str, tokens: int) -> Answer:
    """The same of the decoding engine without prefill. The salt hides the blocks that came from there."""
    return ask(decode.url, prompt, tokens, cache_salt="alone")


def latency(answers: Sequence[Answer]) -> str:
    """Medians of TTFT and ITL."""
    ttft = statistics.median(answer.ttft for answer in answers)
    itl = statistics.median(gap for answer in answers for gap in answer.gaps)
    return f"TTFT {ttft * 1e3:.0f} ms, ITL {itl * 1e3:.1f} ms"


def compare(prefill: Server, decode: Server, router: Server, plan: Plan, tokens: int) -> bool:
    """Ask one at a time, then many at once; whether each request has the tokens of the decoding engine alone."""
    through = [ask(router.url, prompt, tokens) for prompt in PROMPTS]
    expected = [alone(decode, prompt, tokens) for prompt in PROMPTS]
    same = sum(a.tokens == b.tokens for a, b in zip(through, expected, strict=True))
    say(f"{same} of {len(PROMPTS)} requests have the tokens of {'plain vLLM' if plan.decode_ranks == 1 else 'decode'}")
    say(f"  one at a time: {latency(through)}; without prefill elsewhere: {latency(expected)}")
    load = [f"{i}: " + " ".join(PROMPTS) * (1 + i % 4) for i in range(8 * plan.ranks)]
    pool = ThreadPoolExecutor(4 * plan.ranks)
    try:
        loaded = list(pool.map(lambda prompt: ask(router.url, prompt, tokens), load))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits for no answer
    say(f"  {len(load)} prompts of uneven length, {4 * plan.ranks} at a time: {latency(loaded)}")
    time.sleep(1.5)  # the series are updated once a second
    for rank in range(plan.ranks):
        of_rank = f'engine="{rank}"'
        done, length = (series(prefill, f"vllm:{name}_total", of_rank) for name in ("request_success", "prompt_tokens"))
        say(f"  prefill rank {rank}: {done:.0f} prompts, {length:.0f} tokens")
    transfers, moved = (series(decode, f"vllm:nixl_bytes_transferred_{what}") for what in ("count", "sum"))
    say(f"  KV cache moved: {moved / 1e6:.2f} MB in {transfers:.0f} transfers")
    if transfers < len(PROMPTS) + len(load):
        raise SystemExit(
            f"only {transfers:.0f} of {len(PROMPTS) + len(load)} requests took their KV cache from prefill"
        )
    return same == len(PROMPTS)


def run(servers: Servers, args: argparse.Namespace) -> int:
    """Start, compare; 0 where all tokens are the same."""
    if args.ranks < 2:
        raise SystemExit(f"--ranks {args.ranks}: DWDP takes 2 or more")
    plan = Plan(args.model or small_checkpoint(), args.ranks, args.decode_ranks, args.view)
    say(f"starting prefill (DWDP, {plan.ranks} ranks) and decode; logs in {servers.folder}")
    began = time.monotonic()
    prefill, decode = (start_engines(servers, plan, decode) for decode in (False, True))
    servers.wait(START_LIMIT_S)
    router = start_router(servers, prefill, decode)
    servers.wait(60)
    say(f"up after {time.monotonic() - began:.0f} s: router {router.url}, prefill {prefill.url}, decode {decode.url}")
    same = compare(prefill, decode, router, plan, args.tokens)
    if args.keep:
        say("all stay up until Ctrl-C")
        signal.pause()
    return 0 if same else 1


def main() -> int:
    """Run with servers that are stopped however it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--decode-ranks", type=int, default=1, help="2 or more: decode with DWDP too")
    parser.add_argument("--view", default="auto", help="weight_view of DWDP's ranks")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--keep", action="store_true", help="stay up until Ctrl-C")
    args = parser.parse_args()
    if importlib.util.find_spec("nixl") is None or not (BIN / "vllm-router").exists():
        raise SystemExit("disaggregated: nixl or vllm-router is missing: pip install '.[disaggregated]' in this folder")
    return run_with_servers("disaggregated", functools.partial(run, args=args))


if __name__ == "__main__":
    sys.exit(main())
