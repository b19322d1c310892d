"""An OpenAI-compatible server on ranks that share their experts, and a client that asks it.

    python examples/serve_and_ask.py [--model PATH] [--ranks 2]

Starts `vllm serve MODEL --distributed-executor-backend dwdp --data-parallel-size N`, asks for a completion, a chat, a
stream and one completion on every single rank, prints the `dwdp:` series of /metrics and stops the server.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from devices import dwdp_arguments
from openai import OpenAI

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
START_LIMIT_S = 600


def small_checkpoint() -> str:
    """Write a small random MoE checkpoint with a tokenizer, unless it is there, and return its folder."""
    here = Path(__file__).resolve().parent
    folder = here.parent / ".cache" / "examples" / "qwen3_moe"
    subprocess.run([sys.executable, "-m", "checkpoints", str(folder), "--experts", "16"], check=True, cwd=here)
    return str(folder)


def start(model: str, ranks: int, port: int) -> subprocess.Popen[bytes]:
    """`vllm serve` on two or more ranks."""
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--port", str(port)]
    command += dwdp_arguments(ranks)
    command += ["--served-model-name", "demo", "--max-model-len", "256", "--enforce-eager"]
    command += ["--uvicorn-log-level", "warning"]
    print("serve:", " ".join(command), flush=True)
    return subprocess.Popen(command)


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


def ask(url: str, ranks: int) -> None:
    """The usual calls; only the pinned ones know that there are ranks."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    done = client.completions.create(model="demo", prompt="No rank waits", max_tokens=16, temperature=0)
    print("completion:", repr(done.choices[0].text))

    messages = [{"role": "user", "content": "Who holds the experts?"}]
    chat = client.chat.completions.create(model="demo", messages=messages, max_tokens=16, temperature=0)
    print("chat:", repr(chat.choices[0].message.content))

    print("stream:", end=" ", flush=True)
    for part in client.chat.completions.create(
        model="demo", messages=messages, max_tokens=16, temperature=0, stream=True
    ):
        print(part.choices[0].delta.content or "", end="|", flush=True)
    print()

    for rank in range(ranks):
        pinned = client.completions.create(
            model="demo",
            prompt="No rank waits",
            max_tokens=16,
            temperature=0,
            extra_headers={"X-data-parallel-rank": str(rank)},
        )
        print(f"pinned to rank {rank}:", repr(pinned.choices[0].text))


def main() -> None:
    """Serve, ask, print the metrics, stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = start(args.model or small_checkpoint(), args.ranks, port)
    try:
        wait_for_health(server, url)
        ask(url, args.ranks)
        time.sleep(1.5)  # the series are updated once a second
        with urlopen(f"{url}/metrics") as reply:
            lines = reply.read().decode().splitlines()
        print("metrics:", *(line for line in lines if line.startswith("dwdp:")), sep="\n  ")
    finally:
        server.send_signal(signal.SIGINT)  # as Ctrl-C does
        started = time.monotonic()
        server.wait(60)
        print(f"server stopped after {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
