"""What a launch on GPUs tells vLLM at its start: the expert kernels, the CUDA graphs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.offloader.base import NoopOffloader, get_offloader
from vllm.v1.worker.gpu_worker import Worker

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import configure, options, planner, worker
from vllm_dwdp.engine.gpu_worker import DwdpGPUWorker
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.group.launch import DwdpLaunch
from vllm_dwdp.hold import MemoryFacts
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.platform import CUDA
from vllm_dwdp.predict.startup import PlannedLaunch


class Stop(Exception):
    """Raised where vLLM would go on to look at the model."""


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_name="cuda")
    monkeypatch.setattr(configure, "current_platform", platform)
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize(("given", "built"), [("auto", "triton"), ("triton", "triton"), ("deep_gemm", "deep_gemm")])
def test_expert_kernels_are_those_that_slots_were_tried_with(
    given: Any, built: str, on_gpus: None, tmp_path: Path
) -> None:
    args = EngineArgs(model=str(tmp_path), distributed_executor_backend="dwdp", data_parallel_size=2, moe_backend=given)
    found: list[str] = []

    def original(args: EngineArgs) -> Any:
        found.append(args.moe_backend)
        raise Stop

    with pytest.raises(Stop):
        configure.create_engine_config(original, args)
    # What the user gave is put back, for whoever builds another config from it.
    assert (found, args.moe_backend) == ([built], given)


@pytest.mark.parametrize(
    ("quantisation", "given", "built"),
    [
        (None, "auto", "triton"),
        ("fp8", "auto", "triton"),
        ("fp8", "marlin", "marlin"),
        ("fp8_per_channel", "auto", "triton"),
        ("online", "auto", "triton"),
        ("compressed-tensors", "auto", "auto"),
        ("auto_gptq", "auto", "auto"),
        ("auto_gptq", "marlin", "marlin"),
    ],
)
def test_vllm_chooses_kernels_where_there_are_none_of_ours(
    quantisation: str | None, given: Any, built: str, on_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = SimpleNamespace(quantization_config={"quant_method": quantisation})
    model = SimpleNamespace(model="m", quantization=quantisation, get_num_experts=lambda: 8, model_arch_config=stored)
    monkeypatch.setattr(EngineArgs, "create_model_config", lambda self: model)
    monkeypatch.setattr(configure, "hide_moe", lambda config: None)
    args = EngineArgs(model=str(tmp_path), distributed_executor_backend="dwdp", data_parallel_size=2, moe_backend=given)
    found: list[str] = []

    def original(args: EngineArgs) -> Any:
        assert args.create_model_config() is model  # type: ignore[comparison-overlap]
        found.append(args.moe_backend)
        raise Stop

    with pytest.raises(Stop):
        configure.create_engine_config(original, args)
    assert (found, args.moe_backend) == ([built], given)


@pytest.mark.parametrize("quantisation", ["mxfp8", "modelopt", "modelopt_mixed", "moe_wna16", "awq", "bitsandbytes"])
def test_quantisations_that_nobody_has_looked_at(quantisation: str) -> None:
    model: Any = SimpleNamespace(model="m", quantization=quantisation, get_num_experts=lambda: 8)
    with pytest.raises(
        DwdpError, match=f"^m: quantisation '{quantisation}' is not supported .*: use a BF16, .* of GPTQ"
    ):
        options.check_model(model, CUDA)


def compilation(mode: CUDAGraphMode) -> CompilationConfig:
    made = CompilationConfig(cudagraph_mode=mode, cudagraph_capture_sizes=[1, 2, 4, 8])
    made.max_cudagraph_capture_size = 8
    return made


class Model(torch.nn.Module):
    """One without layers."""


class Loaded:
    """Takes the place of vLLM's worker, and of the memory that ranks share."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mode: CUDAGraphMode, direct: int) -> None:
        self.compilation = compilation(mode)
        self.experts_per_rank: int | str | None = None
        self.build: ModelBuild | None = None
        self.started = 0
        store = SimpleNamespace(
            check_identity=lambda identity, group: None,
            fail=lambda error: None,
            gather=lambda name, value, ranks: [value] * len(ranks),
        )
        monkeypatch.setattr(worker, "Rendezvous", lambda *arguments: store)
        monkeypatch.setattr(worker, "identity_of", lambda *arguments: None)
        monkeypatch.setattr(worker, "ExpertSharing", self.share)
        monkeypatch.setattr(ModelBuild, "_current", None)
        monkeypatch.setattr(Worker, "load_model", lambda self: None)
        self._direct = direct
        self.worker = DwdpGPUWorker.__new__(DwdpGPUWorker)
        self.worker.dwdp_launch = DwdpLaunch(DwdpConfig(), 2, "/made/up", ())
        self.worker.dwdp_rank, self.worker.dwdp_place, self.worker.dwdp_sharing = 1, "a test", None
        self.worker.model_runner = SimpleNamespace(load_model=None, reload_weights=None, get_model=Model)  # type: ignore[assignment]
        self.worker.vllm_config = SimpleNamespace(  # type: ignore[assignment]
            compilation_config=self.compilation,
            scheduler_config=SimpleNamespace(max_num_batched_tokens=1),
            uniform_decode_query_len=1,
        )
        monkeypatch.setattr(worker, "set_current_vllm_config", lambda config: nullcontext())

    def share(self, build: ModelBuild, *arguments: Any) -> Any:
        self.build, self.experts_per_rank = build, build.config.experts_per_rank
        return SimpleNamespace(
            direct_tokens=self._direct,
            describe=lambda place: "",
            refilled=[],
            build=build,
            counters=SimpleNamespace(fields=None),
            start=lambda: setattr(self, "started", self.started + 1),
            close=lambda: None,
        )


