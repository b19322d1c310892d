"""Memory that outlives its owner, for gpu_ipc.py: an owner is killed, a process that mapped its slab hands it on, and the
owner's next life adopts it. With transport "shm" the same runs on a machine without a GPU."""

import multiprocessing
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Final

from ci.bench.rates import MIB, Row
from ci.checks.gpu_ranks import LIMIT_S, make_transport
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.cuda_copy import CopyOptions
from vllm_dwdp.transport.kept import keep_slab

OWNER, KEEPER = 1, 0
#: More than what CUDA takes for a process, so that adopting can be told from allocating.
NBYTES: Final = {"vmm": 1024 * MIB, "shm": 4 * MIB}


def _right(tensor: Any) -> Any:
    """What the owner wrote."""
    import torch

    return torch.arange(251, device=tensor.device, dtype=torch.uint8).repeat(-(-tensor.numel() // 251))[
        : tensor.numel()
    ]


def own(pipe: Connection, transport: str) -> None:
    """A rank that fills a slab, and is killed."""
    made = make_transport(transport, OWNER, 2, CopyOptions(), keep=True)
    slab = made.allocate_slab(NBYTES[transport])
    slab.tensor().copy_(_right(slab.tensor()))
    _settle(transport)
    pipe.send(made.export_handle(slab))
    pipe.recv()


def keep(pipe: Connection, transport: str) -> None:
    """A peer that maps the slab, says by which handle others can have it, and compares when it is asked."""
    made = make_transport(transport, KEEPER, 2, CopyOptions(), keep=True)
    peer: Any = made.map_peer(pipe.recv())
    pipe.send(peer.handle)
    with suppress(EOFError):
        while True:
            pipe.recv()
            pipe.send(int((peer.tensor() != _right(peer.tensor())).sum()))


def adopt(pipe: Connection, transport: str) -> None:
    """The owner's next life: (wrong bytes, bytes of its device that adopting took)."""
    made: Any = make_transport(transport, OWNER, 2, CopyOptions(), keep=True)
    handle: Handle = pipe.recv()
    before = _free(transport)
    slab = made.adopt_slab(keep_slab(handle, "an adopted slab", LIMIT_S))
    took = before - _free(transport)
    with suppress(EOFError):
        while True:
            pipe.send((int((slab.tensor() != _right(slab.tensor())).sum()), took, made.export_handle(slab)))
            pipe.recv()


def _settle(transport: str) -> None:
    if transport != "shm":
        import torch

        torch.cuda.synchronize()


def _free(transport: str) -> int:
    if transport == "shm":
        return 0
    import torch

    return int(torch.cuda.mem_get_info()[0])


class Process:
    """One of them, and its pipe."""

    def __init__(self, run: Any, transport: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=run, args=(theirs, transport), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, *sent: object) -> Any:
        """What it answers to each of these, the last answer; without any, what it says by itself."""
        for one in sent:
            self.pipe.send(one)
        if not self.pipe.poll(LIMIT_S):
            raise TimeoutError(f"nothing came in {LIMIT_S:g} s")
        return self.pipe.recv()

    def kill(self) -> None:
        """SIGKILL, and wait; idempotent."""
        self._process.kill()
        self._process.join()


def adopted_part(transport: str) -> list[Row]:
    """The owner dies, its next life adopts, the keeper dies, and one more life adopts from the one before."""
    processes = [Process(own, transport), Process(keep, transport)]
    owner, keeper = processes
    try:
        handle = keeper.ask(owner.ask())
        owner.kill()
        rows = [_row("at the peer, its owner killed", keeper.ask("compare"))]
        processes.append(second := Process(adopt, transport))
        wrong, took, _ = second.ask(handle)
        rows.append(_row("in the owner's next life", wrong))
        if transport != "shm":  # which has no counter of its own
            rows.append(Row("adopted", "memory that adopting took", took / MIB, "MiB", took < NBYTES[transport] // 2))
        rows.append(_row("at the peer, beside it", keeper.ask("compare")))
        keeper.kill()
        wrong, _, passed_on = second.ask("again")
        rows.append(_row("in that life, the peer killed", wrong))
        processes.append(third := Process(keep, transport))
        handle = third.ask(passed_on)
        second.kill()
        processes.append(last := Process(adopt, transport))
        rows.append(_row("in one more life, by a peer that came later", last.ask(handle)[0]))
        return rows
    finally:
        for process in processes:
            process.kill()


def _row(name: str, wrong: int) -> Row:
    return Row("adopted", f"wrong bytes {name}", wrong, "bytes", wrong == 0)
