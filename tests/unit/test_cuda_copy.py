"""The CUDA copy engine on simulated CUDA: graphs, events, exposed waits, limits of time, closing."""

import pickle
from collections.abc import Iterator

import pytest

from tests.unit.cuda_bench import SIZE, Bench, open_bench
from tests.unit.cuda_rank import LIMIT_S
from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.transport.base import Event, InCapture, Program
from vllm_dwdp.transport.cuda_device import CudaError
from vllm_dwdp.transport.cuda_events import NOISE_S
from vllm_dwdp.transport.shm_copy import ShmEvent


@pytest.fixture
def bench() -> Iterator[Bench]:
    with open_bench() as made:
        yield made


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("slices", [1, 4, 64])
def test_copies_arrive(graphs: bool, slices: int) -> None:
    bench = Bench(graphs=graphs)
    program = bench.program(slices)
    assert (program.pulled_bytes, program.merged_bytes, program.copies) == (
        SIZE - SIZE // slices,
        SIZE // slices,
        slices,
    )
    assert (program.graph is not None) == graphs
    bound = bench.device.calls["copy_async"]
    assert bound == (slices if graphs else 0)
    event = bench.engine.submit(program)
    bench.engine.finish(event, LIMIT_S)
    assert bench.arrived() and bench.engine.ready(event) and event.span() is None
    assert bench.device.calls["copy_async"] == slices
    assert bench.device.calls["launch"] == graphs
    bench.engine.close(LIMIT_S)


def test_slices_run_one_after_the_other(bench: Bench) -> None:
    graph = bench.program(9).graph
    assert graph is not None
    nodes = bench.device.graphs[graph]
    assert sum(not node.after for node in nodes) == 1
    assert all(len(node.after) <= 1 for node in nodes)


def test_a_program_without_copies_is_an_event(bench: Bench) -> None:
    program = bench.engine.bind([])
    assert program.graph is None and program.copies == 0
    bench.engine.finish(bench.engine.submit(program, bench.engine.record()), LIMIT_S)


def test_wait_does_not_block_and_what_was_exposed_is_told_once(bench: Bench) -> None:
    engine, device, machine = bench.engine, bench.device, bench.machine
    program, told = bench.program(), []
    for delay in (0.25, 0.5):
        machine.frozen = True
        device.delay(engine.stream, delay)
        engine.wait(engine.submit(program, engine.record()), LIMIT_S)
        told.append(engine.take_exposed())
        machine.frozen = False
        machine.drain()
    assert told == [(0, 0.0), (1, pytest.approx(0.25, abs=1e-4))]
    assert engine.take_exposed() == (1, pytest.approx(0.5, abs=1e-4))
    assert engine.take_exposed() == (0, 0.0)


def test_waits_nobody_asked_about_are_told_together(bench: Bench) -> None:
    engine, device, machine = bench.engine, bench.device, bench.machine
    for delay in (0.25, 0.5):
        machine.frozen = True
        device.delay(engine.stream, delay)
        engine.wait(engine.submit(bench.program(), engine.record()), LIMIT_S)
        machine.frozen = False
        machine.drain()
    assert engine.take_exposed() == (2, pytest.approx(0.75, abs=1e-4))


def test_noise_counts_as_no_wait(bench: Bench) -> None:
    for delay, expected in ((NOISE_S / 2, 0.0), (NOISE_S * 2, NOISE_S * 2)):
        bench.machine.frozen = True
        bench.device.delay(bench.engine.stream, delay)
        bench.engine.wait(bench.engine.submit(bench.engine.bind([]), bench.engine.record()), LIMIT_S)
        bench.machine.frozen = False
        bench.machine.drain()
        assert bench.engine.take_exposed() == (expected > 0, pytest.approx(expected))


def test_a_hidden_copy_exposes_nothing(bench: Bench) -> None:
    program = bench.program()
    for _ in range(5):
        bench.machine.frozen = True
        event = bench.engine.submit(program, bench.engine.record())
        bench.device.kernel([lambda: None], seconds=1.0)  # compute that hides the copy
        bench.engine.wait(event, LIMIT_S)
        bench.machine.frozen = False
        bench.machine.drain()
        assert bench.engine.take_exposed() == (0, 0.0)


def test_events_are_pooled(bench: Bench) -> None:
    program = bench.program()
    for _ in range(10):  # waits are read some at a time
        bench.engine.wait(bench.engine.submit(program, bench.engine.record()), LIMIT_S)
        bench.machine.drain()
    made = bench.device.calls["make_event"]
    for _ in range(50):
        bench.engine.wait(bench.engine.submit(program, bench.engine.record()), LIMIT_S)
        bench.machine.drain()
    assert bench.device.calls["make_event"] == made


def test_an_overdue_copy_is_noticed_at_submit_wait_and_close() -> None:
    bench = Bench(timeout_s=0.02)
    program = bench.program()
    bench.machine.frozen = True
    event = bench.engine.submit(program)
    assert not bench.engine.ready(event)
    with pytest.raises(DwdpTimeout, match=r"not done after 0.01 s"):
        bench.engine.finish(event, 0.01)
    with pytest.raises(DwdpTimeout, match=r"not done after 0.03 s"):
        bench.engine.close(0.03)
    with pytest.raises(DwdpTimeout, match=r"not done after 0.02 s"):
        bench.engine.submit(program)
    with pytest.raises(DwdpTimeout, match=r"not done after 0.005 s"):
        bench.engine.wait(event, 0.005)
    bench.machine.frozen = False
    bench.engine.close(LIMIT_S)
    assert bench.arrived()


