"""What a launch on GPUs tells vLLM at its start: the expert kernels, the runners of compiled layers, the CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.offloader.base import NoopOffloader, get_offloader, set_offloader
from vllm.v1.worker.gpu_worker import Worker

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import configure, options, worker
from vllm_dwdp.engine.gpu_worker import DwdpGPUWorker
from vllm_dwdp.engine.graphs import CopiesInGraphs
from vllm_dwdp.engine.launch import DwdpLaunch
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hold import MemoryFacts
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.patches import cuda_graph


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


def compilation(mode: CUDAGraphMode) -> Any:
    return SimpleNamespace(
        mode=CompilationMode.VLLM_COMPILE,
        cudagraph_mode=mode,
        static_all_moe_layers=["layers.0.experts", "layers.1.experts"],
        static_forward_context={"layers.0.experts": "runner 0", "layers.1.experts": "runner 1", "attention": "no"},
        splitting_ops_contain_attention=lambda: True,
    )


@pytest.fixture
def offloader() -> Iterator[None]:
    """vLLM keeps one per process."""
    before = get_offloader()
    set_offloader(NoopOffloader())
    yield
    set_offloader(before)


class Model(torch.nn.Module):
    """One without layers."""


class Loaded:
    """Takes the place of vLLM's worker, and of the memory that ranks share."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mode: CUDAGraphMode, prefetcher: Any) -> None:
        self.outer_runners: dict[str, Any] | None = None
        self.experts_per_rank: int | str | None = None
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
        self._prefetcher = prefetcher
        self.worker = DwdpGPUWorker.__new__(DwdpGPUWorker)
        self.worker.dwdp_launch = DwdpLaunch(DwdpConfig(), 2, "/made/up", ())
        self.worker.dwdp_rank, self.worker.dwdp_place, self.worker.dwdp_sharing = 1, "a test", None
        self.worker.model_runner = SimpleNamespace(load_model=None, reload_weights=None, get_model=Model)  # type: ignore[assignment]
        self.worker.vllm_config = SimpleNamespace(  # type: ignore[assignment]
            compilation_config=compilation(mode), scheduler_config=SimpleNamespace(max_num_batched_tokens=1)
        )
        monkeypatch.setattr(worker, "set_current_vllm_config", lambda config: nullcontext())

    def share(self, build: ModelBuild, *arguments: Any) -> Any:
        self.outer_runners = dict(build.outer_runners)
        self.experts_per_rank = build.config.experts_per_rank
        return SimpleNamespace(
            prefetcher=self._prefetcher,
            describe=lambda place: "",
            window=lambda tokens: None,
            start=lambda: setattr(self, "started", self.started + 1),
            close=lambda: None,
        )


@pytest.mark.parametrize(
    ("mode", "runners"),
    [
        (CUDAGraphMode.FULL_DECODE_ONLY, {}),
        (CUDAGraphMode.PIECEWISE, {"layers.0.experts": "runner 0", "layers.1.experts": "runner 1"}),
    ],
)
def test_the_prefetcher_is_told_of_graphs_and_layers_of_the_runners_around_them(
    mode: CUDAGraphMode, runners: dict[str, str], monkeypatch: pytest.MonkeyPatch, offloader: None
) -> None:
    told: list[str] = []
    prefetcher = SimpleNamespace(
        align=lambda: told.append("align"), end_capture=lambda: "counts", count_replay=object()
    )
    followed: list[Any] = []
    monkeypatch.setattr(cuda_graph, "install", lambda count_replay: (followed.append(count_replay), told.append)[1])
    loaded = Loaded(monkeypatch, mode, prefetcher)
    loaded.worker.load_model()
    assert loaded.outer_runners == runners and loaded.started == 1
    with pytest.raises(DwdpError, match=r"model_runner\.reload_weights would replace weights"):
        loaded.worker.model_runner.reload_weights()
    assert isinstance(get_offloader(), CopiesInGraphs)
    get_offloader().sync_prev_onload()
    get_offloader().join_after_forward()
    assert told == ["align", "counts"] and followed == [prefetcher.count_replay]
    # Code that is not cut gets no piecewise graphs.
    cut = loaded.worker.vllm_config.compilation_config.splitting_ops_contain_attention()
    assert cut is (mode == CUDAGraphMode.PIECEWISE)


def test_layers_are_built_with_as_many_experts_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch, offloader: None
) -> None:
    facts = MemoryFacts(
        experts=8, ranks=2, layers=5, limit=0, dense=80, peak=20, expert=50, slot_expert=20, slots_hold="missing",
        kv_token=2, kv_request=100, kv_asked=560,
    )  # fmt: skip
    monkeypatch.setattr(worker, "memory_of", lambda config, launch, on_cpu, limit: replace(facts, limit=limit))
    # Of one GPU, 2000 are free, for two ranks; vLLM may use more.
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (2000, 3000))
    monkeypatch.setattr(worker, "predicted_loss", lambda *positional, **named: loss.append(named["share"]))
    monkeypatch.setattr(
        worker, "current_platform", SimpleNamespace(is_cpu=lambda: False, get_device_name=lambda: "H100")
    )
    loss: list[int | None] = []
    for ranks_per_device, held in ((2, 6), (1, 7)):
        loaded = Loaded(monkeypatch, CUDAGraphMode.NONE, None)
        config = DwdpConfig(experts_per_rank="auto", ranks_per_device=ranks_per_device, require_win=True)
        loaded.worker.dwdp_launch = DwdpLaunch(config, 2, "/made/up", ())
        loaded.worker.requested_memory = 1500
        loaded.worker.vllm_config.model_config = SimpleNamespace(  # type: ignore[assignment]
            hf_config=SimpleNamespace(to_dict=dict), model="m", max_model_len=1
        )
        loaded.worker.vllm_config.cache_config = SimpleNamespace(gpu_memory_utilization=0.9, cache_dtype="auto")  # type: ignore[assignment]
        loaded.worker.load_model()
        # The planner is asked about the same share.
        assert (loaded.experts_per_rank, loss.pop()) == (held, held)


def test_without_a_ring_nobody_is_told(monkeypatch: pytest.MonkeyPatch, offloader: None) -> None:
    Loaded(monkeypatch, CUDAGraphMode.FULL_DECODE_ONLY, None).worker.load_model()
    assert isinstance(get_offloader(), NoopOffloader)
