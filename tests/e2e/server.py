"""A real `vllm serve` process and an HTTP client for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.engines import (
    REPO,
    Leftovers,
    dwdp_settings,
    engine_options,
    environment,
    free_port,
    listen_to_ctrl_c,
    processes,
)

_SCRIPT = Path(sys.executable).parent / "vllm"
#: The command; where vLLM was unpacked and not installed, there is none.
VLLM = [str(_SCRIPT)] if _SCRIPT.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


@dataclass
class Server:
    """`vllm serve` in its own session; `model` is also its served name."""

    process: subprocess.Popen[bytes]
    port: int
    model: str
    log: Path
    before: Leftovers

    def url(self, path: str) -> str:
        """Address of an endpoint."""
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str) -> str:
        """Body of a GET."""
        with urllib.request.urlopen(self.url(path), timeout=30) as answer:
            return str(answer.read().decode())

    def post(self, path: str, body: dict[str, Any], rank: int | None = None, timeout_s: float = 60) -> Any:
        """JSON answer of a POST, pinned to `rank` if given; the raw text for streams."""
        headers = {"Content-Type": "application/json"}
        if rank is not None:
            headers["X-data-parallel-rank"] = str(rank)
        request = urllib.request.Request(self.url(path), json.dumps({"model": self.model, **body}).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read().decode()
        return text if body.get("stream") else json.loads(text)

    def complete(self, prompt: str, tokens: int = 8, rank: int | None = None, **more: Any) -> list[int]:
        """Greedy token ids of one completion."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return list(self.post("/v1/completions", {**body, **more}, rank)["choices"][0]["token_ids"])

    def metrics(self, prefix: str = "dwdp:") -> dict[str, float]:
        """Series that begin with `prefix`, by name and labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(prefix)]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def pids(self, name: str) -> list[int]:
        """Processes of this server whose title contains `name`."""
        return [int(line.split()[0]) for line in processes(self.process.pid) if name in line]

    def rank_pids(self, rank: int) -> list[int]:
        """A rank's engine, and its worker where that is a process of its own."""
        [engine] = self.pids(f"EngineCore_DP{rank}")
        return [engine, *(pid for pid in self.pids("VLLM::Worker") if _parent(pid) == engine)]

    def stop(self, sign: int = signal.SIGTERM, limit_s: float = 30, everywhere: bool = False) -> float:
        """Signal the front end, or every process of its session; seconds until the front end has ended."""
        started = time.monotonic()
        if self.process.poll() is None:
            if everywhere:
                os.killpg(self.process.pid, sign)
            else:
                self.process.send_signal(sign)
        self.process.wait(limit_s)
        return time.monotonic() - started

    def left(self) -> list[str]:
        """What stayed after the end."""
        return self.before.check(self.process.pid)

    def kill(self, sign: int = signal.SIGKILL) -> None:
        """End whatever is left of the session."""
        for line in processes(self.process.pid):
            try:
                os.kill(int(line.split()[0]), sign)
            except ProcessLookupError:
                continue


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def dwdp_arguments(ranks: int = 2, **config: Any) -> list[str]:
    """Words of `vllm serve` for a dwdp launch, on GPUs where there are some."""
    options: dict[str, Any] = {"distributed_executor_backend": "dwdp", "data_parallel_size": ranks, **engine_options()}
    words = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
    settings = dwdp_settings(ranks, **config)
    return words + (["--additional-config", json.dumps({"dwdp": settings})] if settings else [])


def start_server(folder: Path, model: Path | str, *arguments: str, env: dict[str, str] | None = None) -> Server:
    """Start a server and wait until it answers /health; raises AssertionError with its log.

    After 300 s every process of it is aborted, which has Python print where it stood.
    """
    port, log = free_port(), folder / f"serve-{time.monotonic_ns()}.log"
    before = Leftovers()
    command = [
        *VLLM,
        "serve",
        str(model),
        "--port",
        str(port),
        "--max-model-len",
        "512",
        "--gpu-memory-utilization",
        "0.2",
    ]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=REPO,
            env=environment(TMPDIR=str(before.tmp), **(env or {})),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=listen_to_ctrl_c,
        )
    server = Server(process, port, str(model), log, before)
    deadline = time.monotonic() + 300
    while True:
        try:
            server.get("/health")
            return server
        except (urllib.error.URLError, OSError):
            if (code := process.poll()) is not None or time.monotonic() > deadline:
                if code is None:
                    server.kill(signal.SIGABRT)
                    time.sleep(1)
                server.kill()
                raise AssertionError(f"no server (exit {code}):\n{log.read_text()[-20000:]}") from None
            time.sleep(0.5)
