"""When a prefetcher acquired, released and pulled what: an observer around it, for tests and studies."""

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from vllm_dwdp.prefetch.prefetcher import Prefetcher
from vllm_dwdp.transport.base import Event

TraceKind = Literal["acquire", "ready", "release", "submit", "copy_begin", "copy_end"]


class TraceEvent(NamedTuple):
    """time_ns: of time.monotonic_ns. Sort by it: a copy's events are appended once it is known to have ended."""

    time_ns: int
    kind: TraceKind
    layer: int
    slot: int


class TracedPrefetcher(Prefetcher):
    """A prefetcher that appends what it did to `trace`, which grows without bound; an acquire or release that raised is not
    there."""

    def __init__(
        self, *args: Any, trace: list[TraceEvent], clock: Callable[[], int] = time.monotonic_ns, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._trace, self._clock = trace, clock
        self._copies: list[tuple[Event, int]] = []  # whose times are not known yet, of which layer

    def acquire(self, layer: int) -> None:
        """See Prefetcher."""
        begin, again = self._clock(), self._of_layer[layer].used_by == layer
        super().acquire(layer)
        if not again:
            self._note(begin, "acquire", layer)
            self._note(self._clock(), "ready", layer)
            self._note_copies()

    def release(self, layer: int) -> None:
        """See Prefetcher."""
        begin = self._clock()
        super().release(layer)
        self._note(begin, "release", layer)

    def close(self, timeout_s: float) -> None:
        """See Prefetcher."""
        super().close(timeout_s)
        self._note_copies()

    def _pull(self, layer: int, after: Event | None) -> Event:
        copied = super()._pull(layer, after)
        self._copies.append((copied, layer))
        self._note(self._clock(), "submit", layer)
        return copied

    def _note(self, time_ns: int, kind: TraceKind, layer: int) -> None:
        self._trace.append(TraceEvent(time_ns, kind, layer, self.slot_of(layer)))

    def _note_copies(self) -> None:
        waiting = []
        for event, layer in self._copies:
            if not self._engine.ready(event):
                waiting.append((event, layer))
            elif (span := event.span()) is not None:
                self._note(span.begin_ns, "copy_begin", layer)
                self._note(span.end_ns, "copy_end", layer)
        self._copies = waiting
