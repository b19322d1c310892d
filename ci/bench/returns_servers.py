"""Servers of returns.py: how each is started and waited for, and what of all of them is left in the end."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import ci.checks.chaos_positions as positions  # also where examples are found
from ci.bench.servers import SERVED, environment, healthy, read_log, trouble
from ci.bench.steady import KILLED
from ci.checks.soak_processes import segments, unused
from vllm_dwdp.doctor.smi import ask_smi

from servers import Server, Servers, free_ports  # isort: skip

#: MiB of a GPU that may be in use after all servers have ended and were not before they began.
DEVICE_MIB: Final = 64.0
_LEFT_LIMIT_S: Final = 20.0
_LOG_LINES: Final = 25


class NotUp(Exception):
    """A server ended, or did not answer in time: one line, then the end of its log."""


def say(text: str) -> None:
    """One line of progress, at once."""
    print(f"returns: {text}", flush=True)


def others(ranks: int) -> list[int]:
    """The ranks that are there all the time."""
    return [rank for rank in range(ranks) if rank != KILLED]


def words_of_all(args: argparse.Namespace) -> list[str]:
    """Of every `vllm serve`."""
    words = ["--max-model-len", str(args.load.longest + 8), "--max-num-batched-tokens", str(args.batched_tokens)]
    words += ["--no-enable-prefix-caching", "--uvicorn-log-level", "warning", "--api-server-count", "1"]
    # The utilisation is only looked at to see that so much is free.
    words += ["--kv-cache-memory-bytes", str(int(args.kv_gib * 2**30)), "--gpu-memory-utilization", "0.2"]
    return [*words, *["--enforce-eager"] * (args.cpu or args.eager), *args.more]


def serve(servers: Servers, name: str, model: Path, words: Sequence[str], port: int = 0) -> Server:
    """Start `vllm serve` at `port` or a free one; it sees all GPUs that this program sees."""
    port = port or free_ports(1)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port)]
    environ = environment({"TMPDIR": str(servers.folder), "VLLM_SERVER_DEV_MODE": "1"})
    return servers.start(name, port, [*command, "--served-model-name", SERVED, *words], environ)


def wait_up(server: Server, deadline: float) -> None:
    """Return once it answers. Raises NotUp."""
    while not healthy(server.url):
        code = server.process.poll()
        if code is not None or time.monotonic() > deadline:
            why = "was not up in time" if code is None else f"ended with {code}"
            end = server.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            raise NotUp("\n    ".join([f"{server.name} {why}: {trouble(server.log)}", *end]))
        time.sleep(0.1)


def told(server: Server) -> list[str]:
    """Lines of its log that are of dwdp."""
    return read_log(server.log.read_text(errors="replace")).dwdp


def device_mib() -> list[float]:
    """MiB in use on each GPU of this machine, as nvidia-smi says; empty where it says nothing."""
    smi = ask_smi()
    return [(gpu.total - gpu.free) / 2**20 for gpu in smi.gpus if gpu.total and gpu.free is not None] if smi else []


class Left:
    """What is there before servers start, to be compared with what is there after their end."""

    def __init__(self) -> None:
        self.segments, self.devices = segments(), device_mib()
        self.groups: list[int] = []

    def look(self) -> list[str]:
        """What is left of the servers whose process groups were noted; waits a while for it to go."""
        deadline = time.monotonic() + _LEFT_LIMIT_S
        while True:
            found = [f"process {pid}" for group in self.groups for pid in positions.members(group)]
            found += [f"segment {name}" for name in unused(segments() - self.segments)]
            found += more_in_use(self.devices, device_mib())
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.5)


def more_in_use(before: Sequence[float], after: Sequence[float], allowed: float = DEVICE_MIB) -> list[str]:
    """One line for each GPU of which more MiB are in use than before, by more than `allowed`."""
    pairs = enumerate(zip(before, after, strict=False))
    return [f"{late - early:.0f} MiB of GPU {n}" for n, (early, late) in pairs if late - early > allowed]
