"""Servers of loads.py: real `vllm serve` processes of the systems that are compared, and their end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from ci.checks.sessions import session
from ci.root import ROOT
from vllm_dwdp.config import DwdpConfig

KINDS: Final = ("dwdp", "dpep", "dptp", "tp", "tpep", "replicas")
#: The first of these that is there is what the others are compared with.
BASES: Final = ("dpep", "dptp", "replicas", "tp")
#: Devices of a data parallel rank of dptp.
DPTP_WIDTH: Final = 2
#: The name under which all of them serve the model.
SERVED: Final = "bench"
_KV: Final = re.compile(r"KV cache size: ([\d,]+) tokens")
_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
_DWDP: Final = re.compile(r"dwdp(?: rank \d+(?: stops)?)?: .*")


class System(NamedTuple):
    """One of KINDS. dwdp: additional_config["dwdp"] of that kind."""

    kind: str
    name: str
    dwdp: dict[str, Any]


class Target(NamedTuple):
    """Where requests go: a server, or with `headers` one of its ranks."""

    url: str
    headers: dict[str, str]


class LogFacts(NamedTuple):
    """What a server's log says. kv_tokens: sum over its engines, with how many told. tiles: vLLM's lines on MoE tiles."""

    kv_tokens: int
    engines: int
    tiles: list[str]
    dwdp: list[str]


def parse_system(text: str) -> System:
    """'dpep', 'dptp', 'tp', 'tpep', 'replicas' or 'dwdp[:NAME[:JSON]]'; raises ValueError in one line."""
    kind, _, rest = text.partition(":")
    name, _, settings = rest.partition(":")
    if kind not in KINDS:
        raise ValueError(f"system {text!r}: its kind is one of {', '.join(KINDS)}")
    if rest and kind != "dwdp":
        raise ValueError(f"system {text!r}: only dwdp takes a name and settings")
    try:
        dwdp = json.loads(settings) if settings else {}
    except ValueError as error:
        raise ValueError(f"system {text!r}: its settings are no JSON: {error}") from None
    if not isinstance(dwdp, dict):
        raise ValueError(f"system {text!r}: its settings are no JSON object")
    DwdpConfig.parse(dwdp)
    return System(kind, name or kind, dwdp)


def parse_systems(texts: Iterable[str]) -> list[System]:
    """At most three, with different names, one of BASES among them; raises ValueError in one line."""
    systems = [parse_system(text) for text in texts]
    names = [system.name for system in systems]
    if len(set(names)) < len(names):
        raise ValueError(f"systems {', '.join(names)}: give each its own name")
    if len(systems) > 3:
        raise ValueError(f"{len(systems)} systems: at most three share the devices in one run")
    if not any(system.kind in BASES for system in systems):
        raise ValueError(f"systems {', '.join(names)}: add {' or '.join(BASES)}, which ratios are to")
    return systems


def base_of(systems: Iterable[System]) -> str | None:
    """The name of the system that ratios are to; None where none of BASES is there."""
    found = {system.kind: system.name for system in systems}
    return next((found[kind] for kind in BASES if kind in found), None)


def check_devices(systems: Iterable[System], devices: int) -> None:
    """Raise ValueError where a system cannot be spread over so many devices."""
    if (devices < 2 * DPTP_WIDTH or devices % DPTP_WIDTH) and any(system.kind == "dptp" for system in systems):
        raise ValueError(
            f"system dptp: it takes 4 devices or any larger even number, and has {devices}: leave it out, or change that"
        )


def read_log(text: str) -> LogFacts:
    """What is told of KV tokens, tiles and dwdp."""
    text = _ANSI.sub("", text)
    tokens = [int(found.replace(",", "")) for found in _KV.findall(text)]
    lines = text.splitlines()
    tiles = dict.fromkeys(
        re.sub(r"/\S*/", "", line[line.index(word) :])
        for line in lines
        for word in ("Using default MoE config", "Using configuration from")
        if word in line
    )
    dwdp = dict.fromkeys(found[0] for line in lines if (found := _DWDP.search(line)))
    return LogFacts(sum(tokens), len(tokens), list(tiles), list(dwdp))


def words_of(system: System, devices: int) -> list[str]:
    """What distinguishes its `vllm serve`; replicas: of each one."""
    if system.kind in ("tp", "tpep"):
        return ["--tensor-parallel-size", str(devices), *["--enable-expert-parallel"] * (system.kind == "tpep")]
    if system.kind == "replicas":
        return []
    words = ["--data-parallel-size", str(ranks_of(system, devices))]
    if system.kind == "dptp":
        words += ["--tensor-parallel-size", str(DPTP_WIDTH)]
    if system.kind in ("dpep", "dptp"):
        return [*words, "--enable-expert-parallel"]
    words += ["--distributed-executor-backend", "dwdp"]
    return words + (["--additional-config", json.dumps({"dwdp": system.dwdp})] if system.dwdp else [])


def ranks_of(system: System, devices: int) -> int:
    """Data parallel ranks in one of its processes: what X-data-parallel-rank chooses from."""
    return {"dwdp": devices, "dpep": devices, "dptp": devices // DPTP_WIDTH}.get(system.kind, 1)


def places_of(system: System, devices: list[str], cpu: bool) -> list[dict[str, str]]:
    """The environment of each of its processes: which devices it sees. devices: names of GPUs, or of cores."""
    if cpu:
        if system.kind == "replicas":
            return [{"VLLM_CPU_OMP_THREADS_BIND": core} for core in devices]
        return [{"VLLM_CPU_OMP_THREADS_BIND": "|".join(devices)}]
    if system.kind == "replicas":
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in devices]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(devices)}]


def environment(place: dict[str, str]) -> dict[str, str]:
    """Of one server process. vLLM opens the NCCL that torch brought, see site/sitecustomize.py."""
    # What the logs say is read.
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO", **place}
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB only, and stronger than --kv-cache-memory-bytes
    ours = [str(ROOT / "ci" / "bench" / "site"), str(ROOT)]
    env["PYTHONPATH"] = os.pathsep.join([*ours, *filter(None, [env.get("PYTHONPATH")])])
    try:
        nccl = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        nccl = None
    for folder in (nccl and nccl.submodule_search_locations) or []:
        library = Path(folder) / "lib" / "libnccl.so.2"
        if library.exists():
            env.setdefault("VLLM_NCCL_SO_PATH", str(library))
    return env


class ServerFailed(Exception):
    """A server ended, or did not answer in time; with the end of its log."""


class Server:
    """All processes of one system."""

    def __init__(
        self,
        system: System,
        model: Path,
        common: list[str],
        devices: list[str],
        cpu: bool,
        logs: Path,
        more: Callable[[int], dict[str, str]] = lambda number: {},
    ):
        """Returns before they are up. common: words that all systems have. more: environment, by number of process."""
        self.system = system
        self._urls: list[str] = []
        self._ranks = ranks_of(system, len(devices))
        self._logs: list[Path] = []
        self._segments: set[Path] = set()
        self._processes: list[subprocess.Popen[bytes]] = []
        for number, place in enumerate(places_of(system, devices, cpu)):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port)]
            words += ["--served-model-name", SERVED, *common, *words_of(system, len(devices))]
            log = logs / f"{system.name}-{number}.log"
            with log.open("w") as stream:
                stream.write(f"{' '.join(words)}\n")
                stream.flush()
                process = subprocess.Popen(
                    words,
                    env=environment({**place, **more(number)}),
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._urls.append(f"http://127.0.0.1:{port}")
            self._logs.append(log)
            self._processes.append(process)

    def targets(self, pinned: bool) -> list[Target]:
        """Its processes; pinned: its ranks, where it has such in one process."""
        if pinned and self._ranks > 1:
            return [Target(self._urls[0], {"X-data-parallel-rank": str(rank)}) for rank in range(self._ranks)]
        return [Target(url, {}) for url in self._urls]

    @property
    def url(self) -> str:
        """Of its first process; the only one but of replicas."""
        return self._urls[0]

    @property
    def urls(self) -> list[str]:
        """Of all its processes."""
        return list(self._urls)

    def wait(self, deadline: float) -> None:
        """Return once all answer; deadline: of time.monotonic. Raises ServerFailed."""
        for url, process, log in zip(self._urls, self._processes, self._logs, strict=True):
            while not healthy(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    why = f"ended with {process.poll()}" if process.poll() is not None else "was not up in time"
                    raise ServerFailed(f"{self.system.name} {why}: {trouble(log)}")
                time.sleep(0.5)

    def facts(self) -> LogFacts:
        """Of all its logs together."""
        return read_log("\n".join(log.read_text(errors="replace") for log in self._logs))

    def trouble(self) -> str:
        """What the logs say of errors."""
        return " / ".join(trouble(log) for log in self._logs)

    def leave(self) -> None:
        """Ask all to end; returns at once."""
        for process in self._processes:
            if process.poll() is None:
                # vLLM's tensor parallelism leaves its segments behind.
                self._segments.update(*map(_segments, session(process.pid)))
                process.send_signal(signal.SIGTERM)

    def stop(self, limit_s: float = 20) -> None:
        """End all, and everything that they started, by force after `limit_s`."""
        self.leave()
        deadline = time.monotonic() + limit_s
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            end = time.monotonic() + 10
            while (left := session(process.pid)) and time.monotonic() < end:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.poll()
                time.sleep(0.1)
            process.poll()
        for segment in self._segments:
            segment.unlink(missing_ok=True)


def _segments(pid: int) -> set[Path]:
    """Shared memory under /dev/shm that a process maps."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {Path(line[line.index("/dev/shm/") :]) for line in lines if "/dev/shm/" in line and "(deleted)" not in line}


def healthy(url: str) -> bool:
    """Whether a server answers."""
    try:
        urllib.request.urlopen(f"{url}/health", timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def trouble(log: Path) -> str:
    """Its first errors, in one line."""
    text = _ANSI.sub("", log.read_text(errors="replace"))
    lines = [line for line in text.splitlines() if "Error" in line and "WARNING" not in line]
    return f"{' | '.join(lines[:3])[:700] or 'no error'} ({log})"
