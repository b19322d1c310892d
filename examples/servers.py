"""Several servers of one example: started together, waited for, stopped together, and nothing left of them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

BIN = Path(sys.executable).parent
STOP_LIMIT_S = 30
TIDY_LIMIT_S = 5
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Server:
    """A process, in a process group of its own, that answers at `url` once it is up."""

    name: str
    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def last_error(self) -> str:
        """The last line of its log that tells an error, else the last one."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return ([*lines, *(line for line in lines if "Error" in line)] or ["it said nothing"])[-1]

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            urlopen(f"{self.url}/health", timeout=5).close()
        except (URLError, OSError):
            return False
        return True


@dataclass
class Servers:
    """Servers that write their logs into `folder`; `stop` ends them all."""

    folder: Path
    started: list[Server] = field(default_factory=list)

    def start(self, name: str, port: int, command: Sequence[str], environ: Mapping[str, str]) -> Server:
        """Start a command that will answer at `port`.

        Not in a session of its own: Linux shares the cores out between sessions, and servers that poll starve the others.
        It logs what vLLM does by default, however quiet the shell: programs read how a rank came by its experts.
        """
        log = self.folder / f"{name}.log"
        # A signal between the start and the note of it would leave the process behind.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with log.open("a") as stream:
                process = subprocess.Popen(
                    command,
                    env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **environ},
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                    preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS),
                )
            self.started.append(server := Server(name, f"http://127.0.0.1:{port}", log, process))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return server

    def wait(self, limit_s: float) -> None:
        """Return once all answer; raises SystemExit, in one line, where one ends or takes too long."""
        deadline = time.monotonic() + limit_s
        while True:
            for server in self.started:
                if (code := server.process.poll()) is not None:
                    raise SystemExit(f"{server.name} ended with {code}: {server.last_error()}")
            late = [server for server in self.started if not server.is_up()]
            if not late:
                return
            if time.monotonic() > deadline:
                raise SystemExit(f"{late[0].name} did not answer within {limit_s:.0f} s: {late[0].last_error()}")
            time.sleep(0.5)

    def stop(self, *which: Server, sign: signal.Signals = signal.SIGTERM) -> None:
        """End these servers, or all: asked first, killed with their children after STOP_LIMIT_S. Signals wait so long."""
        ending = list(which or reversed(self.started))
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for server in ending:
                if server.process.poll() is None:
                    server.process.send_signal(sign)
            deadline = time.monotonic() + STOP_LIMIT_S
            for server in ending:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.process.wait(max(0.1, deadline - time.monotonic()))
                if server.process.poll() is None:
                    server.process.kill()
                    server.process.wait()
                _end_group(server.process.pid)
                self.started.remove(server)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def strike(self, server: Server) -> None:
        """SIGKILL to all processes of a server at once, as where memory runs out; one of Python's, which takes away names
        of shared memory, is left to do so. `stop` has still to be called."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                group = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[2])
                if group == server.process.pid and b"resource_tracker" not in (folder / "cmdline").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)

    def kill(self, server: Server) -> None:
        """`strike`, and wait until nothing is left."""
        self.strike(server)
        self.stop(server)


def _end_group(group: int) -> None:
    """Children of a process that ended: some only tidy up for a moment, those of a killed one are killed after that."""
    deadline = time.monotonic() + TIDY_LIMIT_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)


def series(server: Server, name: str, label: str = "") -> float:
    """The sum of a metric over its labels, or over those that contain `label`."""
    with urlopen(f"{server.url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0] == name and label in line)


def free_ports(count: int) -> int:
    """The first of `count` ports in a row at which nobody listens now."""
    for _ in range(100):
        with contextlib.ExitStack() as taken, contextlib.suppress(OSError, OverflowError):
            first = int(taken.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1])
            for more in range(1, count):
                taken.enter_context(socket.create_server(("127.0.0.1", first + more)))
            return first
    raise SystemExit(f"there are no {count} free ports in a row")


def small_checkpoint() -> str:
    """Write a small random MoE checkpoint with a tokenizer, unless it is there, and return its folder."""
    here = Path(__file__).resolve().parent
    folder = here.parent / ".cache" / "examples" / "qwen3_moe"
    subprocess.run([sys.executable, "-m", "checkpoints", str(folder), "--experts", "16"], check=True, cwd=here)
    return str(folder)


def run_with_servers(name: str, run: Callable[[Servers], int]) -> int:
    """What an example called `name` does with servers, which are stopped however it ends; raises SystemExit in one line."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    def end(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    for sign in SIGNALS:
        signal.signal(sign, end)
    with tempfile.TemporaryDirectory(prefix=f"dwdp-{name.replace('_', '-')}-") as folder:
        servers = Servers(Path(folder))
        try:
            return run(servers)
        except (SystemExit, OSError) as error:
            # The code of a signal, or one line.
            code = error.code if isinstance(error, SystemExit) else str(error)
            raise SystemExit(f"{name}: {code}" if isinstance(code, str) else code) from None
        finally:
            count = len(servers.started)
            servers.stop()
            if count:  # else `run` has stopped them itself
                print(f"{name}: {count} servers stopped", flush=True)
