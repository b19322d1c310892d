"""The ranks of gpu_ranks.py in processes of their own, as gpu_ipc.py asks them to play, to leave or to die."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from ci.checks.gpu_ranks import LIMIT_S, Played, Setting, run_rank


class Group:
    """The ranks of one setting, seen from outside."""

    def __init__(self, setting: Setting) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipes: dict[int, Connection] = {}
        self.processes: dict[int, BaseProcess] = {}
        for rank in range(setting.num_ranks):
            self.pipes[rank], theirs = spawn.Pipe()
            self.processes[rank] = spawn.Process(target=run_rank, args=(theirs, rank, setting))
            self.processes[rank].start()
            theirs.close()
        handles = {rank: self.answer(rank) for rank in self.pipes}
        self.tell(handles)

    def tell(self, order: object) -> None:
        """Send to all ranks that are there."""
        for pipe in self.pipes.values():
            pipe.send(order)

    def answer(self, rank: int) -> Any:
        """The next word of a rank; raises RuntimeError where none comes."""
        if not self.pipes[rank].poll(LIMIT_S):
            raise RuntimeError(f"rank {rank} said nothing for {LIMIT_S} s")
        try:
            return self.pipes[rank].recv()
        except EOFError:
            raise RuntimeError(f"rank {rank} ended with code {self.processes[rank].exitcode}: see above") from None

    def play(self, order: str, acquires: int) -> dict[int, Played]:
        """All ranks at once; what each has seen since it began."""
        self.tell((order, acquires))
        return {rank: self.answer(rank) for rank in self.pipes}

    def play_while_one_leaves(self, order: str, acquires: int, rank: int) -> dict[int, Played]:
        """As `play` of the others, while `rank` ends in order: unmaps, frees its slabs, exits."""
        leaving = self.pipes.pop(rank)
        self.tell((order, acquires))
        for word in ("unmap", "end"):
            leaving.send(word)
        self.processes.pop(rank).join(LIMIT_S)
        return {rank: self.answer(rank) for rank in self.pipes}

    def kill(self, rank: int) -> None:
        """SIGKILL, and wait until it is gone."""
        os.kill(self.processes[rank].pid or 0, signal.SIGKILL)
        self.processes.pop(rank).join(LIMIT_S)
        self.pipes.pop(rank).close()

    def close(self) -> None:
        """In the order of a shutdown: all unmap, then all free."""
        self.tell("unmap")
        for rank in self.pipes:
            self.answer(rank)
        self.tell("end")
        for process in self.processes.values():
            process.join(LIMIT_S)
        codes = [process.exitcode for process in self.processes.values()]
        if any(codes):
            raise RuntimeError(f"ranks ended with codes {codes}")

    def abandon(self) -> None:
        """End whatever is left after a failure."""
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
                process.join(LIMIT_S)
