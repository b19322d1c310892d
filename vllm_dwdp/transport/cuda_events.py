"""CUDA events without making any per step: a pool of them, and the measurement of how long compute stood still."""

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.base import NOTHING_EXPOSED, Event, Exposed, Span
from vllm_dwdp.transport.cuda_device import CudaDevice

# What an event and a wait cost the device itself: shorter waits count as none.
NOISE_S: Final = 5e-6
#: Waits that are read at a time: where the last of them is over, so are the others.
AT_A_TIME: Final = 8


class EventPool:
    """Raw events of one kind. One may be taken again while streams still wait for its last record: those keep it."""

    def __init__(self, device: CudaDevice, timing: bool) -> None:
        self._device = device
        self._timing = timing
        self._free: list[int] = []
        self._closed = False
        self.made = 0

    def take(self) -> int:
        """An event that nobody else holds."""
        if self._closed:
            raise DwdpError("an event was recorded on a closed copy engine: close the prefetcher first")
        if self._free:
            return self._free.pop()
        self.made += 1
        return self._device.make_event(self._timing)

    def give(self, raw: int) -> None:
        """Put an event back; one that comes after `close` is destroyed."""
        if self._closed:
            self._device.destroy_event(raw)
        else:
            self._free.append(raw)

    def close(self) -> None:
        """Destroy what is in the pool; idempotent."""
        self._closed = True
        while self._free:
            self._device.destroy_event(self._free.pop())


class CudaEvent(Event):
    """A point in a stream. Its raw event goes back to the pool with it."""

    __slots__ = ("_pool", "deadline", "number", "raw")

    def __init__(self, pool: EventPool, deadline: float = 0.0, number: int = 0) -> None:
        """deadline: of time.monotonic, for copies. number: of copies, in the order in which they end."""
        self._pool = pool
        self.raw = pool.take()
        self.deadline = deadline
        self.number = number

    def __del__(self) -> None:
        raw = getattr(self, "raw", None)
        if raw is not None:
            self._pool.give(raw)

    def span(self) -> Span | None:
        """See Event; no times are kept."""
        return None


class _Wait(NamedTuple):
    """`stream` came to its wait for `copy` at the raw event `begin`."""

    stream: int
    begin: int
    copy: CudaEvent


class ExposedWaits:
    """How long a stream stood still for copies: from when it came to a wait to the copy's end, read later, by query."""

    def __init__(self, device: CudaDevice, ended: Callable[[CudaEvent], None]) -> None:
        """ended: is told of copies that turn out to be done, not of each."""
        self._device = device
        self._ended = ended
        self.pool = EventPool(device, timing=True)
        self._waits: deque[_Wait] = deque()
        self._known = NOTHING_EXPOSED

    def wait(self, stream: int, copy: CudaEvent) -> None:
        """Let `stream` wait for the end of `copy`, an event with timing, and remember to measure it."""
        if self._waits and len(self._waits) % AT_A_TIME == 0:
            self._read_all()  # where nobody asks, so that events go back to the pool
        begin = self.pool.take()
        self._device.record(begin, stream)
        self._device.wait_event(stream, copy.raw)
        self._waits.append(_Wait(stream, begin, copy))

    def take(self) -> Exposed:
        """The waits not told yet that are over, shorter ones than NOISE_S left out."""
        self._read_all()
        taken, self._known = self._known, NOTHING_EXPOSED
        return taken

    def _read_all(self) -> None:
        while len(self._waits) >= AT_A_TIME:
            if not self._read(AT_A_TIME):
                return
        while self._waits and self._read(1):
            pass

    def _read(self, count: int) -> bool:
        """Read the `count` oldest waits; False where one of them is not over."""
        waits = [self._waits[i] for i in range(count)]
        # Copies end in order, and begins in that of their stream.
        newest = max((wait.copy for wait in waits), key=lambda copy: copy.number)
        begins = {wait.stream: wait.begin for wait in waits}
        if not (self._device.query(newest.raw) and all(self._device.query(begin) for begin in begins.values())):
            return False
        self._ended(newest)
        for _ in range(count):
            _, begin, copy = self._waits.popleft()
            # Negative where the copy was done before compute came to it.
            seconds = self._device.elapsed_s(begin, copy.raw)
            self.pool.give(begin)
            if seconds >= NOISE_S:
                self._known = Exposed(self._known.waits + 1, self._known.seconds + seconds)
        return True

    def close(self) -> None:
        """Forget what is not known yet; idempotent."""
        while self._waits:
            self.pool.give(self._waits.popleft().begin)
        self.pool.close()
