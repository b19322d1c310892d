"""Prefetching of one rank's layers: acquire before a layer's expert compute, release after it.

    release(i): event of that very slot --after--> pull of the next layer in the slot's list      (copy engine)
    acquire(i): the slot's copy         --wait---> expert compute                                 (compute side)

A slot holds one layer or is being filled with it; either way `holds` says which, and `copied` when it may be read. It
is refilled only behind an event recorded on the compute side after its last use, so that nothing in use is overwritten;
and it is handed out only when it holds the layer asked for, so that nothing stale is read. Whatever the caller does
(aborted forwards, other orders) costs time at most.

No CUDA graph holds a copy: a slot that one replay filled would be stale in the next. Forwards that are captured read the
experts where they are (layers/views/direct.py), and `acquire` in a capture raises.
"""

import time
from collections.abc import Mapping, Sequence

from vllm_dwdp.copy_plan import CopyPlan, Slice
from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.base import Copy, CopyEngine, Event, InCapture, Program


class _Slot:
    """State of one slot."""

    __slots__ = ("copied", "holds", "number", "used_by")

    def __init__(self, number: int) -> None:
        self.number = number
        self.holds: int | None = None  # the layer it contains or is being filled with
        self.used_by: int | None = None  # the layer acquired and not yet released
        self.copied: Event | None = None  # the end of the copy submitted last


def bind_plan(engine: CopyEngine, plan: CopyPlan, slabs: Mapping[int, int], slot: int) -> Program:
    """Bind a plan to addresses of this process: slabs maps a rank to its slab of the layer, slot is the slot's own."""

    def absolute(slices: Sequence[Slice]) -> list[Copy]:
        return [Copy(slot + item.dst_offset, slabs[item.source] + item.src_offset, item.nbytes) for item in slices]

    return engine.bind(absolute(plan.pulls), absolute(plan.local))


def _captured(layer: int) -> DwdpError:
    return DwdpError(
        f"layer {layer} would be pulled inside of a CUDA graph, whose replays would read stale slots: raise "
        "dwdp.direct_tokens to the largest captured size, or choose -cc.cudagraph_mode NONE"
    )


class Prefetcher:
    """Keeps the slots of one rank filled; one thread calls it, the engine copies in the background."""

    def __init__(
        self,
        ring: Ring,
        engine: CopyEngine,
        programs: Sequence[Program],
        counters: CounterPage,
        timeout_s: float,
    ) -> None:
        """programs: per layer, each filling the slot `ring` names for it. timeout_s: limit of every wait."""
        if len(programs) != ring.num_layers:
            raise DwdpError(f"{len(programs)} programs for a ring of {ring.num_layers} layers: bind one per layer")
        self._ring = ring
        self._engine = engine
        self._programs = tuple(programs)
        self._page = counters.fields
        self._timeout_s = timeout_s
        self._exposed_every = engine.exposed_every
        self._slots = [_Slot(number) for number in range(ring.used_slots)]
        self._of_layer = [self._slots[ring.slot_of(layer)] for layer in range(ring.num_layers)]
        self._next = [ring.next_layer(layer) for layer in range(ring.num_layers)]
        self._acquired = ring.num_layers  # the last one, which tells where a forward begins
        self._closed = False
        self._computed: Event | None = None  # the end of all compute, once closed

    def slot_of(self, layer: int) -> int:
        """The number of the slot that serves `layer`."""
        return self._of_layer[layer].number

    def start(self) -> None:
        """Begin to fill every slot with its first layer; returns at once, and later calls do nothing."""
        self._check_open()
        for slot in self._slots:
            if slot.copied is None:
                self._pull(slot.number, None)

    def acquire(self, layer: int) -> None:
        """Return when compute may read the experts of `layer` from its slot, until `release`.

        A layer that is not in its slot nor on its way is fetched now, and the ring goes on from there. A layer that
        still holds the slot was aborted: its use is over, and prefetches nothing. Acquiring a layer twice does nothing.
        Raises DwdpTimeout, after which it may be tried again, and DwdpError if the copy failed, while a CUDA graph is
        captured, or if all is closed.
        """
        slot = self._of_layer[layer]
        # Asked once in a forward, whose layers come in order: a wait in a capture would be refused, and spoil it.
        first = layer <= self._acquired
        if (first or slot.used_by == layer or slot.holds != layer) and self._engine.capturing():
            raise _captured(layer)
        self._acquired = layer
        if slot.used_by == layer:
            return
        self._check_open()
        page = self._page
        if slot.holds != layer:
            slot.used_by = None
            page.on_demand_fetches += 1
            # Behind all compute issued so far, which includes an aborted use, and behind the copy in flight.
            self._pull(layer, self._engine.record())
        self._wait(slot)
        page.layers += 1
        slot.used_by = layer
        if page.layers % self._exposed_every == 0:
            self._count_exposed()

    def release(self, layer: int) -> None:
        """Compute has been given all work that reads the experts of `layer`; begins to pull the slot's next layer.

        Raises DwdpError, and changes nothing, for a layer that is not acquired: its slot may be in use by another one.
        """
        slot = self._of_layer[layer]
        if slot.used_by != layer:
            raise DwdpError(
                f"layer {layer} is released but slot {slot.number} is acquired by {slot.used_by}: acquire it first"
            )
        self._check_open()
        slot.used_by = None
        following = self._next[layer]
        if following is not None:
            self._pull(following, self._engine.record())

    def close(self, timeout_s: float) -> None:
        """Wait for the copies in flight and for compute, after which slots and slabs may be freed; idempotent.

        Raises DwdpTimeout, and can then be called again. A failed copy is over, and no error here.
        """
        deadline = time.monotonic() + timeout_s
        if not self._closed:
            # Kernels may read slots, and slabs of peers.
            self._computed = self._end_of_compute()
            self._closed = True
        if self._computed is not None:
            self._finish(self._computed, deadline)
            self._computed = None
        for slot in self._slots:
            if slot.copied is not None and not self._engine.ready(slot.copied):
                self._finish(slot.copied, deadline)

    def _end_of_compute(self) -> Event | None:
        """None on a device that failed, where nothing computes. Raises DwdpTimeout where a copy is overdue."""
        try:
            return self._engine.record()
        except DwdpTimeout:
            raise
        except DwdpError:
            return None

    def _finish(self, event: Event, deadline: float) -> None:
        """Raises DwdpTimeout; a failed copy is over."""
        try:
            self._engine.finish(event, max(0.0, deadline - time.monotonic()))
        except DwdpTimeout:
            raise
        except DwdpError:
            pass

    def _pull(self, layer: int, after: Event | None) -> Event:
        slot, program, page = self._of_layer[layer], self._programs[layer], self._page
        slot.holds = None
        slot.copied = self._engine.submit(program, after)
        slot.holds = layer
        page.pulls += 1
        page.pulled_bytes += program.pulled_bytes
        page.merged_bytes += program.merged_bytes
        return slot.copied

    def _wait(self, slot: _Slot) -> None:
        assert slot.copied is not None and slot.holds is not None
        try:
            self._engine.wait(slot.copied, self._timeout_s)
        except InCapture as error:
            raise _captured(slot.holds) from error
        except DwdpTimeout:
            raise  # the copy may still end
        except DwdpError:
            slot.holds = None  # what is there is no layer
            raise

    def _count_exposed(self) -> None:
        waits, seconds = self._engine.take_exposed()
        if waits:
            self._page.slot_waits += waits
            self._page.exposed_wait_ns += int(seconds * 1e9)

    def _check_open(self) -> None:
        if self._closed:
            raise DwdpError("the prefetcher is closed: no layer can be acquired or released any more")
