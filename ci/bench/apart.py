"""Prefill apart from decode in loads.py: every system is a pool of prefill with a router of its own; all share one decode.

    client -- vllm-router of a system --1-- the system, on the first devices: prompts
                                     \\--2-- one vLLM, on the others, the same for all systems: the tokens that follow

So what differs between two systems in a turn is how prompts are computed. KV caches move by vLLM's NixlConnector.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ci.bench.servers import Server, ServerFailed, System, Target, environment, healthy, trouble

#: Seconds that prefill keeps a KV cache that nobody fetches, as of requests that a turn gave up at its end.
LEASE_S: Final = 5
ROUTER: Final = Path(sys.executable).parent / "vllm-router"
#: A router answers as soon as both its servers do.
ROUTER_S: Final = 60.0
_given: Final[set[int]] = set()


def transfer(role: str, cpu: bool) -> list[str]:
    """The words of `vllm serve` for a side; role: kv_producer or kv_consumer."""
    config = {"kv_connector": "NixlConnector", "kv_role": role}
    config |= {"kv_connector_extra_config": {"kv_lease_duration": LEASE_S}}
    return ["--kv-transfer-config", json.dumps({**config, "kv_buffer_device": "cpu"} if cpu else config)]


def side_channel(ranks: int, cpu: bool, decode: bool = False) -> Callable[[int], dict[str, str]]:
    """Environment of a side, by number of process; its ranks listen at ports in a row."""
    first = _free_ports(ranks)
    more = {"UCX_TLS": "tcp,sm,self"} if cpu else {}
    if cpu and decode:
        # NIXL's threads poll: bound to the core of a rank, they would starve it.
        more |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return lambda number: {**more, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(first + number)}


class Decode(Server):
    """What all systems share; devices: those that no prefill has."""

    def __init__(self, system: System, model: Path, common: list[str], devices: list[str], cpu: bool, logs: Path):
        words = [*common, *transfer("kv_consumer", cpu)]
        more = side_channel(len(devices), cpu, decode=True)
        super().__init__(system._replace(name=f"decode-{system.name}"), model, words, devices, cpu, logs, more)


class Prefill(Server):
    """A system that computes prompts, and the router through which it is asked."""

    def __init__(
        self, system: System, model: Path, common: list[str], devices: list[str], cpu: bool, logs: Path, decode: str
    ):
        """decode: URL of it."""
        words = [*common, *transfer("kv_producer", cpu)]
        super().__init__(system, model, words, devices, cpu, logs, side_channel(len(devices), cpu))
        self._decode, self._log = decode, logs / f"{system.name}-router.log"
        self._router = ""

    def wait(self, deadline: float) -> None:
        """See Server; then the router is started, and waited for."""
        super().wait(deadline)
        port, metrics = _free_ports(1), _free_ports(1)
        words = [str(ROUTER), "--vllm-pd-disaggregation", "--kv-connector", "nixl"]
        words += ["--port", str(port), "--prometheus-port", str(metrics), "--policy", "round_robin"]
        words += ["--decode", self._decode, "--worker-startup-check-interval", "1", "--disable-retries"]
        for url in self._urls:
            words += ["--prefill", url]
        with self._log.open("w") as stream:
            stream.write(f"{' '.join(words)}\n")
            stream.flush()
            router = subprocess.Popen(
                words, env=environment({}), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._processes.append(router)
        self._router = f"http://127.0.0.1:{port}"
        limit = time.monotonic() + ROUTER_S
        while not healthy(self._router):
            if router.poll() is not None or time.monotonic() > limit:
                raise ServerFailed(f"the router of {self.system.name} did not come up: {trouble(self._log)}")
            time.sleep(0.2)

    def targets(self, pinned: bool) -> list[Target]:
        """The router, which takes the ranks in turn."""
        return [Target(self._router, {})]


def split(devices: Sequence[str], prefill: int, cpu: bool) -> tuple[list[str], list[str]]:
    """Devices of prefill and of decode, the same where prefill has all; raises ValueError where one side has none."""
    if cpu:
        return list(devices), list(devices[:1])
    if not 0 < prefill <= len(devices):
        raise ValueError(f"--prefill-devices {prefill}: there are {len(devices)} devices; write 1 to {len(devices)}")
    return list(devices[:prefill]), list(devices[prefill:] or devices)


def check(system: System, devices: Sequence[str], prefill: int, cpu: bool) -> None:
    """Raise ValueError where `system` cannot decode for all, or nothing could take requests to it."""
    _, theirs = split(devices, prefill, cpu)
    if system.kind == "replicas" and len(theirs) > 1:
        raise ValueError(
            f"--decode {system.kind}: {len(theirs)} servers, but one decodes for all systems; use tp, dpep or dwdp"
        )
    if not ROUTER.is_file():
        raise ValueError(
            f"--decode: there is no {ROUTER}, which takes requests to both sides: pip install '.[disaggregated]'"
        )


def _free_ports(count: int) -> int:
    """The first of so many ports in a row at which nobody listens, and which no call has returned.

    Systems that start side by side listen later.
    """
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = int(probe.getsockname()[1])
        ports = range(first, first + count)
        if not _given.isdisjoint(ports):
            continue
        try:
            for port in ports:
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            continue
        _given.update(ports)
        return first
    raise ServerFailed(f"there are no {count} free ports in a row")
