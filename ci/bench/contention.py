"""What ranks that pull at once cost each other: `python -m ci.bench.contention --json FILE`, on all GPUs of this machine.

A process per rank and GPU, over the transport that engines use. Each pulls experts that it lacks of one layer again and
again: first one rank alone, then all at once, for every way. All from all others, by every way of cutting and ordering the
copies: `rotated`, as engines do it: copies of all peers take turns, beginning with the next rank. `in order`: rank by rank,
beginning with rank 0 for everybody, so that all read the same source. `together`: those of each peer on a stream of their
own, so that a busy source holds up no other. Then patterns that tell what ranks meet at (docs/testing.md), and a kernel's
loads in place of copy engines, by so many programs. Goal: with all ranks pulling 0.9 of one rank's own rate.

Before anything is timed, every way has to bring the right bytes. The JSON file is written after each turn.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ci.bench.contention_rank import Order, Pulled, Shape, run_rank
from ci.bench.contention_ways import ONE_READER, WAYS, Way, chosen
from ci.bench.results import as_text
from ci.checks.gpu_ranks import LIMIT_S


class Ranks:
    """The processes, seen from outside."""

    def __init__(self, shape: Shape, ways: Sequence[Way]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.shape, self.ways = shape, tuple(ways)
        self.pipes: list[Connection] = []
        self._processes = []
        barrier = spawn.Barrier(shape.ranks)
        numbers = [WAYS.index(way) for way in ways]
        for rank in range(shape.ranks):
            mine, theirs = spawn.Pipe()
            arguments = (theirs, rank, shape, numbers, barrier)
            self._processes.append(spawn.Process(target=run_rank, args=arguments, daemon=True))
            self._processes[-1].start()
            theirs.close()
            self.pipes.append(mine)
        handles = [self._answer(pipe) for pipe in self.pipes]
        self._tell(handles)
        for pipe in self.pipes:
            self._answer(pipe)

    def pull(self, readers: Sequence[int], order: Order) -> list[Pulled]:
        """What each of these ranks did at once."""
        for rank in readers:
            self.pipes[rank].send(order)
        return [self._answer(self.pipes[rank]) for rank in readers]

    def close(self) -> None:
        """Unmap all, then free all."""
        for _ in range(2):
            self._tell(None)
            for pipe in self.pipes:
                if pipe.poll(LIMIT_S):
                    with contextlib.suppress(EOFError):
                        pipe.recv()
        for process in self._processes:
            process.join(LIMIT_S)

    def _tell(self, order: object) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # it has ended
                pipe.send(order)

    def _answer(self, pipe: Connection) -> Any:
        if not pipe.poll(2 * LIMIT_S):
            raise SystemExit(f"contention: a rank has not answered for {2 * LIMIT_S:.0f} s: look for a stalled device")
        try:
            return pipe.recv()
        except EOFError:
            raise SystemExit("contention: a rank ended; its error is above") from None


class Row:
    """What was measured of a way: a rank alone, and all at once, per turn, in bytes per second."""

    def __init__(self, way: Way, ranks: int) -> None:
        self._way, self._ranks = way, ranks
        self._readers = way.pattern.readers(ranks)
        self._alone: list[float] = []
        self._at_once: list[list[float]] = []

    def turn(self, ranks: Ranks, number: int, seconds: float) -> None:
        """Once more."""
        order = Order(number, seconds)
        if self._way.pattern is not ONE_READER:  # which is alone anyway
            [alone] = ranks.pull(self._readers[:1], order)
            self._alone.append(alone.rate)
            if self._way.pattern.in_step:
                order = order._replace(rounds=max(1, round(alone.rounds * seconds / alone.seconds)))
        self._at_once.append([each.rate for each in ranks.pull(self._readers, order)])

    def summary(self) -> dict[str, Any]:
        """GB/s, medians over turns. alone: of the first rank that pulls. all, slowest: of those at once the median, the
        slowest. per_rank: at once, None for ranks that do not pull. ratio: of all to alone, turn by turn."""
        medians = [statistics.median(rates) for rates in self._at_once]
        slowest = [min(rates) for rates in self._at_once]
        ratios = [one / other for one, other in zip(medians, self._alone, strict=False)]
        by_rank = dict(zip(self._readers, zip(*self._at_once, strict=True), strict=True))
        return {
            "name": self._way.name, "pattern": self._way.pattern.name, "copies": self._way.copies,
            "alone": statistics.median(self._alone) / 1e9 if self._alone else None,
            "all": statistics.median(medians) / 1e9, "slowest": statistics.median(slowest) / 1e9,
            "per_rank": [statistics.median(by_rank[rank]) / 1e9 if rank in by_rank else None for rank in range(self._ranks)],
            "ratio": statistics.median(ratios) if ratios else None,
        }  # fmt: skip


def measure(ranks: Ranks, seconds: float, turns: int) -> Iterator[list[dict[str, Any]]]:
    """After each turn a row for each way, see Row.summary."""
    rows = [Row(way, ranks.shape.ranks) for way in ranks.ways]
    for _ in range(turns):
        for number, row in enumerate(rows):
            row.turn(ranks, number, seconds)
        yield [row.summary() for row in rows]


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """For people."""

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = [f"{'way':<36} {'alone GB/s':>11} {'all at once':>12} {'slowest':>9} {'ratio':>7}"]
    lines += [
        f"{row['name']:<36} {number(row['alone'], 1):>11} {number(row['all'], 1):>12} {number(row['slowest'], 1):>9} "
        f"{number(row['ratio'], 3):>7}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="default: as many as GPUs, or 3 with --cpu")
    parser.add_argument("--transport", choices=("cupy_ipc", "vmm"), default="cupy_ipc", help="of GPUs (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement (%(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="of which medians are taken (%(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT[,TEXT]", help="ways with one of these in their names")
    parser.add_argument("--cpu", action="store_true", help="over shared memory, to try this")
    parser.add_argument("--json", type=Path, help="write the results here, after each turn")
    args = parser.parse_args()
    begun = time.monotonic()
    if args.cpu:
        shape = Shape(args.ranks or 3, "shm", experts=12, row_bytes=1 << 20)
    else:
        from ci.checks.visible import visible_gpus

        if not (gpus := visible_gpus()):
            parser.error("there is no GPU here: --cpu tries this over shared memory")
        shape = Shape(args.ranks or gpus, args.transport)
    if shape.ranks < 2:
        parser.error(f"{shape.ranks} rank has nobody to pull from: --ranks 2 or more")
    if args.turns < 1:
        parser.error(f"--turns {args.turns}: write 1 or more")
    if not args.seconds > 0:
        parser.error(f"--seconds {args.seconds:g}: write more than 0")
    if not (ways := chosen(args.only, gpus=not args.cpu)):
        here = ", ".join(f"'{way.name}'" for way in chosen("", gpus=not args.cpu))
        parser.error(f"--only {args.only}: no way has that in its name: choose of {here}")
    if args.cpu:
        print("copies by multiprocessors are left out: they take GPUs")
    alone = sum(way.pattern is not ONE_READER for way in ways)
    expected = args.turns * args.seconds * (len(ways) + alone)
    print(f"{shape.ranks} ranks, {len(ways)} ways: {expected:.0f} s after the start", flush=True)
    ranks = Ranks(shape, ways)
    print(f"all bytes are right; started in {time.monotonic() - begun:.1f} s", flush=True)
    rows: list[dict[str, Any]] = []
    try:
        for turn, rows in enumerate(measure(ranks, args.seconds, args.turns), start=1):
            took = time.monotonic() - begun
            if args.json:
                found = {"shape": shape._asdict(), "seconds": args.seconds, "turns": turn, "took_s": took, "rows": rows}
                args.json.write_text(as_text(found))
            print(f"turn {turn} of {args.turns} ended after {took:.1f} s", flush=True)
    finally:
        ranks.close()
    print(as_table(rows))


if __name__ == "__main__":
    sys.exit(main())
