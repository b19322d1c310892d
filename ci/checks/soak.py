"""Does a server grow? Many requests through `vllm serve`: `python -m ci.checks.soak [--plain] [--json FILE]`.

Two dwdp ranks, on the GPUs of this machine or on its CPU, or with `--plain` one engine of plain vLLM, get the same requests:
completions of 1 to 8 tokens, a quarter streamed, 3 % aborted by closing the connection, 2 % refused, 10 % pinned to a rank;
with `--long`, a fifth of the prompts has up to so many words, so that steps of few and of many tokens take turns. After
every `--part` requests all connections are closed and every process of the server is measured. A table says what each held
at the start (once the server was healthy), after the first part and at the end; of ranks also what their GPUs held. Before
the first request and after the last all experts are looked at as each rank's kernels see them.

Exit status 1: a request failed that should not, requests were not sent within `--limit-s`, something of the server was left
after its end, experts changed or differ between ranks, or something grew after the first part: a process by a descriptor or
a thread, or in private memory by more than `--memory-mib` per 1,000 requests, or what a GPU holds by more than 16 MiB.
With `--against PLAIN.json`, written by a run with `--plain`, what plain vLLM's process of that kind grew by is allowed for
in addition.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ci.checks.sessions import session
from ci.checks.soak_processes import Sample, sample, segments, unused
from ci.checks.soak_requests import Outcome, asks, send
from ci.checks.soak_results import MEMORY_MIB, growth, more_on_devices, table, too_much, write
from ci.checks.soak_worker import WORDS, ask_states
from ci.checks.visible import visible_gpus
from ci.root import ROOT
from examples.checkpoints import CheckpointSpec, write_checkpoint

CACHE = ROOT / ".cache" / "soak"
SPEC = CheckpointSpec(num_layers=2, max_position=32768)
MAX_MODEL_LEN = 256
#: Most tokens of one of soak_requests's words.
WORD_TOKENS = 4
#: Blocks of the KV cache, all of which the first 1,000 requests touch: before its first use a block takes no memory.
KV_BLOCKS = 128
START_LIMIT_S = 300
STOP_LIMIT_S = 60
#: From the last request on: the last sample, digests and the server's end.
END_S = 45.0
#: Temporary files that vLLM and torch keep on purpose.
CACHES = ("torchinductor", "torch_", "vllm_cache")


def say(text: str) -> None:
    """One line of progress, at once."""
    print(f"soak: {text}", flush=True)


def longest(args: argparse.Namespace) -> int:
    """Tokens of the longest request."""
    return MAX_MODEL_LEN + WORD_TOKENS * int(args.long)


def command(args: argparse.Namespace, port: int) -> list[str]:
    """`vllm serve` of the small model; on GPUs as it is by default, with graphs and torch.compile."""
    length = longest(args)
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(write_checkpoint(SPEC, CACHE))]
    words += ["--served-model-name", "soak", "--port", str(port), "--max-num-seqs", "32"]
    words += ["--num-gpu-blocks-override", str(KV_BLOCKS * -(-length // MAX_MODEL_LEN)), "--max-model-len", str(length)]
    words += ["--gpu-memory-utilization", "0.2", "--uvicorn-log-level", "warning"]
    words += [] if visible_gpus() else ["--enforce-eager"]
    if not args.plain:
        words += ["--distributed-executor-backend", "dwdp", "--data-parallel-size", str(args.ranks)]
        words += WORDS
        # All experts of the small model would fit on every GPU, and nothing would be pulled.
        words += ["--additional-config", json.dumps({"dwdp": {"experts_per_rank": "partition"}})]
    return words


class Server:
    """`vllm serve` in a session and with a temporary folder of its own."""

    def __init__(self, args: argparse.Namespace, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.shm_before = segments()
        self.temporary = Path(tempfile.mkdtemp(prefix="soak-"))
        self._ranks = 0 if args.plain else args.ranks
        env = {**os.environ, "TMPDIR": str(self.temporary), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        env["VLLM_SERVER_DEV_MODE"] = "1"  # for /collective_rpc
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # oneDNN keeps up to 1,024 kernels, one or more per shape of a batch: on CPU that alone is hundreds of MiB, which new
        # shapes would take long after the first 1,000 requests, with dwdp and without.
        env.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1")
        # Longer than clients keep a connection: a server that closes one which is just used again fails a request.
        env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "300"
        self._log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command(args, port), env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_for_health(self) -> None:
        """Return once it answers; raises RuntimeError with the end of its log."""
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    end = self._log.read_text()[-3000:]
                    raise RuntimeError(f"no server (exit {self.process.poll()}):\n{end}") from None
                time.sleep(0.5)

    def sample(self, requests: int) -> Sample:
        """See soak_processes; waits for closed connections to be seen first."""
        time.sleep(3)
        devices = {
            f"GPU of rank {n}": state["device_mib"] for n, state in self.states().items() if "device_mib" in state
        }
        return sample(self.process.pid, requests, self.shm_before, self.temporary, devices)

    def states(self, digests: bool = False) -> dict[int, dict[str, Any]]:
        """What soak_worker.py says of each rank; none of plain vLLM."""
        return ask_states(self.url, self._ranks, digests) if self._ranks else {}

    def stop(self) -> list[str]:
        """End it; what was left: processes by id, segments and temporary files by name."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            say(f"the server did not end within {STOP_LIMIT_S} s")
        time.sleep(2)
        left = [f"process {pid}" for pid in session(self.process.pid)]
        for pid in session(self.process.pid):
            os.kill(pid, signal.SIGKILL)
        left += unused(segments() - self.shm_before)
        left += sorted(name for name in os.listdir(self.temporary) if not name.startswith(CACHES))
        shutil.rmtree(self.temporary, ignore_errors=True)
        return left