@pytest.mark.parametrize(
    ("direct", "mode", "sizes"),
    [
        (4, CUDAGraphMode.FULL_AND_PIECEWISE, [1, 2, 4]),
        (100, CUDAGraphMode.FULL_AND_PIECEWISE, [1, 2, 4, 8]),
        (0, CUDAGraphMode.NONE, [1, 2, 4, 8]),
    ],
)
def test_graphs_are_limited_to_direct_forwards_once_the_model_is_there(
    direct: int, mode: CUDAGraphMode, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Loaded(monkeypatch, CUDAGraphMode.FULL_AND_PIECEWISE, direct)
    splitting = loaded.compilation.splitting_ops
    loaded.worker.load_model()
    assert loaded.started == 1
    assert (loaded.compilation.cudagraph_mode, loaded.compilation.cudagraph_capture_sizes) == (mode, sizes)
    assert loaded.compilation.max_cudagraph_capture_size == sizes[-1]
    # Compiled code is cut where plain vLLM cuts it, and vLLM's offloader is its own.
    assert loaded.compilation.splitting_ops == splitting and isinstance(get_offloader(), NoopOffloader)
    with pytest.raises(DwdpError, match=r"model_runner\.reload_weights would replace weights"):
        loaded.worker.model_runner.reload_weights()


def test_what_layers_ask_is_asked_of_the_whole_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the largest scale of all ranks' experts."""
    loaded = Loaded(monkeypatch, CUDAGraphMode.NONE, 0)
    loaded.worker.load_model()
    assert loaded.build is not None and loaded.build.gather("scales", 3) == [3, 3]


def test_layers_are_built_with_as_many_experts_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = MemoryFacts(
        experts=8, ranks=2, layers=5, limit=0, dense=80, peak=20, expert=50, slot_expert=20, slots_hold="missing",
        kv_token=2, kv_request=100, kv_asked=560,
    )  # fmt: skip
    monkeypatch.setattr(worker, "memory_of", lambda config, launch, on_cpu, limit, page: replace(facts, limit=limit))
    monkeypatch.setattr(worker, "page_ahead", lambda *_: None)
    # Of one GPU, 2000 are free, for two ranks; vLLM may use more.
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (2000, 3000))
    monkeypatch.setattr(worker, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    for ranks_per_device, held in ((2, 6), (1, 7)):
        loaded = Loaded(monkeypatch, CUDAGraphMode.NONE, 0)
        config = DwdpConfig(experts_per_rank="auto", ranks_per_device=ranks_per_device)
        loaded.worker.dwdp_launch = DwdpLaunch(config, 2, "/made/up", ())
        loaded.worker.requested_memory = 1500
        loaded.worker.load_model()
        assert loaded.experts_per_rank == held


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({}, CUDAGraphMode.FULL),
        ({"direct_tokens": 0}, CUDAGraphMode.NONE),
        ({"weight_view": "contiguous"}, CUDAGraphMode.NONE),
    ],
)
def test_a_launch_tells_its_workers_of_graphs(
    settings: dict[str, Any], mode: CUDAGraphMode, on_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mode is settled in the config that all ranks get, and the largest size that the user named goes with it."""
    args = EngineArgs(
        model=str(tmp_path),
        distributed_executor_backend="dwdp",
        data_parallel_size=2,
        cudagraph_capture_sizes=[1, 8],
        additional_config={"dwdp": settings},
        disable_log_stats=True,
    )
    given = SimpleNamespace(
        compilation_config=compilation(CUDAGraphMode.FULL),
        parallel_config=SimpleNamespace(worker_cls="vllm.v1.worker.gpu_worker.Worker", data_parallel_size=2),
        speculative_config=None,
        kv_transfer_config=None,
    )
    launches: list[DwdpLaunch] = []
    asked: list[object] = []
    monkeypatch.setattr(configure, "ask_planner", lambda *arguments: asked.append(arguments[0]))
    monkeypatch.setattr(configure, "set_devices", lambda *arguments: None)
    monkeypatch.setattr(configure, "_launch", lambda args, config, owner: DwdpLaunch(config, 2, "/made/up", ()))
    monkeypatch.setattr(configure, "_environment", lambda *arguments: {})
    monkeypatch.setattr(configure, "watch_ranks", lambda *arguments, **named: None)
    monkeypatch.setattr(configure, "attach_launch", lambda config, launch: launches.append(launch))
    found = configure.create_engine_config(lambda args: given, args)  # type: ignore[arg-type, return-value]
    assert found.compilation_config.cudagraph_mode == mode and asked == [given]
    (launch,) = launches
    assert launch.captured_tokens == 8 and launch.config == DwdpConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "share", "by_memory", "asked"),
    [({}, None, True, True), ({"experts_per_rank": 5}, 5, False, True), ({"ranks_per_device": 2}, None, False, False)],
)
def test_the_front_end_asks_the_planner(
    settings: dict[str, Any], share: int | None, by_memory: bool, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[PlannedLaunch] = []
    said: list[str] = []
    monkeypatch.setattr(
        planner, "predicted_loss", lambda launch: launches.append(launch) or "DWDP is predicted to lose"
    )
    monkeypatch.setattr(planner, "current_platform", SimpleNamespace(get_device_name=lambda: "NVIDIA H100 80GB HBM3"))
    monkeypatch.setattr(planner.logger, "warning", lambda text, *values: said.append(text % values))
    given: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(to_dict=dict), model="m", max_model_len=4096, quantization=None
        ),
        cache_config=SimpleNamespace(gpu_memory_utilization=0.8, cache_dtype="fp8_e4m3"),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
    )
    planner.ask_planner(given, DwdpConfig.parse(settings), 4, CUDA)
    expected = PlannedLaunch(
        {}, "m", "NVIDIA H100 80GB HBM3", 4, 2048, 4096, share, by_memory, utilisation=0.8, kv_element=1.0
    )
    assert (launches, said) == (([expected], ["dwdp: DWDP is predicted to lose"]) if asked else ([], []))
