"""The part of returns.py that is plain vLLM's: one data parallel launch with expert parallelism, of which an engine is
killed under load."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from ci.bench.load import Request
from ci.bench.returns_servers import Left, others, say, serve, wait_up, words_of_all
from ci.bench.servers import Target
from ci.bench.steady import KILLED, Asked, Steady, part
from ci.checks.soak_processes import names_of

from servers import Servers  # isort: skip

#: After the kill, how long it is watched; most of that after it has ended is not waited for.
WATCH_S: Final = 20.0


class Plain:
    """`vllm serve --data-parallel-size N --enable-expert-parallel`."""

    def __init__(self, servers: Servers, model: Path, args: argparse.Namespace, left: Left) -> None:
        """Starts it; returns before it is up."""
        self._servers, self._args, self._began = servers, args, time.monotonic()
        words = ["--data-parallel-size", str(args.ranks), "--enable-expert-parallel"]
        self.server = serve(servers, "plain", model, [*words_of_all(args), *words])
        left.groups.append(self.server.process.pid)
        self.found: dict[str, Any] = {}

    def wait(self) -> None:
        """Return once it answers. Raises NotUp."""
        wait_up(self.server, self._began + self._args.start_s)
        # It was started beside others, and waited for after them.
        self.found["up_after_at_most_s"] = round(time.monotonic() - self._began, 1)

    def tell(self, pool: Sequence[Request]) -> None:
        """Load on all ranks, SIGKILL to the engine of one, and what becomes of the others' requests."""
        engine = engine_of(self.server.process.pid, KILLED)
        clients, limit_s = self._args.load.concurrency, self._args.answer_s
        targets = [Target(self.server.url, {"X-data-parallel-rank": str(rank)}) for rank in range(self._args.ranks)]
        with contextlib.ExitStack() as stack:
            loads = [stack.enter_context(Steady(target, pool, clients, limit_s)) for target in targets]
            time.sleep(self._args.settle_s)
            begin = time.monotonic()
            time.sleep(self._args.part_s)
            kill = time.monotonic()
            os.kill(engine, signal.SIGKILL)
            say(f"plain vLLM: SIGKILL to the engine of rank {KILLED}")
            unhealthy, ended = self._watch(kill)
            end = time.monotonic()
        asked = [load.asked for load in loads]
        self.found |= {
            "before": [part(of_rank, begin, kill)._asdict() for of_rank in asked],
            "after": [part(of_rank, kill, end)._asdict() for of_rank in asked],
            "unhealthy_after_s": unhealthy,
            "ended_after_s": ended,
            "exit": self.server.process.poll(),
            "others": {f"rank {rank}": fate(asked[rank], kill) for rank in others(len(asked))},
            "trouble": [load.troubles(kill)[:5] for load in loads],
        }

    def _watch(self, kill: float) -> tuple[float | None, float | None]:
        """Seconds after the kill at which /health was bad, and at which the server ended; None where it did not."""
        unhealthy: float | None = None
        while time.monotonic() < kill + WATCH_S:
            if unhealthy is None and not _is_well(self.server.url):
                unhealthy = round(time.monotonic() - kill, 2)
            if self.server.process.poll() is not None:
                ended = round(time.monotonic() - kill, 2)
                time.sleep(1.0)  # clients see it too
                return unhealthy, ended
            time.sleep(0.05)
        return unhealthy, None


def engine_of(front_end: int, number: int) -> int:
    """The process of a server's engine; raises ValueError, naming those that are there."""
    process = psutil.Process(front_end)
    names = names_of([process, *process.children(recursive=True)])
    if (name := f"engine {number}") not in names:
        raise ValueError(f"plain vLLM has no {name} that could be killed, but {', '.join(names)}")
    return names[name]


def fate(asked: Sequence[Asked], kill: float) -> dict[str, Any]:
    """What became of another rank's requests: of those on their way at the kill, and of later ones; the last answer."""
    under_way = [each for each in asked if each.began <= kill < each.ended]
    later = [each for each in asked if each.began > kill]
    answers = [each.ended for each in asked if not each.trouble and each.ended > kill]
    failures = [each.ended for each in asked if each.trouble and each.ended > kill]
    return {
        "under_way": len(under_way),
        "under_way_failed": sum(bool(each.trouble) for each in under_way),
        "later": len(later),
        "later_failed": sum(bool(each.trouble) for each in later),
        "last_answer_s": round(max(answers) - kill, 2) if answers else None,
        "first_failure_s": round(min(failures) - kill, 2) if failures else None,
    }


def table(found: dict[str, Any]) -> list[str]:
    """Lines on it."""
    rates = ", ".join(f"{row['tokens_per_s']:.0f}" for row in found["before"])
    after = {True: "never within the time that it was watched", False: "after {} s"}
    health, end = (after[value is None].format(value) for value in (found["unhealthy_after_s"], found["ended_after_s"]))
    ranks = len(found["before"])
    return [
        f"plain vLLM, DP {ranks} with EP: {rates} tokens/s at its ranks before the engine of rank {KILLED} is killed",
        *(
            f"then, at {name}: {other['under_way_failed']} of {other['under_way']} requests under way failed, and "
            f"{other['later_failed']} of {other['later']} later ones; its last answer came {other['last_answer_s']} s after "
            f"the kill, the first failure {other['first_failure_s']} s"
            for name, other in found["others"].items()
        ),
        f"/health was bad {health}, the server ended {end} (exit {found['exit']})",
    ]


def _is_well(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/health", timeout=2).close()
    except (urllib.error.URLError, OSError):
        return False
    return True
