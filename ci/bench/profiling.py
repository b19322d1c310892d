"""Turns of loads.py with vLLM's own profiler on, after those that are measured: what a step's time is made of.

The load is steady from before the profiler starts until all ranks have been asked to stop it. They write their traces then,
which takes them many seconds. Nothing of such a turn is a figure, and nothing that fails in it ends a run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from ci.bench.client import LoadFailed, steady
from ci.bench.load import Load, Request
from ci.bench.servers import Server
from ci.root import ROOT

if TYPE_CHECKING:
    from ci.bench.run import Bench

#: Of starting the profiler, and of stopping it: every rank writes its trace.
CALL_S: Final = 120.0
#: A load goes on for so long after ranks were asked to stop, unless they have written their traces.
AFTER_S: Final = 1.0
#: The most that --profile-s may be: every rank keeps what happens in that time, writes it, and all of it is read at once.
MOST_S: Final = 10.0
USUAL_S: Final = 0.5
#: Of reading all traces of a turn.
READ_S: Final = 120.0
#: A turn is not begun where less is left.
LEAST_S: Final = 30.0
#: vLLM takes so many characters of a name.
_PREFIX: Final = 100


class ProfileFailed(Exception):
    """A turn tells nothing. on: whether a profiler may still run, so that the server's later figures would be wrong."""

    def __init__(self, why: str, on: bool) -> None:
        super().__init__(why)
        self.on = on


def seconds(args: argparse.Namespace) -> float:
    """--profile-s of loads.py. Raises ValueError for words that do not go together."""
    given: float | None = args.profile_s
    if given is not None and not args.profile:
        raise ValueError(f"--profile-s {given:g}: it is for --profile")
    if given is not None and given > MOST_S:
        raise ValueError(f"--profile-s {given:g}: write at most {MOST_S:g}")
    if args.profile and any(word.startswith("--profiler-config") for word in args.more):
        raise ValueError("--profile with --profiler-config behind --more: both choose vLLM's profiler: leave one out")
    return USUAL_S if given is None else given


def words(folder: Path) -> list[str]:
    """Of every `vllm serve`; folder: of traces."""
    config = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder.absolute()),
        "torch_profiler_with_stack": False,
        "torch_profiler_record_shapes": False,
        "torch_profiler_with_flops": False,
        "torch_profiler_dump_cuda_time_total": False,
        "torch_profiler_use_gzip": True,
        "ignore_frontend": True,
    }
    return ["--profiler-config", json.dumps(config)]


def profile_load(
    bench: Bench, args: argparse.Namespace, load: Load, pool: list[Request], say: Callable[[str], None]
) -> None:
    """A turn of each server; bench.found["profile"] has what its ranks' traces say."""
    for name, server in list(bench.servers.items()):
        left = bench.deadline - time.monotonic()
        if left < LEAST_S:
            say(f"{load.name}: no profile of {name}: out of time")
            continue
        try:
            begun = time.monotonic()
            # Half for starting the profiler, half for stopping it.
            ranks = take(server, load, pool, args, min(CALL_S, left / 2))
        except ProfileFailed as error:
            say(f"{load.name}: no profile of {name}: {error}")
            if error.on:
                bench.drop(name, "its profiler may still run")
            continue
        bench.found["profile"].setdefault(load.name, {})[name] = ranks
        bench.write()
        say(f"{load.name}: {name} profiled in {time.monotonic() - begun:.0f} s, {len(ranks)} ranks")


def take(
    server: Server, load: Load, pool: list[Request], args: argparse.Namespace, limit_s: float
) -> list[dict[str, Any]]:
    """What profiled.summarise says of all ranks of a server; their traces go unless --logs keeps them.

    limit_s: of starting the profiler, and of stopping it. Raises ProfileFailed.
    """
    folder: Path = args.traces
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    try:
        try:
            asyncio.run(_under_load(server, load, pool, args, limit_s))
        except (LoadFailed, OSError, aiohttp.ClientError) as error:
            raise ProfileFailed(f"{type(error).__name__}: {error}", on=False) from None
        made = [each for each in folder.iterdir() if each not in before and ".pt.trace.json" in each.name]
        return read_apart(made)
    finally:
        if not args.logs:
            for each in set(folder.iterdir()) - before:
                each.unlink(missing_ok=True)


def read_apart(traces: Sequence[Path]) -> list[dict[str, Any]]:
    """profiled.summarise in a process of its own: a trace takes many times its size. Raises ProfileFailed."""
    if not traces:
        raise ProfileFailed("no rank wrote a trace", on=False)
    command = [sys.executable, "-m", "ci.bench.profiled", "--json", *map(str, traces)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=READ_S)
    except subprocess.TimeoutExpired:
        raise ProfileFailed(f"{len(traces)} traces were not read within {READ_S:.0f} s", on=False) from None
    if done.returncode:
        last = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
        raise ProfileFailed(f"{len(traces)} traces: {last}", on=False)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


async def _under_load(
    server: Server, load: Load, pool: list[Request], args: argparse.Namespace, limit_s: float
) -> None:
    stopping: list[asyncio.Task[list[str]]] = []
    load_failed = ""
    names = [prefix(load.name, server.system.name, number) for number in range(len(server.urls))]
    timeout = aiohttp.ClientTimeout(total=limit_s)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        try:
            async with steady(server.targets(pinned=load.uneven), load, pool, 0, args.answer_s):
                await asyncio.sleep(args.ramp_s)
                bodies = [{"profile_prefix": name} for name in names]
                started = await _ask(http, server.urls, "start_profile", bodies)
                if not any(started):
                    await asyncio.sleep(load.window(args.profile_s))
                # Also where it did not start everywhere, or did not say so in time.
                stopping.append(asyncio.create_task(_ask(http, server.urls, "stop_profile", [{} for _ in names])))
                await asyncio.wait(stopping, timeout=AFTER_S)
        except LoadFailed as error:
            if not stopping:
                raise
            load_failed = f"the load failed meanwhile: {error}"
        stopped = await stopping[0]
    # A status is an answer: that server's profiler is off.
    on = any(failed and not failed.startswith("status") for failed in stopped)
    if why := next(filter(None, [*started, *stopped, load_failed]), ""):
        raise ProfileFailed(why, on)


async def _ask(http: aiohttp.ClientSession, urls: list[str], what: str, bodies: list[dict[str, str]]) -> list[str]:
    """All at once; of each what was wrong, or nothing."""

    async def one(url: str, body: dict[str, str]) -> str:
        try:
            async with http.post(f"{url}/{what}", json=body) as answer:
                return (
                    "" if answer.status == 200 else f"status {answer.status} of /{what}: {(await answer.text())[:200]}"
                )
        except TimeoutError:
            return f"/{what} was not answered within {http.timeout.total or 0:.3g} s"
        except (OSError, aiohttp.ClientError) as error:
            return f"/{what}: {type(error).__name__}: {error}"

    return list(await asyncio.gather(*map(one, urls, bodies)))


def prefix(load: str, system: str, number: int) -> str:
    """Of names of traces, in the letters that vLLM takes; number: of the server's process."""
    text = re.sub(r"[^A-Za-z0-9._-]", "-", f"{load}-{system}").lstrip("._-") or "turn"
    return f"{text[:_PREFIX]}-{number}"
