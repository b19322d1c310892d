"""What a GPU worker does between vLLM and the ring, and CuPy's runtime behind `CudaDevice`, without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.gpu_worker import Worker

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import configure, gpu_worker, worker
from vllm_dwdp.engine.gpu_worker import DwdpGPUWorker
from vllm_dwdp.engine.launch import DwdpLaunch
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.transport import cuda_cupy
from vllm_dwdp.transport.cuda_cupy import CupyDevice
from vllm_dwdp.transport.cuda_device import CudaError

RUNNERS = {"layer0": object(), "layer1": object(), "attention": object()}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs `load_model` of a GPU worker over stand-ins for vLLM's and for what other processes do."""

    def load(split: bool, prefetcher: Any) -> Any:
        seen = SimpleNamespace(followed=[], refused=[], build=None, started=0)

        def sharing(build: ModelBuild, *_: Any) -> Any:
            seen.build = build
            return SimpleNamespace(
                prefetcher=prefetcher,
                describe=lambda place: "",
                window=lambda tokens: None,
                start=lambda: setattr(seen, "started", seen.started + 1),
            )

        made: Any = object.__new__(DwdpGPUWorker)
        compilation = SimpleNamespace(static_forward_context=RUNNERS, static_all_moe_layers=["layer0", "layer1"])
        made.vllm_config = SimpleNamespace(
            compilation_config=compilation, scheduler_config=SimpleNamespace(max_num_batched_tokens=8)
        )
        made.dwdp_launch = DwdpLaunch(DwdpConfig(), 2, "/made/up", ())
        made.dwdp_rank, made.dwdp_sharing, made.dwdp_place = 1, None, "its engine"
        made.model_runner = SimpleNamespace(load_model=None, reload_weights=None, get_model=torch.nn.Module)
        meeting = SimpleNamespace(check_identity=lambda *_: None, gather=lambda *_: None, fail=lambda error: None)
        monkeypatch.setattr(ModelBuild, "_current", None)
        monkeypatch.setattr(worker, "Rendezvous", lambda *_: meeting)
        monkeypatch.setattr(worker, "identity_of", lambda *_: None)
        monkeypatch.setattr(worker, "ExpertSharing", sharing)
        monkeypatch.setattr(worker, "set_current_vllm_config", lambda config: contextlib.nullcontext())
        monkeypatch.setattr(worker, "current_platform", SimpleNamespace(is_cpu=lambda: False))
        monkeypatch.setattr(DwdpGPUWorker, "_predicted_loss", lambda self, ranks: None)
        monkeypatch.setattr(Worker, "load_model", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(gpu_worker, "splits", lambda config: split)
        monkeypatch.setattr(gpu_worker, "refuse_piecewise", seen.refused.append)
        monkeypatch.setattr(gpu_worker, "follow_graphs", lambda *args: seen.followed.append(args))
        made.load_model()
        return seen

    return load


@pytest.mark.parametrize("split", [False, True])
def test_graphs_and_the_ring_know_of_each_other_once_a_model_is_loaded(split: bool, loaded: Callable[..., Any]) -> None:
    prefetcher = object()
    seen = loaded(split, prefetcher)
    assert seen.followed == [(prefetcher, split)] and len(seen.refused) == 1 and seen.started == 1


def test_without_a_ring_there_is_nothing_to_follow(loaded: Callable[..., Any]) -> None:
    seen = loaded(True, None)
    assert seen.followed == [] and seen.refused == []


def test_where_code_is_cut_every_layer_acquires_outside_of_its_op(loaded: Callable[..., Any]) -> None:
    assert loaded(True, object()).build.outer_runners == {name: RUNNERS[name] for name in ("layer0", "layer1")}
    assert loaded(False, object()).build.outer_runners == {}


@pytest.mark.parametrize(("given", "seen"), [("auto", "triton"), ("marlin", "marlin")])
def test_on_gpus_experts_are_tritons_where_nothing_else_is_asked_for(
    given: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the config is built; the arguments are then as they were."""
    monkeypatch.setattr(configure, "_executor", lambda launcher: object)
    monkeypatch.setattr(configure.options, "check_settings", lambda config, on_cpu: None)  # CuPy is not here
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_name="cuda")
    monkeypatch.setattr(configure, "current_platform", platform)
    args = EngineArgs(model=str(tmp_path), distributed_executor_backend="dwdp", data_parallel_size=2, moe_backend=given)
    built: list[str] = []

    def original(arguments: EngineArgs) -> Any:
        built.append(arguments.moe_backend)
        raise InterruptedError("far enough")

    with pytest.raises(InterruptedError, match="far enough"):
        configure.create_engine_config(original, args)
    assert built == [seen] and args.moe_backend == given


class Runtime:
    """cupy.cuda.runtime, as far as it is called; `calls` in order, `codes` what an event's query returns."""

    streamNonBlocking, eventDefault, eventDisableTiming = 1, 0, 2
    memcpyDefault, streamCaptureModeRelaxed = 4, 2

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.codes = {1: 0, 2: 600, 3: 700}
        self.failing: str | None = None

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            if self.failing == name:
                raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")
            return {"getDeviceCount": 1, "streamIsCapturing": False, "eventElapsedTime": 2.5}.get(name, 77)

        return call

    def eventQuery(self, event: int) -> int:
        return self.codes[event]

    def check_status(self, code: int) -> None:
        raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(cuda_cupy, "_import_runtime", lambda: made)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5, raising=False)
    return made


def test_an_error_of_an_event_is_not_taken_for_its_end(runtime: Runtime) -> None:
    device = CupyDevice(0)
    assert device.query(1) and not device.query(2)
    with pytest.raises(CudaError, match="cudaErrorIllegalAddress") as caught:
        device.query(3)
    assert "\n" not in str(caught.value) and caught.value.code == "cudaErrorIllegalAddress"


def test_streams_block_nobody_and_go_first(runtime: Runtime) -> None:
    """One that blocks waits for torch's default stream, and makes it wait."""
    assert CupyDevice(0).make_stream() == 77
    assert runtime.calls[-1] == ("streamCreateWithPriority", Runtime.streamNonBlocking, -5)


def test_calls_reach_cuda_as_they_are_meant(runtime: Runtime) -> None:
    device = CupyDevice(0)
    runtime.calls.clear()
    device.copy_async(10, 20, 30, 4)
    device.record(8, 4)
    device.wait_event(4, 8)
    device.launch(9, 4)
    device.begin_capture(4)
    assert device.make_event(True) == device.make_event(False) == 77
    assert device.elapsed_s(1, 2) == pytest.approx(2.5e-3)
    assert (device.compute_stream(), device.capturing(4)) == (5, False)
    device.zero(64, 256)
    assert runtime.calls == [
        ("memcpyAsync", 10, 20, 30, Runtime.memcpyDefault, 4),
        ("eventRecord", 8, 4),
        ("streamWaitEvent", 4, 8),
        ("graphLaunch", 9, 4),
        ("streamBeginCapture", 4, Runtime.streamCaptureModeRelaxed),
        ("eventCreateWithFlags", Runtime.eventDefault),
        ("eventCreateWithFlags", Runtime.eventDisableTiming),
        ("eventElapsedTime", 1, 2),
        ("streamIsCapturing", 4),
        ("memset", 64, 0, 256),
        ("streamSynchronize", 0),
    ]


@pytest.mark.parametrize("name", ["memcpyAsync", "eventRecord", "graphLaunch", "streamWaitEvent", "graphInstantiate"])
def test_every_failure_of_cuda_is_an_error_with_its_name(runtime: Runtime, name: str) -> None:
    device = CupyDevice(0)
    runtime.failing = name
    calls: dict[str, Callable[[], Any]] = {
        "memcpyAsync": lambda: device.copy_async(1, 2, 3, 4),
        "eventRecord": lambda: device.record(1, 2),
        "graphLaunch": lambda: device.launch(1, 2),
        "streamWaitEvent": lambda: device.wait_event(1, 2),
        "graphInstantiate": lambda: device.end_capture(1),
    }
    with pytest.raises(CudaError, match=rf"{name} failed \(cudaErrorIllegalAddress: an illegal"):
        calls[name]()
    if name == "graphInstantiate":
        assert runtime.calls[-1] == ("graphDestroy", 77)


def test_a_device_that_is_not_there_is_refused(runtime: Runtime) -> None:
    with pytest.raises(DwdpError, match="GPU 1 of 1 visible ones"):
        CupyDevice(1)
