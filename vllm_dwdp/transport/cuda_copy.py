"""The copy engine of GPUs: copy streams beside the compute stream, one pre-built graph of copy nodes per layer.

    copy stream   wait(after) | graph of the layer's slices | record(end)         compute: wait(end)

A graph costs the host 32 microseconds per 1,024 slices within one GPU, and 3 to 50 and 1 to 2 a slice over NVLink; a loop
over memcpyAsync costs 3 to 16 a slice (measured). Slices keep the plan's borders, for they are the unit in which sources
are shared fairly; with in_flight > 1 they are dealt out to that many branches, so that slices of several peers run at a
time.
"""

import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Final

from vllm_dwdp.config import MOST_IN_FLIGHT
from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.transport.base import Copy, CopyEngine, Event, Exposed, Program
from vllm_dwdp.transport.cuda_device import CudaDevice
from vllm_dwdp.transport.cuda_events import CudaEvent, EventPool, ExposedWaits

_POLL_S: Final = 100e-6


@dataclass(frozen=True)
class CopyOptions:
    """in_flight: slices that may run at a time, 1 to 8. graphs: False issues every slice on its own, for comparison.
    timeout_s: a copy that has not ended this long after it was submitted is an error."""

    in_flight: int = 1
    graphs: bool = True
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.in_flight <= MOST_IN_FLIGHT:
            raise DwdpError(f"{self.in_flight} copies in flight: it must be in 1..{MOST_IN_FLIGHT}")


@dataclass(frozen=True, eq=False)
class CudaProgram(Program):
    """slices: in issue order. graph: of the slices; None where there are none, or graphs are off."""

    slices: tuple[Copy, ...]
    graph: int | None


