"""Which calls of CuPy's runtime the device makes, and what becomes of their answers. The runtime is made up: no GPU here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.cuda_cupy import CupyDevice
from vllm_dwdp.transport.cuda_device import CudaError

SUCCESS, NOT_READY, ILLEGAL_ADDRESS, LAUNCH_TIMEOUT = 0, 600, 700, 702


class Runtime(ModuleType):
    """cupy.cuda.runtime, as far as it goes: constants as in CUDA's headers, and every call written down."""

    streamDefault, streamNonBlocking = 0, 1
    eventDefault, eventDisableTiming = 0, 2
    memcpyDefault = 4
    streamCaptureModeRelaxed = 2

    def __init__(self) -> None:
        super().__init__("cupy.cuda.runtime")
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {"getDeviceCount": 2}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            answer = self.answers.get(name, 0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    def check_status(self, code: int) -> None:
        """As CuPy's, which raises CUDARuntimeError, a RuntimeError."""
        if code:
            raise RuntimeError(f"cudaErrorCode{code}: made up")

    def called(self, name: str) -> tuple[Any, ...]:
        """The arguments of the last call of `name`."""
        return [call[1:] for call in self.calls if call[0] == name][-1]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(runtime=made))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: made.calls.append(("torch", index)))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    return made


@pytest.fixture
def device(runtime: Runtime) -> CupyDevice:
    return CupyDevice(1)


def test_a_failed_copy_is_no_copy_that_is_done(runtime: Runtime, device: CupyDevice) -> None:
    """An event behind a failed kernel or copy answers with the error, and goes on doing so."""
    for code, done in ((SUCCESS, True), (NOT_READY, False)):
        runtime.answers["eventQuery"] = code
        assert device.query(5) is done
    for code in (ILLEGAL_ADDRESS, LAUNCH_TIMEOUT):
        runtime.answers["eventQuery"] = code
        with pytest.raises(CudaError, match=f"cudaErrorCode{code}"):
            device.query(5)


def test_copies_do_not_wait_for_the_default_stream(runtime: Runtime, device: CupyDevice) -> None:
    """A stream that is not non-blocking waits for all that runs on the default stream, and the default stream for it."""
    device.make_stream()
    flags, priority = runtime.called("streamCreateWithPriority")
    assert flags == Runtime.streamNonBlocking and priority < 0
    assert device.compute_stream() == 77


def test_events_keep_times_only_where_they_are_asked_for(runtime: Runtime, device: CupyDevice) -> None:
    for timing, flags in ((True, Runtime.eventDefault), (False, Runtime.eventDisableTiming)):
        device.make_event(timing)
        assert runtime.called("eventCreateWithFlags") == (flags,)
    runtime.answers["eventElapsedTime"] = 3.0  # milliseconds
    assert device.elapsed_s(1, 2) == 0.003


def test_order_of_arguments(runtime: Runtime, device: CupyDevice) -> None:
    device.record(1, 2)
    device.wait_event(3, 4)
    device.copy_async(10, 20, 30, 40)
    device.launch(5, 6)
    device.begin_capture(7)
    assert device.capturing(8) is False
    assert runtime.called("eventRecord") == (1, 2) and runtime.called("streamWaitEvent") == (3, 4)
    assert runtime.called("memcpyAsync") == (10, 20, 30, Runtime.memcpyDefault, 40)
    assert runtime.called("graphLaunch") == (5, 6) and runtime.called("streamIsCapturing") == (8,)
    assert runtime.called("streamBeginCapture") == (7, Runtime.streamCaptureModeRelaxed)
    assert runtime.called("setDevice") == (1,) and ("torch", 1) in runtime.calls


def test_memory_is_zero_before_anybody_has_it(runtime: Runtime, device: CupyDevice) -> None:
    device.zero(100, 8)
    assert [call[0] for call in runtime.calls[-2:]] == ["memset", "streamSynchronize"]
    assert runtime.called("memset") == (100, 0, 8)


def test_a_graph_that_cannot_be_made_leaves_no_template(runtime: Runtime, device: CupyDevice) -> None:
    runtime.answers |= {"streamEndCapture": 9, "graphInstantiate": RuntimeError("cudaErrorMemoryAllocation: no memory")}
    with pytest.raises(CudaError, match="graphInstantiate"):
        device.end_capture(2)
    assert runtime.called("graphDestroy") == (9,)


def test_failures_name_the_call_and_a_device_that_is_not_there_the_variable(runtime: Runtime) -> None:
    with pytest.raises(DwdpError, match="GPU 2 of 2 visible ones: check CUDA_VISIBLE_DEVICES"):
        CupyDevice(2)
    device = CupyDevice(0)
    calls: dict[str, Callable[[], Any]] = {
        "memcpyAsync": lambda: device.copy_async(1, 2, 3, 4),
        "eventRecord": lambda: device.record(1, 2),
        "graphLaunch": lambda: device.launch(1, 2),
        "streamWaitEvent": lambda: device.wait_event(1, 2),
    }
    for name, call in calls.items():
        runtime.answers[name] = RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")
        with pytest.raises(CudaError, match=rf"{name} failed \(cudaErrorIllegalAddress: an illegal"):
            call()
    runtime.answers["malloc"] = RuntimeError("cudaErrorMemoryAllocation: out of memory")
    with pytest.raises(CudaError, match="out of memory") as caught:
        device.malloc(1 << 20)
    assert caught.value.code == "cudaErrorMemoryAllocation"


def test_a_tensor_of_a_peers_memory_is_said_to_be_here(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would ask the driver, which names the peer's device."""
    device, owner = CupyDevice(1), object()
    made: list[tuple[Any, ...]] = []

    def unowned(address: int, nbytes: int, owner: object, device_id: int) -> str:
        made.append((address, nbytes, owner, device_id))
        return "memory"

    cupy: Any = sys.modules["cupy"]
    cupy.uint8 = "uint8"
    cupy.cuda = SimpleNamespace(UnownedMemory=unowned, MemoryPointer=lambda memory, offset: (memory, offset))
    cupy.ndarray = lambda shape, dtype, pointer: (shape, dtype, pointer)
    monkeypatch.setattr(torch, "from_dlpack", lambda array: array)
    found: Any = device.local_tensor(4096, 10, owner)
    assert found == ((10,), "uint8", ("memory", 0)) and made == [(4096, 10, owner, 1)]
