"""How long compute stood still for copies, told from pooled events: once, and right."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.cuda_bench import open_bench
from tests.unit.cuda_rank import LIMIT_S
from vllm_dwdp.transport.base import Exposed
from vllm_dwdp.transport.cuda_events import AT_A_TIME, NOISE_S

pytestmark = pytest.mark.alone

#: (what, number): a number chooses a copy, a stream or a duration.
STEPS = st.tuples(
    st.sampled_from(
        ["submit", "wait", "wait", "compute", "delay", "take", "wander", "drain", "drop", "stream", "after"]
    ),
    st.integers(0, 1000),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, max_size=120))
def test_every_wait_is_told_once_and_right(steps: list[tuple[str, int]]) -> None:
    """Copies are waited for late, twice or never, their events dropped, and compute changes its stream."""
    told, waits = Exposed(0, 0.0), []
    with open_bench() as bench:
        engine, device, machine = bench.engine, bench.device, bench.machine
        program = bench.program(2)
        streams, kept = [0, device.make_stream()], []
        wait = engine._exposed.wait

        def watched(stream: int, copy: object) -> None:
            wait(stream, copy)  # type: ignore[arg-type]
            _, begin, end = engine._exposed._waits[-1]
            waits.append((device.events[begin].point, device.events[end.raw].point))

        engine._exposed.wait = watched  # type: ignore[method-assign]
        for what, number in steps:
            if what in ("submit", "after"):
                kept.append(engine.submit(program, engine.record() if what == "after" else None))
            elif what == "wait" and kept:
                engine.wait(kept[number % len(kept)], LIMIT_S)
            elif what == "drop" and kept:
                del kept[number % len(kept)]
            elif what == "compute":
                device.kernel([lambda: None], seconds=number * 1e-4)
            elif what == "delay":
                device.delay(engine.stream, number * 1e-4)
            elif what == "stream":
                device.current = streams[number % 2]
            elif what == "wander":
                machine.wander(number % 20)
            elif what == "drain":
                machine.drain()
            elif what == "take":
                new = engine.take_exposed()
                told = Exposed(told.waits + new.waits, told.seconds + new.seconds)
        machine.drain()
        new = engine.take_exposed()
        told = Exposed(told.waits + new.waits, told.seconds + new.seconds)
        seconds = [end.time - begin.time for begin, end in waits if begin and end]
        exposed = [each for each in seconds if each >= NOISE_S]
        assert told == (len(exposed), pytest.approx(sum(exposed), abs=1e-9))
        assert engine.take_exposed() == (0, 0.0) and not engine._exposed._waits
        device.current = 0
        device.destroy_stream(streams[1])
        kept.clear()


def test_a_stream_that_is_done_tells_nothing_of_another() -> None:
    """Compute that changed its stream, as captures do around a warm-up: the time of a wait not reached would be an error."""
    with open_bench() as bench:
        engine, device, machine, program = bench.engine, bench.device, bench.machine, bench.program()
        machine.frozen, device.current = True, device.make_stream()
        behind = device.current
        device.kernel([lambda: None], seconds=1.0)
        for _ in range(AT_A_TIME - 1):
            engine.wait(engine.submit(program), LIMIT_S)
        device.current = 0
        engine.wait(engine.submit(program), LIMIT_S)
        for stream in (engine.stream, 0):
            on = device.streams[stream]
            while on.can_go():
                on.step(machine.rng)
        assert engine.take_exposed() == (0, 0.0)
        machine.frozen = False
        machine.drain()
        waits, seconds = engine.take_exposed()
        assert waits == 1 and 0 < seconds < 0.1, "the other stream came after the copies"
        device.destroy_stream(behind)