class CudaCopyEngine(CopyEngine):
    """See CopyEngine; one thread uses it. `wait` never blocks the host: `finish` and `close` do, with a limit.

    CUDA itself blocks a host that has given a stream about a thousand pieces of work that do not end, so limits are looked
    at before work is given; what is not ours (kernels, the wait for a step's tokens) blocks without one.

    Nothing may be submitted, recorded or waited for while the compute stream is captured (`capturing`).
    """

    def __init__(self, device: CudaDevice, options: CopyOptions) -> None:
        self._device = device
        self._options = options
        with ExitStack() as made:
            self._streams = [self._stream(made) for _ in range(options.in_flight)]
            self._fork = self._event(made)
            self._joins = [self._event(made) for _ in self._streams[1:]]
            self._made = made.pop_all()
        self._events = EventPool(device, timing=False)
        self._exposed = ExposedWaits(device)
        self._graphs: list[int] = []
        self._under_way: deque[CudaEvent] = deque()
        self._closed = False

    @property
    def stream(self) -> int:
        """The stream on which programs begin and end, for measurements."""
        return self._streams[0]

    def bind(self, pulls: Sequence[Copy], local: Sequence[Copy] = ()) -> CudaProgram:
        """See CopyEngine; not while compute is captured."""
        self._check_open()
        slices = (*pulls, *local)
        graph = self._build(slices) if slices and self._options.graphs else None
        pulled, merged = sum(copy.nbytes for copy in pulls), sum(copy.nbytes for copy in local)
        return CudaProgram(pulled, merged, len(slices), slices, graph)

    def submit(self, program: Program, after: Event | None = None) -> CudaEvent:
        """See CopyEngine. Raises DwdpTimeout where an earlier copy is overdue."""
        self._check_open()
        if not isinstance(program, CudaProgram):
            raise DwdpError(f"a {type(program).__name__} reached the CUDA copy engine: submit what its bind returned")
        device, stream = self._device, self._streams[0]
        self._check_overdue()
        if after is not None:
            device.wait_event(stream, _own(after).raw)
        if program.graph is not None:
            device.launch(program.graph, stream)
        else:
            self._issue(program.slices)
        end = CudaEvent(self._events, deadline=time.monotonic() + self._options.timeout_s)
        device.record(end.raw, stream)
        self._under_way.append(end)
        return end

    def record(self) -> CudaEvent:
        """See CopyEngine. Raises DwdpTimeout where a copy is overdue."""
        self._check_open()
        if self._under_way and time.monotonic() > self._under_way[0].deadline:
            self._check_overdue()
        event = CudaEvent(self._events)
        self._device.record(event.raw, self._device.compute_stream())
        return event

    def wait(self, event: Event, timeout_s: float) -> None:
        """See CopyEngine. Raises DwdpTimeout where the copy was submitted `timeout_s` ago or more and is not done."""
        self._check_open()
        mine, device = _own(event), self._device
        # A query costs a microsecond and spares a wait on the device and two events.
        if not device.query(mine.raw):
            submitted = mine.deadline - self._options.timeout_s
            if mine.deadline and time.monotonic() > submitted + timeout_s:
                raise _overdue(timeout_s)
            self._check_overdue()
            self._exposed.bracket(device.compute_stream(), mine.raw)

    def take_exposed(self) -> Exposed:
        """See CopyEngine."""
        return self._exposed.take()

    def ready(self, event: Event) -> bool:
        """See CopyEngine; False in a capture, where nobody may ask."""
        mine = _own(event)
        return self._closed or (not self.capturing() and self._device.query(mine.raw))

    def finish(self, event: Event, timeout_s: float) -> None:
        """See CopyEngine."""
        deadline = time.monotonic() + timeout_s
        while not self.ready(event):
            if time.monotonic() > deadline:
                raise _overdue(timeout_s)
            time.sleep(_POLL_S)

    def capturing(self) -> bool:
        """See CopyEngine."""
        return self._device.capturing(self._device.compute_stream())

    def close(self, timeout_s: float) -> None:
        """See CopyEngine."""
        deadline = time.monotonic() + timeout_s
        while self._under_way:
            self.finish(self._under_way[0], max(0.0, deadline - time.monotonic()))
            self._under_way.popleft()
        if self._closed:
            return
        self._closed = True
        for graph in self._graphs:
            self._device.destroy_graph(graph)
        self._exposed.close()
        self._events.close()
        self._made.close()

    def _stream(self, made: ExitStack) -> int:
        stream = self._device.make_stream()
        made.callback(self._device.destroy_stream, stream)
        return stream

    def _event(self, made: ExitStack) -> int:
        event = self._device.make_event(timing=False)
        made.callback(self._device.destroy_event, event)
        return event

    def _build(self, slices: Sequence[Copy]) -> int:
        stream = self._streams[0]
        self._device.begin_capture(stream)
        try:
            self._issue(slices)
        except BaseException:
            self._abandon(stream)
            raise
        graph = self._device.end_capture(stream)
        self._graphs.append(graph)
        return graph

    def _abandon(self, stream: int) -> None:
        """End a failed capture, so that the stream can be used again; the first error is the one to tell."""
        with suppress(DwdpError):
            self._device.destroy_graph(self._device.end_capture(stream))

    def _issue(self, slices: Sequence[Copy]) -> None:
        """Give the slices to the first stream, or in turn to several that fork from it and join it again."""
        device, streams = self._device, self._streams[: max(1, len(slices))]
        first, others = streams[0], streams[1:]
        if others:
            device.record(self._fork, first)
            for stream in others:
                device.wait_event(stream, self._fork)
        for i, (dst, src, nbytes) in enumerate(slices):
            device.copy_async(dst, src, nbytes, streams[i % len(streams)])
        for stream, join in zip(others, self._joins, strict=False):
            device.record(join, stream)
            device.wait_event(first, join)

    def _check_open(self) -> None:
        if self._closed:
            raise DwdpError("the copy engine is closed: close the prefetcher first, and use neither any more")

    def _check_overdue(self) -> None:
        """Forget copies that have ended; raises DwdpTimeout where the oldest of the others is overdue."""
        while self._under_way and self._device.query(self._under_way[0].raw):
            self._under_way.popleft()
        if self._under_way and time.monotonic() > self._under_way[0].deadline:
            raise _overdue(self._options.timeout_s)


def _overdue(timeout_s: float) -> DwdpTimeout:
    return DwdpTimeout(
        f"a copy is not done after {timeout_s:.3g} s: raise dwdp.timeout_s, or look for a stalled device"
    )


def _own(event: Event) -> CudaEvent:
    if not isinstance(event, CudaEvent):
        raise DwdpError(
            f"an event of {type(event).__name__} reached the CUDA copy engine: use one engine per prefetcher"
        )
    return event
