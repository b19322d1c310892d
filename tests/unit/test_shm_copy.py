"""The copy thread of the shm transport."""

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.unit.helpers import LIMIT_S, PAGE
from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.transport.base import Copy
from vllm_dwdp.transport.shm import ShmTransport
from vllm_dwdp.transport.shm_copy import FEW_COPIES, ShmCopyEngine, ShmEvent


@pytest.fixture
def start_engine() -> Iterator[Callable[..., ShmCopyEngine]]:
    engines: list[ShmCopyEngine] = []

    def start(**options: object) -> ShmCopyEngine:
        engines.append(ShmCopyEngine(**options))  # type: ignore[arg-type]
        return engines[-1]

    yield start
    for engine in engines:
        engine.close(LIMIT_S)
        engine.close(LIMIT_S)


@pytest.mark.parametrize("count", [1, FEW_COPIES, FEW_COPIES + 1, 40])
@pytest.mark.parametrize("odd", [0, 1, 8])
def test_copies_arrive(
    transport: ShmTransport, start_engine: Callable[..., ShmCopyEngine], count: int, odd: int
) -> None:
    size = 700_000 + odd  # more than one chunk of torch's
    source, slot = transport.allocate_slab(count * size), transport.allocate_slot(2 * count * size)
    source.tensor().random_()
    copies = [Copy(slot.address + 2 * i * size, source.address + i * size, size) for i in range(count)]
    engine = start_engine()
    with torch.inference_mode():  # as in a worker's start-up
        program = engine.bind(copies[:1], copies[1:])
    assert (program.pulled_bytes, program.merged_bytes, program.copies) == (size, (count - 1) * size, count)
    assert (program.batch is None) == (count <= FEW_COPIES or odd % 16 != 0)
    event = engine.submit(program)
    engine.wait(event, LIMIT_S)
    assert engine.ready(event)
    engine.take_exposed()
    engine.wait(event, LIMIT_S)
    assert engine.take_exposed() == (0, 0.0)
    span = event.span()
    assert span is not None and span.end_ns > span.begin_ns
    rows = slot.tensor().view(count, 2, size)
    assert torch.equal(rows[:, 0].flatten(), source.tensor()) and not rows[:, 1].any()


def test_neighbours_are_joined_and_order_is_kept(start_engine: Callable[..., ShmCopyEngine]) -> None:
    copies = [Copy(100, 1000, 10), Copy(110, 1010, 5), Copy(115, 2000, 5), Copy(120, 2005, 5), Copy(0, 2010, 1)]
    assert start_engine().bind(copies).moves == (Copy(100, 1000, 15), Copy(115, 2000, 10), Copy(0, 2010, 1))


def test_programs_and_slices_run_in_order(transport: ShmTransport, start_engine: Callable[..., ShmCopyEngine]) -> None:
    seen: list[Copy] = []
    engine = start_engine(before_copy=seen.append)
    slot = transport.allocate_slot(PAGE).address
    copies = [[Copy(slot + 10 * i + j, slot + 2000, 1) for j in range(10)] for i in range(20)]
    programs = [engine.bind(part) for part in copies]
    events = [engine.submit(program, engine.record()) for program in programs]
    engine.wait(events[-1], LIMIT_S)
    assert seen == [copy for part in copies for copy in part]
    assert all(engine.ready(event) for event in events)


def test_a_copy_waits_for_the_release_of_its_slot(
    transport: ShmTransport, start_engine: Callable[..., ShmCopyEngine]
) -> None:
    engine = start_engine()
    slot = transport.allocate_slot(PAGE)
    program = engine.bind([Copy(slot.address, slot.address + 100, 1)])
    slot.tensor()[100] = 5
    release = ShmEvent()
    event = engine.submit(program, release)
    with pytest.raises(DwdpTimeout, match=r"not done after 0.05 s"):
        engine.wait(event, 0.05)
    assert not engine.ready(event) and slot.tensor()[0] == 0
    with engine._ended:
        release.done = True
        engine._ended.notify_all()
    engine.wait(event, LIMIT_S)
    assert slot.tensor()[0] == 5


def test_what_was_exposed_is_told_once(transport: ShmTransport, start_engine: Callable[..., ShmCopyEngine]) -> None:
    engine = start_engine(before_copy=lambda copy: time.sleep(0.05))
    slot = transport.allocate_slot(PAGE).address
    program = engine.bind([Copy(slot, slot + 100, 1)])
    for _ in range(2):
        engine.wait(engine.submit(program), LIMIT_S)
    engine.finish(engine.submit(program), LIMIT_S)  # set-up
    waits, seconds = engine.take_exposed()
    assert waits == 2 and 0.05 < seconds < LIMIT_S
    assert engine.take_exposed() == (0, 0.0)


def test_errors_of_the_thread_reach_wait_and_the_thread_goes_on(
    transport: ShmTransport, start_engine: Callable[..., ShmCopyEngine]
) -> None:
    def fail(copy: Copy) -> None:
        if copy.nbytes == 13:
            raise RuntimeError("made to fail")

    engine = start_engine(before_copy=fail, timeout_s=0.05)
    slot = transport.allocate_slot(PAGE).address
    bad, good = engine.bind([Copy(slot, slot + 100, 13)]), engine.bind([Copy(slot, slot + 100, 14)])
    first, second, third = engine.submit(bad), engine.submit(good, ShmEvent()), engine.submit(good)
    with pytest.raises(DwdpError, match="failed: made to fail"):
        engine.wait(first, LIMIT_S)
    with pytest.raises(DwdpError, match=r"the release of a slot is not done after 0.05 s"):
        engine.wait(second, LIMIT_S)
    engine.wait(third, LIMIT_S)
    assert first.span() is None and engine.ready(first)


def test_closing_finishes_what_was_submitted(transport: ShmTransport) -> None:
    engine = transport.copy_engine()
    slot = transport.allocate_slot(PAGE)
    slot.tensor()[100] = 5
    program = engine.bind([Copy(slot.address, slot.address + 100, 1)])
    events = [engine.submit(program) for _ in range(50)]
    engine.close(LIMIT_S)
    assert all(engine.ready(event) for event in events) and slot.tensor()[0] == 5
    with pytest.raises(DwdpError, match="closed engine"):
        engine.submit(program)


def test_closing_has_a_time_limit(transport: ShmTransport) -> None:
    release = ShmEvent()
    engine = ShmCopyEngine(LIMIT_S)
    slot = transport.allocate_slot(PAGE).address
    engine.submit(engine.bind([Copy(slot, slot + 100, 1)]), release)
    with pytest.raises(DwdpTimeout, match=r"still running after 0.05 s"):
        engine.close(0.05)
    with engine._ended:
        release.done = True
        engine._ended.notify_all()
    engine.close(LIMIT_S)


def test_the_thread_runs_where_it_is_told(transport: ShmTransport) -> None:
    core = min(os.sched_getaffinity(0))
    engine = ShmCopyEngine(LIMIT_S, [core])
    assert os.sched_getaffinity(engine._thread.native_id or 0) == {core}
    engine.close(LIMIT_S)
    threads = threading.active_count()
    with pytest.raises(DwdpError, match=r"cannot run on cores \[9999\]"):
        ShmCopyEngine(LIMIT_S, [9999])
    assert threading.active_count() == threads
