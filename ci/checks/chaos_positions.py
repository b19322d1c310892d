"""The servers of the chaos check: each at a position and its port, whatever becomes of it there."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from ci.checks.soak_processes import COLUMNS, measure, names_of
from ci.root import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from servers import BIN, Server, Servers
from steady_load import MODEL

#: Part of a server -> the name that soak_processes gives its process.
PARTS = {"front end": "front end", "engine": "engine 0", "worker": "worker 0"}
#: Seconds in which a server ends once it was told to, or one of its processes was killed.
END_LIMIT_S = 90.0
#: Below it are ports that programs are known for.
_QUIET_FROM = 20000
START_LIMIT_S = 400.0
#: A life is measured from here on, when all shapes of batches were seen, and compared if it lasted as long again.
SETTLED_S = 30.0
#: Growth of private memory of a process that is level: heaps that are used by more requests at once than before.
MEMORY_MIB = 24.0
MEMORY_MIB_PER_MINUTE = 2.0
#: Connections that a front end holds differ with the load.
DESCRIPTORS = {"front end": 24.0}

State = Literal["down", "starting", "up", "stopped", "ending"]


class Group(NamedTuple):
    """What all ranks share."""

    model: str
    ranks: int
    meet: Path

    def words(self, rank: int) -> list[str]:
        """Of `vllm serve`."""
        settings = {"group": "chaos", "rank": rank, "ranks": self.ranks, "meet": str(self.meet), "timeout_s": 300}
        return ["--distributed-executor-backend", "dwdp", "--additional-config", json.dumps({"dwdp": settings})]


def serve(servers: Servers, model: str, name: str, port: int, words: list[str], cores: str = "") -> Server:
    """`vllm serve` with few blocks of the KV cache, all of which are soon in use, so that memory is level from then on."""
    command = [str(BIN / "vllm"), "serve", model, "--port", str(port), "--served-model-name", MODEL, "--enforce-eager"]
    command += [
        "--dtype",
        "float32",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "16",
        "--num-gpu-blocks-override",
        "128",
    ]
    command += ["--api-server-count", "1", "--shutdown-timeout", "30", *words]
    environ = {"TMPDIR": str(servers.folder), "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1", "PYTHONPATH": str(ROOT)}
    return servers.start(name, port, command, environ | ({"VLLM_CPU_OMP_THREADS_BIND": cores} if cores else {}))


def quiet_ports(count: int) -> int:
    """The first of `count` free ports in a row that the kernel gives to no connection: servers come back to their own.

    Drawn, so that two programs that look for some at a time do not take those of servers which are down just then.
    """
    given_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    places = range(_QUIET_FROM, given_from - count + 1, count)
    for first in random.SystemRandom().sample(places, len(places)):
        with contextlib.ExitStack() as taken, contextlib.suppress(OSError):
            for port in range(first, first + count):
                taken.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise SystemExit(f"there are no {count} free ports in a row below {given_from}")


def members(group: int) -> list[int]:
    """Live processes of a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, of = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if int(of) == group and state != "Z":
                found.append(int(folder.name))
    return found


@dataclass
class Position:
    """What a server holds that is one rank, and who is there. `seen`: figures of its processes, first and last, by name."""

    rank: int
    port: int
    state: State = "down"
    lives: int = 0
    since: float = 0.0
    until: float = 0.0
    server: Server | None = None
    seen: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    seen_since: float = 0.0
    measured_s: float = 0.0

    @property
    def url(self) -> str:
        """Of whoever is there."""
        return f"http://127.0.0.1:{self.port}"

    def become(self, state: State, lasts_s: float = 0.0) -> None:
        """Note what it is from now on, and how long at most."""
        self.state, self.since = state, time.monotonic()
        self.until = self.since + lasts_s

    def start(self, servers: Servers, group: Group) -> None:
        """Begin its next life."""
        self.lives += 1
        name = f"rank-{self.rank}-life-{self.lives}"
        self.server = serve(servers, group.model, name, self.port, group.words(self.rank))
        self.seen, self.measured_s = {}, 0.0
        self.become("starting", START_LIMIT_S)

    def pids(self) -> dict[str, int]:
        """Name -> process, as far as they are there."""
        assert self.server is not None
        try:
            front_end = psutil.Process(self.server.process.pid)
            return names_of([front_end, *front_end.children(recursive=True)])
        except psutil.NoSuchProcess:
            return {}

    def parts(self) -> list[str]:
        """What can get a signal now: "all", and parts that are there; a server that starts has no worker yet."""
        there = self.pids()
        return ["all", *(part for part, name in PARTS.items() if name in there)]

    def signal(self, part: str, sign: signal.Signals) -> None:
        """Send a signal to a part of the server, or to "all" parts.

        Python's process that takes names of shared memory away is none: it goes on in vLLM's place.
        """
        names = PARTS.values() if part == "all" else [PARTS[part]]
        for name, pid in self.pids().items():
            with contextlib.suppress(ProcessLookupError):
                if name in names:
                    os.kill(pid, sign)

    def has_ended(self) -> bool:
        """Whether no process of the server is left."""
        assert self.server is not None
        return self.server.process.poll() is not None and not members(self.server.process.pid)

    def way(self) -> str:
        """How it came by its experts: adopted, or read from the checkpoint; empty where it has none yet."""
        assert self.server is not None
        lines = [line for line in self.server.log.read_text(errors="replace").splitlines() if ": experts " in line]
        return lines[-1].split(": experts ", 1)[1].partition(", in")[0] if lines else ""

    def measure(self) -> None:
        """Once a life is settled."""
        now = time.monotonic()
        if self.state != "up" or now - self.since < SETTLED_S:
            return
        if not self.seen:
            self.seen_since = now
        for name, pid in self.pids().items():
            with contextlib.suppress(OSError, KeyError):
                self.seen.setdefault(name, [])[1:] = [measure(pid)]
        self.measured_s = now - self.seen_since

    def grown(self) -> list[str]:
        """One line per figure that was not level in this life; empty where it was too short to tell."""
        if self.measured_s < SETTLED_S:
            return []
        lines = []
        for name, (first, *more) in self.seen.items():
            bounds = {"private": MEMORY_MIB + MEMORY_MIB_PER_MINUTE * self.measured_s / 60}
            bounds |= {"descriptors": DESCRIPTORS.get(name, 0.0), "threads": 0.0}
            for column, bound in bounds.items() if more else ():
                if (growth := more[0][column] - first[column]) > bound:
                    lines.append(
                        f"rank {self.rank} (life {self.lives}), {name}: {column} grew by {growth:.1f} in "
                        f"{self.measured_s:.0f} s, more than {bound:.1f}"
                    )
        return lines

    def figures(self) -> list[str]:
        """Lines of a table: what its processes grew by."""
        lines = []
        for name, (first, *more) in self.seen.items():
            if more:
                told = ", ".join(
                    f"{column} {first[column]:.0f} to {more[0][column]:.0f}"
                    for column in COLUMNS
                    if column in ("private", "descriptors", "threads")
                )
                lines.append(f"rank {self.rank} (life {self.lives}), {name}, {self.measured_s:.0f} s: {told}")
        return lines
