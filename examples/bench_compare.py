"""`vllm bench serve` against plain vLLM on one rank, then against DWDP, in one run; prints both and their ratios.

    python examples/bench_compare.py [--model PATH] [--ranks 2] [--input-len 256] [--output-len 16]

On CPU both servers may use all cores: plain vLLM computes on all of them at once, DWDP gives every rank its part. On GPUs
plain vLLM has one, and DWDP one per rank, as far as there are that many. The small random checkpoint that is used without
--model shows that it runs; its figures mean little.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from devices import as_arguments, dwdp_arguments, engine_options

VLLM = str(Path(sys.executable).with_name("vllm"))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
START_LIMIT_S = 600
#: Key of `vllm bench serve`'s result, its name here, and whether more is better.
FIGURES = (
    ("output_throughput", "output tokens/s", True),
    ("total_token_throughput", "all tokens/s", True),
    ("median_ttft_ms", "median TTFT ms", False),
    ("median_tpot_ms", "median TPOT ms", False),
)


def small_checkpoint() -> str:
    """Write a small random MoE checkpoint with a tokenizer, unless it is there, and return its folder."""
    here = Path(__file__).resolve().parent
    folder = here.parent / ".cache" / "examples" / "qwen3_moe"
    subprocess.run([sys.executable, "-m", "checkpoints", str(folder), "--experts", "16"], check=True, cwd=here)
    return str(folder)


def wait_for_health(server: subprocess.Popen[bytes], url: str) -> None:
    """Return once the server answers; stop with an error if it ends or takes too long."""
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            urlopen(f"{url}/health", timeout=5).close()
            return
        except (URLError, OSError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server is not there (exit status {server.poll()})") from None
            time.sleep(1)


def measure(model: str, args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    """Start a server with `options`, send it the load, stop it; returns the result of `vllm bench serve`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [VLLM, "serve", model, "--port", str(port), "--max-model-len", "1024", "--uvicorn-log-level", "warning"]
    server = subprocess.Popen([*command, "--enforce-eager", "--no-enable-prefix-caching", *options])
    try:
        wait_for_health(server, url)
        with tempfile.TemporaryDirectory() as folder:
            load = [VLLM, "bench", "serve", "--model", model, "--base-url", url, "--dataset-name", "random"]
            load += ["--random-input-len", str(args.input_len), "--random-output-len", str(args.output_len)]
            load += ["--num-prompts", str(args.requests), "--max-concurrency", str(args.concurrency), "--ignore-eos"]
            load += ["--num-warmups", str(args.concurrency), "--save-result", "--result-dir", folder]
            load += ["--result-filename", "result.json", "--disable-tqdm"]
            subprocess.run(load, check=True, stdout=subprocess.DEVNULL)
            return dict(json.loads((Path(folder) / "result.json").read_text()))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def main() -> None:
    """Measure both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=8)
    args = parser.parse_args()

    model = args.model or small_checkpoint()
    print("compare: plain vLLM, one rank", flush=True)
    plain = measure(model, args, as_arguments(engine_options(args.ranks)))
    print(f"compare: DWDP, {args.ranks} ranks", flush=True)
    dwdp = measure(model, args, dwdp_arguments(args.ranks))
    print(f"\n{'':<18}{'plain':>10}{'dwdp':>10}{'dwdp is':>16}")
    for key, name, more in FIGURES:
        ratio = dwdp[key] / plain[key] if more else plain[key] / dwdp[key]
        print(f"{name:<18}{plain[key]:>10.1f}{dwdp[key]:>10.1f}{f'{ratio:.2f} x as good':>16}")
    print(f"{'failed requests':<18}{plain['failed']:>10}{dwdp['failed']:>10}")
    if args.model is None:
        print("(a model this small takes as long to schedule as to compute: this says that it runs, not how fast)")


if __name__ == "__main__":
    main()
