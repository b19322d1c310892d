"""The part of returns.py that is of dwdp: a server for each rank, of which one is killed under load and returns."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import ci.checks.chaos_positions as positions  # also where examples are found
from ci.bench import returns_extra as extra
from ci.bench.load import Request
from ci.bench.models import MODELS
from ci.bench.returns_servers import (
    Left,
    NotUp,
    device_mib,
    more_in_use,
    others,
    say,
    serve,
    told,
    wait_up,
    words_of_all,
)
from ci.bench.servers import Target, healthy
from ci.bench.steady import KILLED, Asked, Steady, part, per_second
from ci.checks.soak_worker import WORDS, ask_states

from servers import Server, Servers, series  # isort: skip

#: By how much longer another rank may give no answer around the kill than it did before.
GAP_S: Final = 1.0
_NOTICE_LIMIT_S: Final = 20.0

#: A Part by field.
Figures = dict[str, Any]
BEFORE, DEAD, STARTS, AFTER = "before", f"rank {KILLED} is dead", f"rank {KILLED} starts", "after"


class Mark(NamedTuple):
    """From `at` on, of time.monotonic(), until the next one; what is not named is measured by nobody."""

    at: float
    name: str


class Apart:
    """The servers of one group. found: figures. wrong: what must not be."""

    def __init__(self, servers: Servers, model: Path, args: argparse.Namespace, left: Left) -> None:
        """Starts all at once; returns before they are up."""
        self._servers, self._model, self._args, self._left = servers, model, args, left
        self._meet = servers.folder / "meet"
        self._meet.mkdir()
        self.found: dict[str, Any] = {"device_mib": {}}
        self.wrong: list[str] = []
        self._began = time.monotonic()
        # No connection takes the port of one that is gone.
        self._port = positions.quiet_ports(args.ranks + args.extra)
        self._ranks = [self._start(rank, f"rank-{rank}") for rank in range(args.ranks)]

    def _start(self, rank: int, name: str) -> Server:
        settings = {"group": "returns", "rank": rank, "ranks": self._args.ranks, "meet": str(self._meet)}
        settings |= {"experts_per_rank": "partition", "timeout_s": self._args.start_s}
        words = [
            *WORDS,
            "--distributed-executor-backend",
            "dwdp",
            "--additional-config",
            json.dumps({"dwdp": settings}),
        ]
        server = serve(self._servers, name, self._model, [*words_of_all(self._args), *words], self._port + rank)
        self._left.groups.append(server.process.pid)
        return server

    def wait(self) -> None:
        """Return once all answer. Raises NotUp."""
        for server in self._ranks:
            wait_up(server, self._began + self._args.start_s)
        self.found["start_s"] = round(time.monotonic() - self._began, 1)
        say(f"all {len(self._ranks)} ranks are up after {self.found['start_s']:.0f} s")

    def digests(self, servers: Sequence[Server] = ()) -> list[str]:
        """Of all experts, as the kernels of each rank see them, or of these servers."""
        began, servers = time.monotonic(), servers or self._ranks
        pool = ThreadPoolExecutor(len(servers))
        try:
            states = list(pool.map(lambda server: ask_states(server.url, 1, digests=True)[0], servers))
        finally:
            # After a signal nobody waits for an answer; servers are stopped, and it does not come.
            pool.shutdown(wait=False)
        found = [state["digest"] for state in states]
        say(f"digests of all experts, in {time.monotonic() - began:.0f} s: {' '.join(each[:12] for each in found)}")
        return found

    def tell(self, pool: Sequence[Request]) -> None:
        """The story, and what came of it. Raises NotUp."""
        first = self.found["digests"] = self.digests()
        targets = [Target(server.url, {}) for server in self._ranks]
        clients, limit_s = self._args.load.concurrency, self._args.answer_s
        with contextlib.ExitStack() as stack:
            loads = [stack.enter_context(Steady(target, pool, clients, limit_s)) for target in targets]
            marks = self._events()
            asked = [load.asked for load in loads]
            if self._args.extra:
                # So far, should the rest be cut off.
                self.found |= figures(asked, marks)
                self.found["wrong"] = [*self.wrong, *judge(asked, marks, self.found["parts"])]
                marks = [*marks[:-1], *self._extra(pool)]
                del self.found["wrong"]
        self.found |= figures(asked, marks)
        self.wrong += judge(asked, marks, self.found["parts"])
        self.found["trouble"] = [load.troubles()[:10] for load in loads]
        second = self.digests()
        self.found["digests"] = first + second
        self.found["digests"] += [self.found["extra"]["digest"]] if "digest" in self.found.get("extra", {}) else []
        if len(set(self.found["digests"])) > 1:
            self.wrong.append(f"experts changed, or differ between ranks: {' '.join(self.found['digests'])}")
        self.found["logs"] = {server.name: told(server) for server in self._ranks}

    def _events(self) -> list[Mark]:
        time.sleep(self._args.settle_s)
        say("load is steady")
        marks = [Mark(time.monotonic(), BEFORE)]
        time.sleep(self._args.part_s)
        self._look_at_devices("before")
        killed = self._ranks[KILLED]
        marks.append(Mark(time.monotonic(), DEAD))
        self._servers.strike(killed)
        say(f"rank {KILLED}: SIGKILL to all of its server")
        self._notice(marks[-1].at)
        self._servers.stop(killed)
        time.sleep(max(0.0, marks[-1].at + self._args.part_s - time.monotonic()))
        self._look_at_devices("dead")
        marks.append(Mark(time.monotonic(), STARTS))
        self._ranks[KILLED] = self._start(KILLED, f"rank-{KILLED}-again")
        wait_up(self._ranks[KILLED], marks[-1].at + self._args.start_s)
        marks.append(Mark(time.monotonic(), ""))
        way = [line for line in told(self._ranks[KILLED]) if "of loading" in line]
        self.found |= {"return_s": round(marks[-1].at - marks[-2].at, 1), "way": way[-1] if way else ""}
        how = self.found["way"] or "its log says not how"
        say(f"rank {KILLED} answers again after {self.found['return_s']:.0f} s: {how}")
        if "experts adopted" not in self.found["way"]:
            self.wrong.append(f"rank {KILLED} did not adopt its experts: {self.found['way']}")
        time.sleep(self._args.settle_s)
        marks.append(Mark(time.monotonic(), AFTER))
        time.sleep(self._args.part_s)
        self._look_at_devices("after")
        used, spec = self.found["device_mib"], MODELS[self._args.model][0]
        share = (self._args.layers or spec.num_layers) * spec.num_experts * sum(spec.expert_bytes) / self._args.ranks
        for line in more_in_use(used.get("before", []), used.get("after", []), share / 2**21):
            self.wrong.append(f"{line} are in use more than before the kill: its experts are there twice")
        peers = len(self._ranks) - 1
        for rank, server in enumerate(self._ranks):
            if (alive := series(server, "dwdp:peers_alive")) != peers:
                self.wrong.append(f"rank {rank} sees {alive:.0f} peers at the end, and there are {peers}")
        return [*marks, Mark(time.monotonic(), "")]

    def _extra(self, pool: Sequence[Request]) -> list[Mark]:
        number, args = self._args.ranks, self._args
        visit = extra.Visit(
            self._servers,
            lambda: self._start(number, f"rank-{number}"),
            self._ranks,
            self.digests,
            extra.Load(pool, args.load.concurrency, args.answer_s),
            args.start_s,
            args.part_s,
        )
        self.found["extra"] = visit.found
        try:
            visit.run()
        except (NotUp, OSError) as error:
            # What the others noticed of it is judged all the same.
            visit.wrong.append(f"{type(error).__name__}: {error}")
        self.wrong += visit.wrong
        return [*itertools.starmap(Mark, visit.marks), Mark(time.monotonic(), "")]

    def _notice(self, since: float) -> None:
        """How long each other rank takes to see that its peer is gone, and whether it says meanwhile that it is well."""
        blind, left = others(len(self._ranks)), len(self._ranks) - 2
        noticed: dict[str, float] = {}
        self.found["noticed_s"] = noticed
        while blind:
            for rank in list(blind):
                if series(self._ranks[rank], "dwdp:peers_alive") == left:
                    noticed[f"rank {rank}"] = round(time.monotonic() - since, 2)
                    blind.remove(rank)
            if blind and time.monotonic() > since + _NOTICE_LIMIT_S:
                seen = f"did not see within {_NOTICE_LIMIT_S:.0f} s that rank {KILLED} is gone"
                self.wrong += [f"rank {rank} {seen}" for rank in blind]
                return
            time.sleep(0.1)
        for rank in others(len(self._ranks)):
            if not healthy(self._ranks[rank].url):
                self.wrong.append(f"/health of rank {rank} is not good while rank {KILLED} is dead")

    def _look_at_devices(self, when: str) -> None:
        if used := device_mib():
            self.found["device_mib"][when] = [round(each) for each in used]


def figures(asked: Sequence[Sequence[Asked]], marks: Sequence[Mark]) -> dict[str, Any]:
    """parts: by the name of a mark, the figures of each rank. per_second: tokens of each rank, from the first mark on."""
    parts: dict[str, list[Figures]] = {}
    for mark, following in itertools.pairwise(marks):
        if mark.name:
            parts[mark.name] = [part(of_rank, mark.at, following.at)._asdict() for of_rank in asked]
    seconds = [per_second(of_rank, marks[0].at, marks[-1].at) for of_rank in asked]
    at = {mark.name: round(mark.at - marks[0].at, 2) for mark in marks if mark.name}
    return {"parts": parts, "per_second": seconds, "parts_at_s": at}


def judge(asked: Sequence[Sequence[Asked]], marks: Sequence[Mark], parts: dict[str, list[Figures]]) -> list[str]:
    """What is wrong: failures where a rank was there, none that were answered, a gap of another rank than the killed one."""
    lines = []
    kill = next(mark.at for mark in marks if mark.name == DEAD)
    back = next(mark.at for before, mark in itertools.pairwise(marks) if before.name == STARTS)
    for rank, of_rank in enumerate(asked):
        failed = [
            each for each in of_rank if each.trouble and (rank != KILLED or each.ended < kill or each.began > back)
        ]
        if failed:
            lines.append(f"{len(failed)} requests failed at rank {rank}, the first: {failed[0].trouble}")
    for name, of_part in parts.items():
        there = [rank for rank in range(len(of_part)) if rank != KILLED or name not in (DEAD, STARTS)]
        lines += [f"{name}: rank {rank} answered nothing" for rank in there if not of_part[rank]["answers"]]
    for rank, before, dead in gaps(parts):
        if dead > before + GAP_S:
            lines.append(
                f"rank {rank} gave no answer for {dead:.2f} s around the kill; before, for {before:.2f} s at most"
            )
    return lines


def gaps(parts: dict[str, list[Figures]]) -> list[tuple[int, float, float]]:
    """Of each rank but the killed one: rank, and its longest time without an answer before and around the kill, seconds."""
    rows = zip(parts[BEFORE], parts[DEAD], strict=True)
    return [(rank, old["gap_s"], new["gap_s"]) for rank, (old, new) in enumerate(rows) if rank != KILLED]


def table(found: dict[str, Any]) -> list[str]:
    """Lines: for each part what each rank did."""
    width = max(map(len, found["parts"])) + 2
    lines = [
        f"{'':<{width}}{'s':>6}  {'rank':>4}{'tokens/s':>11}{'answers':>9}{'failed':>8}{'slowest s':>11}{'gap s':>8}"
    ]
    for name, of_part in found["parts"].items():
        for rank, row in enumerate(of_part):
            head = f"{name:<{width}}{row['seconds']:6.1f}" if rank == 0 else " " * (width + 6)
            lines.append(
                f"{head}  {rank:>4}{row['tokens_per_s']:>11.0f}{row['answers']:>9}{row['failed']:>8}"
                f"{row['slowest_s']:>11.2f}{row['gap_s']:>8.2f}"
            )
    for rank, before, dead in gaps(found["parts"]):
        noticed = found["noticed_s"].get(f"rank {rank}")
        lines.append(
            f"rank {rank}: no answer for {dead:.2f} s around the kill, for {before:.2f} s before it; it saw that its peer "
            f"was gone {'too late' if noticed is None else f'after {noticed} s'}"
        )
    lines.append(f"rank {KILLED} answered {found['return_s']} s after it was started again: {found['way']}")
    lines += extra.table(found["extra"]) if "extra" in found else []
    for when, used in found["device_mib"].items():
        lines.append(f"MiB in use on the GPUs, {when}: {' '.join(map(str, used))}")
    return lines
