"""What tokens that travel cost, beside direct reads and layers that are all local: `python -m ci.bench.travel --json FILE`.

Two processes, a GPU each: layers of a model's shape (--model), half of the experts on either side, or more (--held, placed
as by `experts_per_rank`). Microseconds a layer in a CUDA graph of all layers, for each number of tokens: the other side
idle; both at once; the other side in long steps (8192 tokens). `echo`: a request without work. Every result is compared with
the one of direct reads, bit for bit. The JSON has the model, how many experts a side holds, and the number of layers.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ci.bench.results import as_text
from ci.bench.run import command, machine
from ci.bench.travel_rank import TOKENS, USUAL, Rank
from ci.bench.words import check_numbers, check_places
from ci.checks.visible import visible_gpus
from vllm_dwdp.kernels.tiles import KernelName

if TYPE_CHECKING:
    from ci.bench.travel_layers import Shape

LIMIT_S = 120.0
PREFILL = 8192


def run_rank(
    pipe: Connection, rank: int, shape: Shape, layers: int, limit_us: float, long_kernel: KernelName | None
) -> None:
    """Answers orders until None."""
    side = Rank(rank, shape, layers, limit_us, {PREFILL: long_kernel} if long_kernel else {})
    pipe.send(side.exported())
    side.join(*pipe.recv())
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        name, *arguments = order
        pipe.send(getattr(side, name)(*arguments))
    side.attendant.stop(10)
    side.torch.cuda.synchronize()
    pipe.send("stopped")
    pipe.recv()
    side.exchange.close()
    for memory in side.mapped:
        side.transport.unmap_peer(memory)
    pipe.send("unmapped")
    pipe.recv()


def arguments(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, Shape]:
    """Of the command line, with a layer's shape; what could not be measured ends the process in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-30B-A3B", help="of kernels/bench/shapes.py (%(default)s)")
    parser.add_argument("--held", type=int, help="experts of each side, from half of them on (half)")
    parser.add_argument("--layers", type=int, help="(as many as 54 GB on each GPU have room for, at most 8)")
    parser.add_argument("--limit-us", type=float, default=3000, help="a requester waits so long (%(default)s)")
    parser.add_argument(
        "--long-kernel",
        choices=("pointer", "persistent"),
        help="of long steps, instead of the one of the tile table; a persistent kernel keeps its multiprocessors to its end",
    )
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, nargs="*", default=list(USUAL), choices=TOKENS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    try:
        check_numbers(args)
        check_places(args, "json")
        from ci.bench.travel_layers import shape_of

        shape = shape_of(args.model, args.held)
    except ValueError as error:
        parser.error(str(error))
    args.layers = shape.layers if args.layers is None else args.layers
    return args, shape


def about(args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """What was measured, for the JSON."""
    held = len(shape.placement.shares[0])
    return {"model": shape.model.name, "held": held, "experts": shape.model.experts, "layers": args.layers}


def main() -> int:
    """Measure and print."""
    args, shape = arguments()
    if (gpus := visible_gpus()) < 2:
        raise SystemExit(f"this takes 2 GPUs, and {gpus} can be seen")
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in (0, 1):
        mine, theirs = spawn.Pipe()
        processes.append(
            spawn.Process(
                target=run_rank, args=(theirs, rank, shape, args.layers, args.limit_us, args.long_kernel), daemon=True
            )
        )
        processes[-1].start()
        theirs.close()  # or its end is not seen when the rank ends
        pipes.append(mine)

    def answer(pipe: Connection) -> Any:
        if not pipe.poll(LIMIT_S):
            raise SystemExit(f"a rank has not answered for {LIMIT_S:.0f} s")
        return pipe.recv()

    def ask(who: tuple[int, ...], *orders: Any) -> list[Any]:
        for rank, order in zip(who, orders * (2 if len(orders) == 1 else 1), strict=False):
            pipes[rank].send(order)
        return [answer(pipes[rank]) for rank in who]

    rows: list[dict[str, Any]] = []

    def told(name: str, tokens: int, found: dict[str, Any]) -> None:
        rows.append({"name": name, "tokens": tokens, **found})
        print(f"{name:<34} {tokens:>5} tokens: {found['us']:>8.1f} us, worst {found['worst_us']:>8.1f}, "
              f"asked {found['asked']:>6}, late {found['late']:>6}", flush=True)  # fmt: skip
        if args.json:
            measured = {"machine": machine(False), "command": command(), **about(args, shape), "rows": rows}
            args.json.write_text(as_text(measured))

    with contextlib.suppress(BrokenPipeError):
        exported = [answer(pipe) for pipe in pipes]
        for pipe, given in zip(pipes, exported[::-1], strict=True):
            pipe.send(given)
        for pipe in pipes:
            answer(pipe)
        print("ready:", ", ".join(f"{name} {value}" for name, value in about(args, shape).items()), flush=True)
        s = args.seconds
        told("echo, other side idle", 1, ask((0,), ("load", "echo", 1, s))[0])
        for tokens in args.tokens:
            print("bits as direct reads:", ask((0,), ("same", tokens))[0], flush=True)
            for way in ("local", "direct", "travel"):
                ask((1,), ("load", way, tokens, 0.01))
                told(f"{way}, other side idle", tokens, ask((0,), ("load", way, tokens, s))[0])
            for way in ("local", "direct", "travel"):
                for rank, found in enumerate(ask((0, 1), ("load", way, tokens, s))):
                    told(f"{way}, both at once, rank {rank}", tokens, found)
            ask((1,), ("load", "local", PREFILL, 0.01))
            for way in ("local", "direct", "travel"):
                found = ask((0, 1), ("load", way, tokens, s), ("load", "local", PREFILL, s))
                told(f"{way}, other side in long steps", tokens, found[0])
                told(f"  long steps beside {way}", PREFILL, found[1])
        other = processes[1].pid
        assert other is not None
        try:
            for name, number in (("stopped", signal.SIGSTOP), ("going on", signal.SIGCONT)):
                os.kill(other, number)
                told(f"travel, other side {name}", 32, ask((0,), ("load", "travel", 32, s))[0])
        finally:
            os.kill(other, signal.SIGCONT)
        for _ in range(3):
            for pipe in pipes:
                pipe.send(None)
            for pipe in pipes:
                with contextlib.suppress(EOFError):
                    answer(pipe)
    for process in processes:
        process.join(20)
    return 0


if __name__ == "__main__":
    sys.exit(main())
