"""What ranks that pull at once cost each other: `python -m ci.bench.contention --json FILE`, on all GPUs of this machine.

A process per rank and GPU, over the transport that engines use. Each pulls the experts that it lacks of one layer again and
again: first rank 0 alone, then all at once, for every way of cutting and ordering the copies. `rotated`, as engines do it:
copies of all peers take turns, beginning with the next rank. `in order`: rank by rank, beginning with rank 0 for everybody,
so that all read the same source. `together`: those of each peer on a stream of their own, so that a busy source holds up no
other. Goal: with all ranks pulling 0.9 of one rank's own rate.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from ci.bench.results import as_text
from ci.checks.gpu_ranks import LIMIT_S, make_transport
from vllm_dwdp.copy_plan import LayerLayout, TensorSpec, build_plan
from vllm_dwdp.placement import place
from vllm_dwdp.prefetch.prefetcher import bind_plan
from vllm_dwdp.transport.base import CopyEngine, Program
from vllm_dwdp.transport.cuda_copy import CopyOptions

MIB: Final = 1 << 20


class Way(NamedTuple):
    """slice_bytes: None for whole ranges."""

    slice_bytes: int | None
    order: Literal["rotated", "in order", "together"] = "rotated"

    @property
    def name(self) -> str:
        size = f"{self.slice_bytes // MIB} MiB" if self.slice_bytes else "whole ranges"
        return f"{size}, {self.order}"


#: 27 MiB: this layer in 32 slices, as engines once cut it.
WAYS: Final = (
    Way(27 * MIB), Way(None), Way(16 * MIB), Way(4 * MIB), Way(MIB), Way(None, "in order"), Way(4 * MIB, "in order"),
    Way(None, "together"), Way(16 * MIB, "together"),
)  # fmt: skip


class Shape(NamedTuple):
    """A layer of Qwen3-30B-A3B in BF16, unless told otherwise."""

    ranks: int
    transport: str = "cupy_ipc"
    experts: int = 128
    row_bytes: int = 2 * 768 * 2048 * 2


def run_rank(pipe: Connection, rank: int, shape: Shape) -> None:
    """Answers (way, seconds) with (bytes, seconds) until it is told to end."""
    transport = make_transport(shape.transport, rank, shape.ranks, CopyOptions())
    tensors = (TensorSpec("w13", shape.row_bytes), TensorSpec("w2", shape.row_bytes // 2))
    layout = LayerLayout(place(shape.experts, shape.ranks), tensors)
    own = transport.allocate_slab(layout.slabs[rank].nbytes)
    pipe.send(transport.export_handle(own))
    handles = pipe.recv()
    mapped = {peer: transport.map_peer(handle) for peer, handle in enumerate(handles) if peer != rank}
    addresses = {peer: slab.address for peer, slab in mapped.items()} | {rank: own.address}
    slot = transport.allocate_slot(layout.slot(rank, True).nbytes)
    engines = [transport.copy_engine() for _ in mapped]  # the first one alone, or one for each peer
    programs: list[list[tuple[CopyEngine, Program]]] = []
    for way in WAYS:
        plan = build_plan(layout, rank, way.slice_bytes, split=True)
        parts = [plan]
        if way.order == "in order":
            parts = [replace(plan, pulls=tuple(sorted(plan.pulls, key=lambda each: each.source)))]
        elif way.order == "together":
            parts = [replace(plan, pulls=tuple(p for p in plan.pulls if p.source == peer)) for peer in mapped]
        bound = zip(engines, parts, strict=False)
        programs.append([(engine, bind_plan(engine, part, addresses, slot.address)) for engine, part in bound])
    pipe.send(len(programs))
    while (order := pipe.recv()) is not None:
        number, length = order
        pull(programs[number])
        nbytes, begun = 0, time.perf_counter()
        while (seconds := time.perf_counter() - begun) < length:
            pull(programs[number])
            nbytes += sum(program.pulled_bytes for _, program in programs[number])
        pipe.send((nbytes, seconds))
    for engine in engines:
        engine.close(LIMIT_S)
    for slab in mapped.values():
        transport.unmap_peer(slab)
    pipe.send("unmapped")
    pipe.recv()
    transport.close()


def pull(parts: list[tuple[CopyEngine, Program]]) -> None:
    """All parts at once; returns when they are there."""
    ends = [engine.submit(program) for engine, program in parts]
    for (engine, _), end in zip(parts, ends, strict=True):
        engine.finish(end, LIMIT_S)


class Ranks:
    """The processes, seen from outside."""

    def __init__(self, shape: Shape) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self._processes = []
        for rank in range(shape.ranks):
            mine, theirs = spawn.Pipe()
            self._processes.append(spawn.Process(target=run_rank, args=(theirs, rank, shape), daemon=True))
            self._processes[-1].start()
            theirs.close()
            self.pipes.append(mine)
        handles = [self._answer(pipe) for pipe in self.pipes]
        self._tell(handles)
        for pipe in self.pipes:
            self._answer(pipe)

    def pull(self, number: int, seconds: float, alone: bool) -> list[float]:
        """Bytes per second of rank 0, or of every rank at once."""
        pipes = self.pipes[:1] if alone else self.pipes
        for pipe in pipes:
            pipe.send((number, seconds))
        return [nbytes / took for nbytes, took in map(self._answer, pipes)]

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


def measure(ranks: Ranks, seconds: float, turns: int) -> list[dict[str, Any]]:
    """A row per way: GB/s of one rank alone and, of all at once, of the median and of the slowest; medians over turns."""
    found: list[dict[str, list[float]]] = [{"alone": [], "all": [], "slowest": []} for _ in WAYS]
    for _ in range(turns):
        for number, row in enumerate(found):
            row["alone"] += ranks.pull(number, seconds, alone=True)
            together = ranks.pull(number, seconds, alone=False)
            row["all"].append(statistics.median(together))
            row["slowest"].append(min(together))
    return [
        {"way": way.name, **{key: statistics.median(values) / 1e9 for key, values in row.items()},
         "ratio": statistics.median(one / other for one, other in zip(row["all"], row["alone"], strict=True))}
        for way, row in zip(WAYS, found, strict=True)
    ]  # fmt: skip


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="default: as many as GPUs, or 3 with --cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement (%(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="of which medians are taken (%(default)s)")
    parser.add_argument("--cpu", action="store_true", help="over shared memory, to try this")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    if args.cpu:
        shape = Shape(args.ranks or 3, "shm", experts=12, row_bytes=1 << 20)
    else:
        from ci.checks.visible import visible_gpus

        if not (gpus := visible_gpus()):
            parser.error("there is no GPU here: --cpu tries this over shared memory")
        shape = Shape(args.ranks or gpus)
    if shape.ranks < 2:
        parser.error(f"{shape.ranks} rank has nobody to pull from: --ranks 2 or more")
    if args.turns < 1:
        parser.error(f"--turns {args.turns}: write 1 or more")
    ranks = Ranks(shape)
    try:
        rows = measure(ranks, args.seconds, args.turns)
    finally:
        ranks.close()
    if args.json:
        args.json.write_text(as_text({"shape": shape._asdict(), "rows": rows}))
    print(f"{shape.ranks} ranks\n{'way':<28} {'alone GB/s':>11} {'all at once':>12} {'slowest':>9} {'ratio':>7}")
    for row in rows:
        print(f"{row['way']:<28} {row['alone']:>11.1f} {row['all']:>12.1f} {row['slowest']:>9.1f} {row['ratio']:>7.3f}")


if __name__ == "__main__":
    sys.exit(main())
