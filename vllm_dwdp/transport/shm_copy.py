"""The copy engine of the shm transport: one thread that runs programs in the order of submission.

A thread that copies slice by slice in Python needs the interpreter lock for every slice, and a busy compute thread
hands it over only every 5 ms. So adjacent slices are joined, and a program of many goes to torch as one call that holds
no lock.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, NamedTuple

from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.transport.base import NOTHING_EXPOSED, Copy, CopyEngine, Event, Exposed, Program, Span

if TYPE_CHECKING:
    import torch

FEW_COPIES: Final = 4  # up to here a loop of memmove
_ELEMENT: Final = 16  # bytes of complex128, torch's widest element
# torch splits a copy of more elements over its OpenMP threads, which compute needs (at::internal::GRAIN_SIZE).
_CHUNK: Final = 32768 * _ELEMENT


class ShmEvent(Event):
    """The end of a submitted program, or a point on the compute side, which on CPU is always complete."""

    __slots__ = ("begin_ns", "done", "end_ns", "error")

    def __init__(self, done: bool = False) -> None:
        self.done = done
        self.error: BaseException | None = None
        self.begin_ns = self.end_ns = 0

    def span(self) -> Span | None:
        """See Event."""
        return Span(self.begin_ns, self.end_ns) if self.done and self.end_ns else None


class _Batch(NamedTuple):
    """Equally long lists of tensors, copied pairwise in order."""

    dst: list["torch.Tensor"]
    src: list["torch.Tensor"]


@dataclass(frozen=True, eq=False)
class ShmProgram(Program):
    """moves: the copies, adjacent ones joined. batch: the same for torch, where that is faster."""

    moves: tuple[Copy, ...]
    batch: _Batch | None


class _Job(NamedTuple):
    program: ShmProgram
    after: ShmEvent
    event: ShmEvent


_COMPUTE: Final = ShmEvent(done=True)


class ShmCopyEngine(CopyEngine):
    """See CopyEngine. Copies run on one daemon thread; compute on the CPU is done when `record` is called."""

    def __init__(
        self,
        timeout_s: float = 300.0,
        cores: Collection[int] = (),
        before_copy: Callable[[Copy], None] | None = None,
    ) -> None:
        """timeout_s: limit of a copy's wait for `after`. cores: where the thread may run; if empty it inherits the
        caller's, which hides no copy where compute is bound to one core. before_copy: called before each copy, none of
        which are then joined; tests make the engine slow, or fail, with it. Raises DwdpError for cores not there.
        """
        self._timeout_s = timeout_s
        self._before_copy = before_copy
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._ended = threading.Condition()
        self._tensors: dict[tuple[int, int], torch.Tensor] = {}
        self._exposed = NOTHING_EXPOSED
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="dwdp-copy", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise DwdpError(
                f"the copy thread cannot be started ({error}): raise ulimit -u, or pids.max of the cgroup"
            ) from error
        if cores:
            self._bind_thread(cores)

    def bind(self, pulls: Sequence[Copy], local: Sequence[Copy] = ()) -> ShmProgram:
        """See CopyEngine."""
        copies = [*pulls, *local]
        pulled, merged = sum(copy.nbytes for copy in pulls), sum(copy.nbytes for copy in local)
        if self._before_copy is not None:
            return ShmProgram(pulled, merged, len(copies), tuple(copies), None)
        moves = _join(copies)
        return ShmProgram(pulled, merged, len(copies), moves, self._batch(moves))

    def submit(self, program: Program, after: Event | None = None) -> ShmEvent:
        """See CopyEngine."""
        if self._closing:
            raise DwdpError("a copy was submitted to a closed engine: close the prefetcher first")
        if not isinstance(program, ShmProgram):
            raise DwdpError(f"a {type(program).__name__} reached the shm copy engine: submit what its bind returned")
        event = ShmEvent()
        self._jobs.put(_Job(program, _COMPUTE if after is None else _own(after), event))
        return event

    def record(self) -> ShmEvent:
        """See CopyEngine."""
        return _COMPUTE

    def wait(self, event: Event, timeout_s: float) -> None:
        """See CopyEngine."""
        ready, begin = self.ready(event), time.perf_counter()
        self.finish(event, timeout_s)
        if not ready:
            waits, seconds = self._exposed
            self._exposed = Exposed(waits + 1, seconds + time.perf_counter() - begin)

    def take_exposed(self) -> Exposed:
        """See CopyEngine."""
        taken, self._exposed = self._exposed, NOTHING_EXPOSED
        return taken

    def finish(self, event: Event, timeout_s: float) -> None:
        """See CopyEngine."""
        mine = _own(event)
        if not mine.done:
            self._block(mine, timeout_s, "a copy")
        if mine.error is not None:
            raise DwdpError(f"a copy into a slot failed: {mine.error}") from mine.error

    def ready(self, event: Event) -> bool:
        """See CopyEngine."""
        return _own(event).done

    def close(self, timeout_s: float) -> None:
        """See CopyEngine."""
        if not self._closing:
            self._closing = True
            self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise DwdpTimeout(f"copies are still running after {timeout_s} s: raise dwdp.timeout_s, or end the process")
        self._tensors.clear()

    def _bind_thread(self, cores: Collection[int]) -> None:
        try:
            os.sched_setaffinity(self._thread.native_id or 0, cores)
        except (OSError, ValueError) as error:
            self.close(self._timeout_s)
            wanted, here = sorted(cores), os.cpu_count()
            raise DwdpError(
                f"the copy thread cannot run on cores {wanted} of {here} ({error}): name cores this process may use"
            ) from error

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            event = job.event
            try:
                if not job.after.done:
                    self._block(job.after, self._timeout_s, "the release of a slot")
                event.begin_ns = time.monotonic_ns()
                self._copy(job.program)
                event.end_ns = time.monotonic_ns()
            except BaseException as error:  # whatever it is, the compute thread has to learn of it
                event.error = error
            event.done = True
            with self._ended:
                self._ended.notify_all()

    def _copy(self, program: ShmProgram) -> None:
        if program.batch is not None:
            import torch

            torch._foreach_copy_(program.batch.dst, program.batch.src)
            return
        for copy in program.moves:
            if self._before_copy is not None:
                self._before_copy(copy)
            ctypes.memmove(copy.dst, copy.src, copy.nbytes)

    def _block(self, event: ShmEvent, timeout_s: float, what: str) -> None:
        with self._ended:
            if not self._ended.wait_for(lambda: event.done, timeout_s):
                raise DwdpTimeout(
                    f"{what} is not done after {timeout_s} s: raise dwdp.timeout_s, or look for a stalled rank"
                )

    def _batch(self, moves: Sequence[Copy]) -> _Batch | None:
        """`moves` for torch, in chunks it copies on the calling thread; None where they are few or unaligned."""
        if len(moves) <= FEW_COPIES or any((dst | src | nbytes) % _ELEMENT for dst, src, nbytes in moves):
            return None
        chunks = [
            (move.dst + done, move.src + done, min(_CHUNK, move.nbytes - done))
            for move in moves
            for done in range(0, move.nbytes, _CHUNK)
        ]
        return _Batch(
            [self._tensor(dst, nbytes) for dst, _, nbytes in chunks],
            [self._tensor(src, nbytes) for _, src, nbytes in chunks],
        )

    def _tensor(self, address: int, nbytes: int) -> "torch.Tensor":
        """complex128 [nbytes / 16] at an address; kept, since all layers of a slot write to the same ones."""
        import torch

        key = (address, nbytes)
        if key not in self._tensors:
            buffer = (ctypes.c_ubyte * nbytes).from_address(address)
            # A tensor of inference mode could not be written to by the copy thread.
            with torch.inference_mode(False):
                self._tensors[key] = torch.frombuffer(buffer, dtype=torch.complex128)
        return self._tensors[key]


def _join(copies: Sequence[Copy]) -> tuple[Copy, ...]:
    """Copies in the same order, neighbours joined where they continue each other at both ends."""
    joined: list[Copy] = []
    for copy in copies:
        last = joined[-1] if joined else None
        if last and last.dst + last.nbytes == copy.dst and last.src + last.nbytes == copy.src:
            joined[-1] = Copy(last.dst, last.src, last.nbytes + copy.nbytes)
        else:
            joined.append(copy)
    return tuple(joined)


def _own(event: Event) -> ShmEvent:
    if not isinstance(event, ShmEvent):
        raise DwdpError(
            f"an event of {type(event).__name__} reached the shm copy engine: use one engine per prefetcher"
        )
    return event
