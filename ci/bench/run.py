"""A run of loads.py: servers side by side, turns, and what is told of them."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from ci.bench.apart import Decode, Prefill, split
from ci.bench.client import LoadFailed, different, turn
from ci.bench.counted import Counted, lines
from ci.bench.load import Load, Request, requests
from ci.bench.models import vocabulary
from ci.bench.profiled_table import table as profile_table
from ci.bench.profiling import profile_load
from ci.bench.results import Turns, as_text, order, settled, summary, table, turn_length
from ci.bench.servers import Server, ServerFailed, System, base_of
from ci.bench.vllm_bench import tokens_per_s

WARM_UPS = 6
WARM_UP_S = 2.0
#: Of a turn besides what is measured: its ramp, and the last request of the window.
TURN_MORE_S = 2.0
#: Of one `vllm bench serve`.
VLLM_BENCH_S = 60.0
#: That a bench waits for its turn.
GO_S = 3600.0
#: Of ending all servers.
STOP_S = 20.0


def say(text: str) -> None:
    """One line of progress, at once."""
    print(f"bench: {text}", flush=True)


def await_go(go: Path, tell: Callable[[str], None]) -> float:
    """Wait for this file: several benches may start their servers at once, and measure in turn. Returns how many seconds.

    Raises TimeoutError, in one line.
    """
    tell(f"waits for {go}")
    begun = time.monotonic()
    while not go.exists():
        if time.monotonic() - begun > GO_S:
            raise TimeoutError(f"--go {go}: nobody made it for {GO_S:.0f} s; make it once it is this bench's turn")
        time.sleep(0.5)
    return time.monotonic() - begun


class Bench:
    """Servers that are up, and what was measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        """args: of loads.py."""
        self._args = args
        self._loads: list[Load] = args.loads
        systems: list[System] = args.systems
        self._kinds = {system.name: system.kind for system in systems}
        self.deadline = time.monotonic() + args.limit_s - STOP_S
        self.servers: dict[str, Server] = {}
        self._counted: dict[str, Counted] = {}
        self._decode: Decode | None = None
        self.turns: Turns = {}
        self.failed: dict[str, str] = {}
        self.found: dict[str, Any] = {
            "machine": machine(args.cpu),
            "model": f"{args.model}{f', {args.layers} layers' if args.layers else ''}",
            "command": command(),
            "versions": versions(),
            "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("VLLM_", "NCCL_", "TORCH"))},
            "systems": [system._asdict() for system in systems],
            "decode": args.decode._asdict() if args.decode else None,
            "loads": [load._asdict() for load in self._loads],
            "base": base_of(systems),
            "starts": {},
            "different": {},
            "vllm_bench": {},
            "profile": {},
        }

    def start(self, model: Path, common: list[str], devices: list[str], logs: Path) -> None:
        """All at once, or one after the other; those that fail are left out."""
        begun = time.monotonic()
        make: Callable[..., Server] = Server
        if self._args.decode:
            devices, theirs = split(devices, self._args.prefill_devices, self._args.cpu)
            self._decode = Decode(self._args.decode, model, common, theirs, self._args.cpu, logs)
            make = partial(Prefill, decode=self._decode.url)
            if self._args.one_by_one:
                self._decode.wait(self.deadline)
        for system in self._args.systems:
            self.servers[system.name] = make(system, model, common, devices, self._args.cpu, logs)
            if self._args.one_by_one:
                self._await(system.name, time.monotonic())
        if not self._args.one_by_one:
            if self._decode:
                self._decode.wait(min(begun + self._args.start_s, self.deadline))
            for system in self._args.systems:
                self._await(system.name, begun)

    def _await(self, name: str, begun: float) -> None:
        try:
            self.servers[name].wait(min(begun + self._args.start_s, self.deadline))
        except ServerFailed as error:
            self.drop(name, str(error))
            return
        facts, seconds = self.servers[name].facts(), time.monotonic() - begun
        # Servers that start at once are waited for in turn, which tells no time of their own.
        own = {"seconds": round(seconds, 1)} if self._args.one_by_one else {}
        self.found["starts"][name] = {**own, "kv_tokens": facts.kv_tokens, "engines": facts.engines}
        if self._kinds[name] == "dwdp":
            self._counted[name] = Counted(self.servers[name].url)
        say(f"{name} is up after {seconds:.0f} s; KV cache: {facts.kv_tokens} tokens in {facts.engines} engines")

    def stop(self) -> None:
        """End all servers."""
        end = time.monotonic() + STOP_S
        servers = [*self.servers.values(), *([self._decode] if self._decode else [])]
        for server in servers:
            server.leave()
        for server in servers:
            server.stop(max(1.0, end - time.monotonic()))

    def drop(self, name: str, why: str) -> None:
        """Go on without a system."""
        say(f"{name} failed: {why}")
        self.failed[name] = why
        self._counted.pop(name, None)
        self.servers.pop(name).stop()

    def hold(self, go: Path) -> None:
        """See await_go; none of the time that is waited counts. Raises ServerFailed."""
        try:
            self.deadline += await_go(go, say)
        except TimeoutError as error:
            raise ServerFailed(str(error)) from None

    def run(self, model: Path) -> None:
        """All loads, one after the other; what was found is written after each."""
        for load in self._loads if self.servers else []:
            least = 2 * (WARM_UP_S + TURN_MORE_S) + self._args.least_turn_s + TURN_MORE_S
            if time.monotonic() + len(self.servers) * least > self.deadline:
                say(f"{load.name} was not run: out of time")
                continue
            pool = requests(load, vocabulary(model), self._args.temperature)
            self._measure(load, pool)
            self.write()
            if self._args.profile:
                profile_load(self, self._args, load, pool, say)
            if self._args.vllm_bench and not load.every:
                self._compare(load, model)

    def _measure(self, load: Load, pool: list[Request]) -> None:
        """Warm-ups and all turns of a load, as far as the time left allows."""
        rows = self.turns[load.name] = {name: [] for name in self.servers}
        for name in list(self.servers):
            self._attempt(name, self._warm_up, load, pool)
        left = [one for one in self._loads if one.name not in self.turns] + [load]
        length = turn_length(
            self.deadline - time.monotonic(), len(left), max(1, len(self.servers)), self._args.turns,
            self._args.turn_s, self._args.least_turn_s, TURN_MORE_S,
        )  # fmt: skip
        for number in range(self._args.turns):
            if time.monotonic() + len(self.servers) * (load.window(length) + TURN_MORE_S) > self.deadline:
                say(f"{load.name}: {number} of {self._args.turns} turns: out of time")
                break
            for name in order(list(self.servers), number):
                if counted := self._counted.get(name):
                    counted.next()
                found = self._attempt(name, self._turn, load, pool, number, length)
                if found is not None:
                    rows[name].append({"turn": number, **found})
                    if counted:
                        counted.keep(rows[name][-1])
        for counted in self._counted.values():
            counted.next()
        # A turn that not all systems had is compared with nothing.
        for name in self.failed:
            rows.pop(name, None)
        whole = min((len(mine) for mine in rows.values()), default=0)
        self.turns[load.name] = {name: mine[:whole] for name, mine in rows.items()}

    def _compare(self, load: Load, model: Path) -> None:
        """What `vllm bench serve` says of the same load; a system that it fails with goes on."""
        for name, mine in summary(self.turns, None).get(load.name, {}).items():
            if time.monotonic() + VLLM_BENCH_S > self.deadline:
                say(f"{load.name}: no vllm bench serve of {name}: out of time")
                continue
            rate, url = mine["tokens_per_s"], self.servers[name].targets(pinned=False)[0].url
            try:
                told = tokens_per_s(load, url, model, rate, VLLM_BENCH_S)
            except ServerFailed as error:
                say(f"{load.name}: {name}: {error}")
                continue
            self.found["vllm_bench"].setdefault(load.name, {})[name] = told
            say(
                f"{load.name}: {name} {told:.0f} tokens/s in vllm bench serve, {told / rate:.3f} of what was measured here"
            )

    def _turn(self, name: str, load: Load, pool: list[Request], number: int, length: float) -> dict[str, Any]:
        server, limit_s = self.servers[name], min(self._args.answer_s, max(5.0, self.deadline - time.monotonic()))
        first = number * load.concurrency
        targets, begun = server.targets(pinned=load.uneven), time.monotonic()
        found = asyncio.run(turn(targets, load, pool, first, self._args.ramp_s, length, limit_s))
        self._worked(name, begun)
        middle = f", TTFT {statistics.median(found.ttft_s) * 1e3:.0f} ms" if load.every and found.ttft_s else ""
        say(f"{load.name}: {name} {found.tokens_per_s:.0f} tokens/s in {found.seconds:.1f} s{middle}")
        time.sleep(0.3)  # what was still in flight is given up
        return found._asdict()

    def _warm_up(self, name: str, load: Load, pool: list[Request]) -> None:
        rates: list[float] = []
        # Requests at fixed times have a rate of their own: two rounds are enough.
        most = 2 if load.every else WARM_UPS
        while len(rates) < most and not settled(rates) and time.monotonic() < self.deadline:
            rates.append(self._turn(name, load, pool, len(rates), WARM_UP_S)["tokens_per_s"])
        if not load.every and not settled(rates):
            say(f"{load.name}: {name} has not settled in {len(rates)} warm-ups")
        if load.output > 1 and load.concurrency > 1:
            begun = time.monotonic()
            part = asyncio.run(different(self.servers[name].targets(pinned=False), load, pool, self._args.answer_s))
            self._worked(name, begun)
            self.found["different"].setdefault(load.name, {})[name] = part

    def _worked(self, name: str, begun: float) -> None:
        if counted := self._counted.get(name):
            counted.worked(time.monotonic() - begun)

    def _attempt(self, name: str, do: Any, *words: Any) -> Any:
        """None, and on without the system, where it fails."""
        if name not in self.servers:
            return None
        try:
            return do(name, *words)
        except (LoadFailed, TimeoutError, OSError, aiohttp.ClientError) as error:
            self.drop(name, f"{type(error).__name__}: {error}; {self.servers[name].trouble()}")
            return None

    def write(self) -> None:
        """Everything so far."""
        rows = {load: systems for load, systems in self.turns.items() if any(systems.values())}
        measured = {name for systems in rows.values() for name, mine in systems.items() if mine}
        # One that never came up is nothing to compare with.
        self.found["base"] = base_of(system for system in self._args.systems if system.name in measured)
        self.found |= {"failed": self.failed, "turns": rows, "summary": summary(rows, self.found["base"])}
        if self._args.json:
            scratch = self._args.json.with_suffix(".tmp")
            scratch.write_text(as_text(self.found))
            scratch.rename(self._args.json)

    def tell(self) -> None:
        """What the logs say, and the table."""
        for name, server in self.servers.items():
            facts = server.facts()
            self.found["starts"][name] |= {"tiles": facts.tiles, "dwdp": facts.dwdp}
            print(
                f"\n{name}: KV cache {facts.kv_tokens} tokens; MoE tiles of vLLM: {' | '.join(facts.tiles) or 'none told'}"
            )
            print("".join(f"  {line}\n" for line in facts.dwdp[:40]), end="")
        self.write()
        for load, parts in self.found["different"].items():
            print(f"{load}: tokens that differ between requests: {', '.join(f'{n} {p:.0%}' for n, p in parts.items())}")
        print(f"\n{table(self.found['summary'], self.found['base'])}", flush=True)
        engines = {name: start["engines"] for name, start in self.found["starts"].items()}
        print("".join(f"{line}\n" for line in lines(self.found["summary"], engines)), end="")
        print(profile_table(self.found["profile"]), end="", flush=True)


def command() -> list[str]:
    """The one that runs, as it is typed in the repository's root."""
    return ["python", "-m", f"ci.bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]


def machine(cpu: bool) -> str:
    """Names of the devices."""
    if cpu:
        return f"CPU, {platform.machine()}"
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{len(names)} x {names[0]}" if names else "no GPU"


def versions() -> dict[str, str]:
    """Of what matters for speed."""
    import torch
    import vllm

    return {"python": platform.python_version(), "torch": torch.__version__, "vllm": vllm.__version__}
