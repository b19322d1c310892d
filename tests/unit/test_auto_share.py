"""`experts_per_rank: "auto"` in a rank: what it knows before layers are built is what vLLM then builds; ranks agree."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from tests.unit.helpers import LIMIT_S
from tests.unit.whole_model import expert_layers, load, vllm_config
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import worker
from vllm_dwdp.engine.auto_share import memory_of, settle
from vllm_dwdp.engine.worker import DwdpWorkerMixin
from vllm_dwdp.errors import DwdpError, PeerLost
from vllm_dwdp.group.launch import DwdpLaunch
from vllm_dwdp.group.rendezvous import Rendezvous
from vllm_dwdp.hold import MemoryFacts
from vllm_dwdp.platform import CPU, CUDA
from vllm_dwdp.predict.memory_plan import RUNTIME, activation_bytes
from vllm_dwdp.predict.read_config import parse_model
from vllm_dwdp.transport.limits import Available

pytestmark = pytest.mark.usefixtures("groups")

GIB = 2**30


def launch(ranks: int = 2, folder: str = "", **settings: Any) -> DwdpLaunch:
    return DwdpLaunch(DwdpConfig.parse({"experts_per_rank": "auto", **settings}), ranks, folder, ())


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("qwen3_moe", "bfloat16"), ("deepseek_v3", "float32"), ("gpt_oss", "bfloat16"), ("mixtral", "float16")],
)
def test_sizes_are_those_of_the_model_that_vllm_builds(
    family: str, dtype: str, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(family=family, dtype=dtype, num_layers=3, num_experts=8)
    plain = load(folder, 0, 1, dtype=dtype)
    facts = memory_of(plain.vllm_config, launch(weight_view="contiguous"), CPU, GIB)
    layers = expert_layers(plain.model).values()
    experts = sum(p.nbytes for layer in layers for p in layer.parameters())
    assert facts.experts == 8 and facts.layers == len(layers)
    assert facts.expert == pytest.approx(experts / 8, rel=0.02)
    assert facts.slot_expert == pytest.approx(2 * experts / 8 / len(layers), rel=0.02)
    # vLLM's CPU kernels keep dense weights packed, outside of parameters: the checkpoint says what there is.
    dense = sum(t.nbytes for name, t in load_file(folder / "model.safetensors").items() if ".experts." not in name)
    assert facts.dense == pytest.approx(dense, rel=0.02)
    kv = [
        layer.get_kv_cache_spec(plain.vllm_config)
        for layer in plain.vllm_config.compilation_config.static_forward_context.values()
        if hasattr(layer, "get_kv_cache_spec")
    ]
    token = sum(spec.page_size_bytes / spec.block_size for spec in kv)
    longest = plain.vllm_config.model_config.max_model_len
    # What vLLM itself demands for one request, but for the blocks that are not full.
    assert facts.kv_request == pytest.approx(longest * token)
    assert facts.kv_token <= token


def test_what_the_user_asked_for(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    config = vllm_config(tiny_moe)
    facts = memory_of(config, launch(), CPU, GIB)
    assert facts.kv_asked is None and facts.limit == GIB and facts.ranks == 2
    config.cache_config.kv_cache_memory_bytes = 12345
    assert memory_of(config, launch(), CPU, GIB).kv_asked == 12345
    config.cache_config.num_gpu_blocks_override = 10
    asked = memory_of(config, launch(), CPU, GIB).kv_asked
    assert asked == 10 * config.cache_config.block_size * facts.kv_token
    config.cache_config.cache_dtype = "fp8"
    assert memory_of(config, launch(), CPU, GIB).kv_token == facts.kv_token / 2


def test_the_peak_is_one_of_the_largest_step_and_on_gpus_the_runtime_too(tiny_moe: Path) -> None:
    config = vllm_config(tiny_moe, max_num_batched_tokens=4096)
    model = parse_model(config.model_config.hf_config.to_dict(), "m")
    cpu, gpu = (memory_of(config, launch(group_size=2, ranks=4), platform, GIB) for platform in (CPU, CUDA))
    assert cpu.peak == activation_bytes(model, 4096) > activation_bytes(model, 64)
    assert gpu.peak == cpu.peak + RUNTIME and gpu.ranks == 2


def test_the_view_decides_what_slots_hold(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    on_pages = vllm_config(checkpoint(family="qwen3_moe", num_layers=1, num_experts=16))
    # Two experts to a page: two blocks for three ranks.
    off_pages = vllm_config(checkpoint(family="qwen3_moe", num_layers=1, num_experts=4, hidden=32, intermediate=32))

    def hold(config: Any, on_cpu: bool, view: str) -> str:
        return memory_of(config, launch(3, weight_view=view), CPU if on_cpu else CUDA, GIB).slots_hold

    assert [hold(on_pages, True, view) for view in ("auto", "inplace", "contiguous")] == ["nothing", "nothing", "all"]
    assert [hold(off_pages, True, view) for view in ("auto", "inplace", "contiguous")] == ["all", "nothing", "all"]
    views = ("auto", "split", "composite", "contiguous")
    assert [hold(on_pages, False, view) for view in views] == ["missing", "missing", "missing", "all"]
    # No kernel of ours finds experts in another layout by their addresses.
    monkeypatch.setattr(on_pages.kernel_config, "moe_backend", "marlin")
    assert [hold(on_pages, False, view) for view in views[::2]] == ["all", "missing"]
    # Nor computes with static scales of activations.
    monkeypatch.setattr(on_pages.kernel_config, "moe_backend", "triton")
    assert hold(on_pages, False, "auto") == "missing"
    for scheme, held in (("dynamic", "missing"), ("static", "all")):
        told = {"quant_method": "fp8", "activation_scheme": scheme}
        monkeypatch.setattr(on_pages.model_config.hf_config, "quantization_config", told, raising=False)
        assert hold(on_pages, False, "auto") == held


def test_a_model_that_cannot_be_read_is_one_line(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = vllm_config(tiny_moe)
    unknown = {**config.model_config.hf_config.to_dict(), "model_type": "qwen3_next"}
    monkeypatch.setattr(config.model_config, "hf_config", SimpleNamespace(to_dict=lambda: unknown))
    with pytest.raises(
        DwdpError, match=r"^experts_per_rank \"auto\": the sizes are unknown .*; give a number of experts$"
    ):
        memory_of(config, launch(), CPU, GIB)


FACTS = MemoryFacts(
    experts=8, ranks=2, layers=5, limit=1000, dense=80, peak=20, expert=50, slot_expert=20, slots_hold="missing",
    kv_token=2, kv_request=100, kv_asked=560,
)  # fmt: skip


def on_each_rank(folder: str, facts: Sequence[MemoryFacts | None], **settings: Any) -> list[Any]:
    """What `settle` gave or raised on every rank of a launch."""
    made = launch(len(facts), folder, timeout_s=LIMIT_S, **settings)
    results: list[Any] = [None] * len(facts)

    def rank(index: int) -> None:
        meeting = Rendezvous(folder, index, LIMIT_S)
        try:
            results[index] = settle(made, facts[index], meeting)
        except DwdpError as error:
            meeting.fail(error)
            results[index] = error

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    return results


def test_all_ranks_of_all_groups_hold_what_the_smallest_can(folder: str) -> None:
    # 6, 7, 5 and 6 experts on their own.
    facts = [replace(FACTS, limit=limit) for limit in (1000, 1030, 980, 1000)]
    results = on_each_rank(folder, facts, group_size=2)
    assert [made.config.experts_per_rank for made, _ in results] == [5] * 4
    assert [held.kv for _, held in results] == [590, 620, 570, 590]
    assert len({made.config for made, _ in results}) == 1


def test_in_place_a_partition_is_held(folder: str) -> None:
    results = on_each_rank(folder, [replace(FACTS, slots_hold="nothing")] * 2)
    assert [made.config.experts_per_rank for made, _ in results] == [None, None]


def test_a_rank_without_room_ends_the_start_of_all(folder: str) -> None:
    first, second = on_each_rank(folder, [FACTS, replace(FACTS, limit=900)])
    assert isinstance(first, PeerLost) and "even 4 of 8 experts" in str(first)
    assert str(second).startswith('experts_per_rank "auto": of ')


def test_a_rank_that_cannot_tell_has_all_hold_a_partition(folder: str) -> None:
    results = on_each_rank(folder, [FACTS, None])
    assert [(made.config.experts_per_rank, held) for made, held in results] == [("partition", None)] * 2


class Alone(DwdpWorkerMixin):
    """The only rank of a launch, on a GPU, up to the choice of its share."""

    def __init__(self, folder: str, limit: float, **settings: Any) -> None:
        self.dwdp_rank, self.limit = 0, limit
        plain = SimpleNamespace(is_multimodal_model=False)
        self.vllm_config = SimpleNamespace(speculative_config=None, model_config=plain)  # type: ignore[assignment]
        self.dwdp_launch = replace(launch(1, folder, timeout_s=LIMIT_S), config=DwdpConfig.parse(settings))

    def dwdp_memory_limit(self) -> float:
        return self.limit

    def settle(self) -> Any:
        return self._dwdp_settle(Rendezvous(self.dwdp_launch.folder, 0, LIMIT_S)).config.experts_per_rank


@pytest.mark.parametrize(
    ("settings", "limit", "share"),
    [
        ({}, 1000, 6),
        ({"experts_per_rank": "auto"}, 1000, 6),
        ({}, 900, "partition"),
        ({"experts_per_rank": "auto"}, 900, None),
    ],
)
def test_the_default_refuses_nothing_that_a_partition_may_do(
    settings: dict[str, Any], limit: float, share: Any, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(worker.logger, "info", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(
        worker, "memory_of", lambda _config, _launch, _cpu, limit, page: replace(FACTS, limit=limit + page)
    )
    monkeypatch.setattr(worker, "page_ahead", lambda *_: 7)
    rank = Alone(folder, limit - 7, **settings)
    if share is None:
        with pytest.raises(DwdpError, match="even 4 of 8 experts"):
            rank.settle()
        return
    assert rank.settle() == share
    rank.vllm_config.speculative_config = object()  # type: ignore[assignment]
    rank.dwdp_launch = replace(rank.dwdp_launch, config=DwdpConfig.parse(settings))
    assert rank.settle() == (share if settings else "partition")
    assert said[0].startswith(
        "dwdp rank 0: a partition, since " if share == "partition" else "dwdp rank 0: experts_per"
    )


@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's CPU worker")
def test_ranks_on_cpu_have_an_equal_part_of_the_host_within_what_vllm_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dwdp.engine import cpu_worker

    monkeypatch.setattr(cpu_worker, "available_memory", lambda: Available(12 * GIB, "a test"))
    rank = cpu_worker.DwdpCPUWorker.__new__(cpu_worker.DwdpCPUWorker)
    rank.dwdp_launch = launch(4, group_size=2)
    rank.cache_config = SimpleNamespace(kv_cache_memory_bytes=1)  # type: ignore[assignment]
    rank.requested_cpu_memory = 1
    assert rank.dwdp_memory_limit() == 3 * GIB
    rank.cache_config.kv_cache_memory_bytes = None
    assert rank.dwdp_memory_limit() < 0
    rank.requested_cpu_memory = 1 << 50
    assert rank.dwdp_memory_limit() == 3 * GIB


class Profiling:
    """Takes the place of vLLM's worker."""

    left = 0.0

    def determine_available_memory(self) -> float:
        return self.left


class OneRank(DwdpWorkerMixin, Profiling):
    """A rank that profiles."""

    def __init__(self) -> None:
        self.dwdp_rank = 1


@pytest.mark.parametrize(("part", "warned"), [(0.91, False), (0.89, True)])
def test_a_promise_that_profiling_breaks_is_a_warning(
    part: float, warned: bool, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(worker.logger, "warning", lambda text, *values: said.append(text % values))
    (_, held), _ = on_each_rank(folder, [FACTS, FACTS])
    rank = OneRank()
    rank.left = math.floor(560 * part)
    assert rank.determine_available_memory() == rank.left and said == []
    rank.dwdp_held = held
    assert rank.determine_available_memory() == rank.left
    assert [line.startswith('dwdp rank 1: experts_per_rank "auto": profiling left') for line in said] == [True] * warned