def left_s(args: argparse.Namespace, took: float, since_s: float) -> float:
    """Seconds for which requests may still be sent, none below 0; they were for `took`. since_s: since the server's start,
    with all samples so far, by which --within-s goes. The first ones are sent in any case."""
    if args.within_s is None:
        return float(args.limit_s - took)
    return float(min(args.limit_s - took, max(args.within_s - END_S - since_s, 0.0 if took else 1.0)))


def run(server: Server, args: argparse.Namespace, outcome: Outcome) -> tuple[list[Sample], float, list[str]]:
    """Samples at the start and after every part, the seconds that requests took, and digests before and after, by rank."""
    began = time.monotonic()
    server.wait_for_health()
    digests = [state["digest"] for state in server.states(digests=True).values()]
    samples, took = [server.sample(0)], 0.0
    ranks, length = (1 if args.plain else args.ranks), longest(args)
    while took < args.seconds or samples[-1].requests < args.requests:
        if (left := left_s(args, took, time.monotonic() - began)) <= 0:
            break
        part = asks(args.part, "soak", length, seed=len(samples), long=args.long)
        started = time.monotonic()
        sent = asyncio.run(send(server.url, part, ranks, args.concurrency, left, outcome))
        took += time.monotonic() - started
        samples.append(server.sample(samples[-1].requests + sent))
        if args.json:
            write(args.json, samples, took, digests, outcome, unfinished=True)
        if not args.quiet:
            say(f"{samples[-1].requests} requests, {samples[-1].requests / took:.1f}/s, {len(outcome.wrong)} wrong")
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with {server.process.poll()}")
    digests += [state["digest"] for state in server.states(digests=True).values()]
    return samples, took, digests


def main() -> None:
    """Serve, send, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="at least so many (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0, help="and for at least so long")
    parser.add_argument("--part", type=int, default=1000, help="requests between two measurements (%(default)s)")
    parser.add_argument(
        "--long", type=int, default=0, help="a fifth of the prompts has up to so many words (default: all are short)"
    )
    parser.add_argument("--plain", action="store_true", help="plain vLLM, one engine")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--limit-s", type=float, default=3600, help="of sending requests")
    parser.add_argument("--within-s", type=float, help="send for as long as lets all of it end within so many seconds")
    parser.add_argument("--memory-mib", type=float, default=MEMORY_MIB, help="private memory per process and 1,000")
    parser.add_argument("--against", type=Path, help="JSON of a run with --plain")
    parser.add_argument("--json", type=Path, help="write the samples here")
    parser.add_argument("--quiet", action="store_true", help="no line per 1,000 requests")
    args = parser.parse_args()

    outcome = Outcome()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server goes with this script
    with tempfile.TemporaryDirectory(prefix="soak-log-") as folder:
        server = Server(args, Path(folder) / "serve.log")
        try:
            samples, took, digests = run(server, args, outcome)
        finally:
            left = server.stop()
    trouble = [f"wrong: {text}" for text in outcome.wrong[:10]]
    # Plain vLLM leaves the files of its sockets.
    trouble += [f"left behind: {name}" for name in left if not args.plain or name.startswith("process")]
    if samples[-1].requests < args.requests:
        trouble.append(f"{samples[-1].requests} of {args.requests} requests in {took:.0f} s")
    trouble += more_on_devices(samples)
    if len(set(digests)) > 1:
        trouble.append(f"experts changed, or differ between ranks: {' '.join(digests)}")
    plain: dict[str, Any] = json.loads(args.against.read_text())["growth"] if args.against else {}
    grown = growth(samples)
    trouble += too_much(grown, plain, args.memory_mib)
    if args.json:
        write(args.json, samples, took, digests, outcome, left=left)
    print(table(samples))
    say(f"{'plain vLLM' if args.plain else f'{args.ranks} dwdp ranks'}: {samples[-1].requests / took:.1f} requests/s")
    say(", ".join(f"{count} {kind}" for kind, count in sorted(outcome.done.items())) + f", {len(outcome.wrong)} wrong")
    for line in trouble:
        say(line)
    sys.exit(1 if trouble else 0)


if __name__ == "__main__":
    main()
