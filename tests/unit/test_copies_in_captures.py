"""Copies while the compute stream is captured: they run at the replay, have to be joined, and failures are told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.cuda_bench import Bench, open_bench
from tests.unit.cuda_rank import LIMIT_S
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.cuda_device import CudaError


@pytest.fixture
def bench(quick_collections: None) -> Iterator[Bench]:
    with open_bench() as made:
        yield made


def test_a_capture_that_ended_without_join_is_told() -> None:
    bench = Bench()
    program = bench.program()
    bench.device.begin_torch_capture()
    event = bench.engine.submit(program, bench.engine.record())
    assert bench.engine.capturing()
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureUnjoined"):
        bench.device.end_torch_capture()
    bench.device.current = 0
    assert not bench.engine.capturing()
    with pytest.raises(DwdpError, match="a CUDA graph capture ended without its copies"):
        bench.engine.wait(event, LIMIT_S)


def test_a_failed_capture_leaves_the_engine_usable(bench: Bench) -> None:
    bench.device.fail["copy_async"] = "cudaErrorInvalidValue"
    with pytest.raises(CudaError, match=r"copy_async failed \(cudaErrorInvalidValue: made to fail\)"):
        bench.program()
    bench.engine.finish(bench.engine.submit(bench.program()), LIMIT_S)
    assert bench.arrived()


def test_copies_of_a_capture_run_at_its_replay(bench: Bench) -> None:
    program = bench.program()
    bench.device.begin_torch_capture()
    event = bench.engine.submit(program, bench.engine.record())
    assert bench.engine.wait(event, LIMIT_S) is None
    bench.engine.join()
    graph = bench.device.end_torch_capture()
    bench.machine.drain()
    assert not bench.arrived() and bench.engine.ready(event)
    assert bench.engine.wait(event, LIMIT_S) == 0.0  # of a capture: complete, as far as eager compute is concerned
    bench.device.launch(graph, 0)
    bench.machine.drain()
    assert bench.arrived()
    bench.device.destroy_graph(graph)


def test_a_capture_without_join_is_refused_by_cuda(bench: Bench) -> None:
    program = bench.program()
    bench.device.begin_torch_capture()
    bench.engine.submit(program, bench.engine.record())
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureUnjoined"):
        bench.device.end_torch_capture()
    bench.device.current = 0
    bench.engine.finish(bench.engine.submit(program), LIMIT_S)
    assert bench.arrived()
    for stream in [s for s in bench.device.streams if s and s not in bench.engine._streams]:
        bench.device.destroy_stream(stream)


def test_nothing_is_queried_in_a_capture(bench: Bench) -> None:
    program = bench.program()
    bench.machine.frozen = True
    before = bench.engine.submit(program)
    bench.device.begin_torch_capture()
    queries = bench.device.calls["query"]
    assert not bench.engine.ready(before)
    assert bench.engine.wait(before, LIMIT_S) is None
    bench.engine.submit(program, bench.engine.record())
    bench.engine.join()
    assert bench.device.calls["query"] == queries
    bench.device.destroy_graph(bench.device.end_torch_capture())
    bench.engine.join()  # outside a capture it does nothing
    assert bench.engine._capture == 2
