"""CUDA events without making any per step: a pool of them, and the measurement of how long compute stood still."""

from collections import deque
from typing import Final

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.base import NOTHING_EXPOSED, Event, Exposed, Span
from vllm_dwdp.transport.cuda_device import CudaDevice

# Two events around a wait that is over at once are 1 to 5 microseconds apart: shorter waits count as none.
NOISE_S: Final = 5e-6
#: Waits that are not read yet, before a further one looks for those that can be.
_MOST_PAIRS: Final = 8


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

    __slots__ = ("_pool", "deadline", "raw")

    def __init__(self, pool: EventPool, deadline: float = 0.0) -> None:
        """deadline: of time.monotonic, for copies."""
        self._pool = pool
        self.raw = pool.take()
        self.deadline = deadline

    def __del__(self) -> None:
        raw = getattr(self, "raw", None)
        if raw is not None:
            self._pool.give(raw)

    def span(self) -> Span | None:
        """See Event; no times are kept."""
        return None


class ExposedWaits:
    """How long a stream stood still: a pair of timing events around each wait, read later, by query, without waiting."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self.pool = EventPool(device, timing=True)
        self._pairs: deque[tuple[int, int]] = deque()
        self._known = NOTHING_EXPOSED

    def bracket(self, stream: int, event: int) -> None:
        """Let `stream` wait for `event`, and remember to measure it."""
        if len(self._pairs) >= _MOST_PAIRS:
            self._read()  # where nobody asks, so that events go back to the pool
        begin, end = self.pool.take(), self.pool.take()
        self._device.record(begin, stream)
        self._device.wait_event(stream, event)
        self._device.record(end, stream)
        self._pairs.append((begin, end))

    def take(self) -> Exposed:
        """The waits not told yet whose end is known, shorter ones than NOISE_S left out."""
        self._read()
        taken, self._known = self._known, NOTHING_EXPOSED
        return taken

    def _read(self) -> None:
        while self._pairs and self._device.query(self._pairs[0][1]):
            begin, end = self._pairs.popleft()
            seconds = self._device.elapsed_s(begin, end)
            self.pool.give(begin)
            self.pool.give(end)
            if seconds >= NOISE_S:
                self._known = Exposed(self._known.waits + 1, self._known.seconds + seconds)

    def close(self) -> None:
        """Forget what is not known yet; idempotent."""
        while self._pairs:
            for raw in self._pairs.popleft():
                self.pool.give(raw)
        self.pool.close()