def test_no_more_work_is_given_once_a_copy_is_overdue(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that could block in CUDA looks at the limit first, also those about a younger copy."""
    now = [100.0]
    monkeypatch.setattr("vllm_dwdp.transport.cuda_copy.time.monotonic", lambda: now[0])
    program, engine = bench.program(), bench.engine
    bench.machine.frozen = True
    engine.submit(program)
    now[0] += 299.0
    younger = engine.submit(program)
    release = engine.record()
    engine.wait(younger, LIMIT_S)
    now[0] += 2.0  # more than timeout_s after the first one, and 2 s after the other
    streams = bench.device.streams.values()
    given = [len(stream.work) for stream in streams]
    for call in (engine.record, lambda: engine.submit(program, release), lambda: engine.wait(younger, LIMIT_S)):
        with pytest.raises(DwdpTimeout, match="not done after 300 s"):
            call()
    assert [len(stream.work) for stream in streams] == given
    bench.machine.frozen = False
    bench.machine.drain()
    engine.wait(engine.submit(program, engine.record()), LIMIT_S)
    now[0] += 1000.0
    bench.machine.drain()
    engine.record()  # long ago, and done


def test_a_copy_that_is_done_tells_nothing_of_later_ones(bench: Bench) -> None:
    """Nor does a wait that was read: what is not known to be done is waited for at the end."""
    engine, machine, program = bench.engine, bench.machine, bench.program()
    first = engine.submit(program)
    machine.drain()
    machine.frozen = True
    engine.submit(program)
    engine.wait(first, LIMIT_S)
    with pytest.raises(DwdpTimeout):
        engine.close(0.01)
    engine.wait(engine.submit(program), LIMIT_S)
    machine.frozen = False
    machine.drain()
    machine.frozen = True
    engine.submit(program)
    assert engine.take_exposed().waits <= 1
    with pytest.raises(DwdpTimeout):
        engine.close(0.01)


def test_a_wait_in_a_capture_is_refused_by_cuda_itself(bench: Bench) -> None:
    event = bench.engine.submit(bench.program())
    bench.machine.drain()
    bench.device.begin_torch_capture()
    with pytest.raises(InCapture, match="inside of a CUDA graph"):
        bench.engine.wait(event, LIMIT_S)
    bench.device.destroy_graph(bench.device.end_torch_capture())
    bench.engine.wait(event, LIMIT_S)


def test_events_that_outlive_the_engine_are_destroyed_too(bench: Bench) -> None:
    event: Event | None = bench.engine.submit(bench.program())
    bench.engine.close(LIMIT_S)
    assert event is not None and bench.engine.ready(event) and len(bench.device.events) == 1
    event = None
    assert not bench.device.events


def test_closed_means_closed(bench: Bench) -> None:
    program, event = bench.program(), bench.engine.record()
    bench.engine.close(LIMIT_S)
    for call in (
        lambda: bench.engine.submit(program),
        lambda: bench.engine.wait(event, 1.0),
        lambda: bench.engine.bind([]),
        bench.engine.record,
    ):
        with pytest.raises(DwdpError, match="closed"):
            call()


def test_what_is_not_of_this_engine_is_refused(bench: Bench) -> None:
    with pytest.raises(DwdpError, match="ShmEvent reached the CUDA copy engine"):
        bench.engine.wait(ShmEvent(), 1.0)
    with pytest.raises(DwdpError, match="Program reached the CUDA copy engine"):
        bench.engine.submit(Program(0, 0, 0))


@pytest.mark.parametrize("call", ["launch", "record", "wait_event", "query"])
def test_every_failure_is_raised(bench: Bench, call: str) -> None:
    program, release = bench.program(), bench.engine.record()
    bench.engine.submit(program)
    bench.device.fail[call] = "cudaErrorECCUncorrectable"
    with pytest.raises(CudaError, match="cudaErrorECCUncorrectable") as caught:
        bench.engine.wait(bench.engine.submit(program, release), LIMIT_S)
    assert "\n" not in str(caught.value)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (str(copied), copied.code) == (str(caught.value), "cudaErrorECCUncorrectable")


def test_nothing_is_asked_of_events_in_a_capture(bench: Bench) -> None:
    """CUDA would refuse it, and end the capture."""
    bench.machine.frozen = True
    event = bench.engine.submit(bench.program())
    assert not bench.engine.capturing()
    bench.device.begin_torch_capture()
    queries = bench.device.calls["query"]
    assert bench.engine.capturing() and not bench.engine.ready(event)
    assert bench.device.calls["query"] == queries
    bench.device.destroy_graph(bench.device.end_torch_capture())
    assert not bench.engine.capturing()


def test_a_program_that_cannot_be_built_leaves_the_engine_usable(bench: Bench) -> None:
    bench.device.fail["copy_async"] = "cudaErrorInvalidValue"
    with pytest.raises(CudaError, match=r"copy_async failed \(cudaErrorInvalidValue: made to fail\)"):
        bench.program()
    bench.engine.finish(bench.engine.submit(bench.program()), LIMIT_S)
    assert bench.arrived()
