"""The copy engine of GPUs: a copy stream beside the compute stream, one pre-built graph of copy nodes per layer.

    copy stream   wait(after) | graph of the layer's copies | record(end)         compute: wait(end)

A graph costs the host 32 microseconds per 1,024 copies within one GPU, and 3 to 50 and 1 to 2 a copy over NVLink; a loop
over memcpyAsync costs 3 to 16 a copy (measured). Copies keep the plan's borders and run one after the other: several at a
time, also one from each peer, gained nothing over NVLink.
"""

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.transport.base import Copy, CopyEngine, Event, Exposed, InCapture, Program
from vllm_dwdp.transport.cuda_device import CudaDevice, CudaError
from vllm_dwdp.transport.cuda_events import AT_A_TIME, CudaEvent, EventPool, ExposedWaits

_POLL_S: Final = 100e-6
#: Copies that nobody waited for, before the device is asked which of them are done.
_MOST_UNDER_WAY: Final = 256


@dataclass(frozen=True)
class CopyOptions:
    """graphs: False issues every slice on its own, for comparison. timeout_s: a copy that has not ended this long after it
    was submitted is an error."""

    graphs: bool = True
    timeout_s: float = 300.0


@dataclass(frozen=True, eq=False)
class CudaProgram(Program):
    """slices: in issue order. graph: of the slices; None where there are none, or graphs are off."""

    slices: tuple[Copy, ...]
    graph: int | None


class CudaCopyEngine(CopyEngine):
    """See CopyEngine; one thread uses it. `wait` never blocks the host: `finish` and `close` do, with a limit.

    CUDA itself blocks a host that has given a stream about a thousand pieces of work that do not end, so limits are looked
    at before work is given; what is not ours (kernels, the wait for a step's tokens) blocks without one.

    Nothing may be submitted, recorded or waited for while the compute stream is captured (`capturing`). `wait` begins with a
    query, which CUDA refuses in a capture, so that it need not ask.

    Copies end in the order of submission: one that is known to be done tells of all before it, without a call.
    """

    exposed_every = AT_A_TIME

    def __init__(self, device: CudaDevice, options: CopyOptions) -> None:
        self._device = device
        self._options = options
        #: On which programs run, one after the other; measurements read it.
        self.stream = device.make_stream()
        self._events = EventPool(device, timing=False)
        self._ends = EventPool(device, timing=True)
        self._exposed = ExposedWaits(device, self._forget)
        self._submitted = 0
        self._graphs: list[int] = []
        self._under_way: deque[CudaEvent] = deque()
        self._closed = False

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
        device, stream = self._device, self.stream
        self._check_overdue()
        if len(self._under_way) >= _MOST_UNDER_WAY:
            self._forget_ended()
        if after is not None:
            device.wait_event(stream, _own(after).raw)
        if program.graph is not None:
            device.launch(program.graph, stream)
        else:
            self._issue(program.slices)
        self._submitted += 1
        end = CudaEvent(self._ends, time.monotonic() + self._options.timeout_s, self._submitted)
        device.record(end.raw, stream)
        self._under_way.append(end)
        return end

    def record(self) -> CudaEvent:
        """See CopyEngine. Raises DwdpTimeout where a copy is overdue."""
        self._check_open()
        self._check_overdue()
        event = CudaEvent(self._events)
        self._device.record(event.raw, self._device.compute_stream())
        return event

    def wait(self, event: Event, timeout_s: float) -> None:
        """See CopyEngine. Raises DwdpTimeout where the copy was submitted `timeout_s` ago or more and is not done."""
        self._check_open()
        mine, device = _own(event), self._device
        try:
            # A query costs a microsecond and spares a wait on the device, an event and its time.
            done = device.query(mine.raw)
        except CudaError as error:
            if error.in_capture:
                raise InCapture(f"a copy was waited for inside of a CUDA graph: {error}") from error
            raise
        if done:
            self._forget(mine)
            return
        submitted = mine.deadline - self._options.timeout_s
        if mine.deadline and time.monotonic() > submitted + timeout_s:
            raise _overdue(timeout_s)
        self._check_overdue()
        if mine.number:
            self._exposed.wait(device.compute_stream(), mine)
        else:
            device.wait_event(device.compute_stream(), mine.raw)

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
        self._ends.close()
        self._device.destroy_stream(self.stream)

    def _build(self, slices: Sequence[Copy]) -> int:
        self._device.begin_capture(self.stream)
        try:
            self._issue(slices)
        except BaseException:
            # So that the stream can be used again; the first error is the one to tell.
            with suppress(DwdpError):
                self._device.destroy_graph(self._device.end_capture(self.stream))
            raise
        graph = self._device.end_capture(self.stream)
        self._graphs.append(graph)
        return graph

    def _issue(self, slices: Sequence[Copy]) -> None:
        for dst, src, nbytes in slices:
            self._device.copy_async(dst, src, nbytes, self.stream)

    def _check_open(self) -> None:
        if self._closed:
            raise DwdpError("the copy engine is closed: close the prefetcher first, and use neither any more")

    def _check_overdue(self) -> None:
        """Raises DwdpTimeout where a copy that has not ended is overdue; asks the device only where one may be."""
        if self._under_way and time.monotonic() > self._under_way[0].deadline:
            self._forget_ended()
            if self._under_way and time.monotonic() > self._under_way[0].deadline:
                raise _overdue(self._options.timeout_s)

    def _forget_ended(self) -> None:
        while self._under_way and self._device.query(self._under_way[0].raw):
            self._under_way.popleft()

    def _forget(self, copy: CudaEvent) -> None:
        """`copy` is done, and so are all before it."""
        while self._under_way and self._under_way[0].number <= copy.number:
            self._under_way.popleft()


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
