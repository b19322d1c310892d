"""Settings of dwdp, models and machines that it cannot work with: one line, before anything is loaded or started."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.unit.leftovers import TINY, build, check_message, refusal
from tests.unit.whole_model import vllm_config
from vllm_dwdp import patches
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import configure, options
from vllm_dwdp.platform import CPU, CUDA

pytestmark = pytest.mark.usefixtures("nothing_left")


#: Of a server that is one rank of a group.
APART = {"group": "a", "rank": 0, "ranks": 2}


@pytest.mark.parametrize(
    ("ranks", "settings", "words"),
    [
        pytest.param(2, "num_slots=2", ["'num_slots=2'", "mapping such as"], id="not-a-mapping"),
        pytest.param(2, {"num_slot": 3}, ["'num_slot' = 3", "did you mean 'num_slots'"], id="misspelt-key"),
        pytest.param(2, {"speed": 9}, ["'speed' = 9", "known keys are group_size"], id="unknown-key"),
        pytest.param(2, {"num_slots": "2"}, ["'2'", "str", "whole number >= 2"], id="wrong-type"),
        pytest.param(2, {"num_slots": 1}, ["num_slots is 1", ">= 2", "raise it"], id="one-slot"),
        pytest.param(2, {"group_size": 1}, ["group_size is 1", ">= 2"], id="group-of-one"),
        pytest.param(
            4, {"group_size": 3}, ["group_size is 3", "size is 4", "divisor", "2, 4"], id="group-not-dividing"
        ),
        pytest.param(2, {"group_size": 4}, ["group_size is 4", "size is 2"], id="group-above-ranks"),
        pytest.param(2, {"experts_per_rank": 3}, ["experts_per_rank is 3", "4..7"], id="too-few-experts"),
        pytest.param(2, {"experts_per_rank": 8}, ["experts_per_rank is 8", "4..7"], id="all-experts"),
        pytest.param(2, {"slice_bytes": 5000}, ["5000", "multiple of 256", "4864"], id="slice-bytes"),
        pytest.param(2, {"timeout_s": 0}, ["timeout_s is 0", "above 0", "300"], id="no-time"),
        pytest.param(2, {"weight_view": "continuous"}, ["did you mean 'contiguous'"], id="unknown-view"),
        pytest.param(2, {"launcher": "slurm"}, ["'slurm'", "auto, ray, mp, uni"], id="unknown-launcher"),
        pytest.param(2, {"weight_view": "split"}, ['"split"', "GPUs", "inplace or contiguous"], id="split-on-cpu"),
        pytest.param(2, {"weight_view": "composite"}, ['"composite"', "GPUs", "inplace or"], id="composite-on-cpu"),
        pytest.param(2, {"transport": "cupy_ipc"}, ['"cupy_ipc"', "GPUs", "auto or shm"], id="gpu-transport-on-cpu"),
        pytest.param(2, {"transport": "cuda_pinned"}, ['"cuda_pinned"', "GPUs", "auto or shm"], id="pinned-on-cpu"),
        pytest.param(2, {"in_flight": 2}, ["in_flight is 2", "gone", "leave it out"], id="in-flight"),
        pytest.param(2, {"ranks_per_device": 2}, ["is 2", "GPUs", "leave it out"], id="ranks-per-device-on-cpu"),
        pytest.param(2, {"direct_tokens": 8}, ["is 8", "GPUs", "inplace", "leave it out"], id="direct-tokens-on-cpu"),
        pytest.param(2, {"direct_tokens": "8"}, ["'8'", "'auto'", "whole number"], id="direct-tokens-as-text"),
        pytest.param(2, {"decode": "travel"}, ['"travel"', "GPUs", "leave it out"], id="travel-on-cpu"),
        pytest.param(2, {"decode": "walk"}, ["'walk'", "auto, travel, direct"], id="unknown-decode"),
        pytest.param(2, {"require_win": True}, ["cannot tell", "'a CPU'", "leave require_win out"], id="win-on-cpu"),
        pytest.param(2, {"rendezvous": "h:1/g"}, ["h:1", "gone", "leave it out"], id="rendezvous"),
        pytest.param(1, {"rank": 0}, ["rank is 0 without dwdp.group", "name the group"], id="rank-without-group"),
        pytest.param(1, {"meet": "/tmp"}, ["'/tmp' without dwdp.group", "leave it out"], id="meet-without-group"),
        pytest.param(1, {"group": "a/b", "rank": 0, "ranks": 2}, ["'a/b'", "at most 40 letters"], id="group-name"),
        pytest.param(1, {"group": "a", "ranks": 2}, ["without dwdp.rank", "0 to ranks - 1"], id="group-without-rank"),
        pytest.param(1, {"group": "a", "rank": 0}, ["without dwdp.ranks"], id="group-without-ranks"),
        pytest.param(1, {"group": "a", "rank": 0, "ranks": 1}, ["ranks is 1", ">= 2"], id="one-server"),
        pytest.param(
            1, {**APART, "rank": 66}, ["rank is 66 of 2", "0 to 1", "extra rank 2 to 65"], id="rank-above-extras"
        ),
        pytest.param(2, {**APART}, ["size is 2 with dwdp.group 'a'", "for each rank"], id="group-of-launches"),
        pytest.param(1, {**APART, "meet": "h:1"}, ["'h:1', an address", "one machine only"], id="meet-at-an-address"),
        pytest.param(1, {**APART, "meet": "here"}, ["'here'", "absolute path"], id="meet-relative"),
        pytest.param(1, {**APART, "group_size": 2}, ["group_size is 2", "leave group_size out"], id="two-sizes"),
        pytest.param(1, {**APART, "launcher": "ray"}, ['"ray" with dwdp.group', "launcher out"], id="apart-on-ray"),
        pytest.param(1, {**APART, "experts_per_rank": "auto"}, ['"auto"', "give a number"], id="apart-by-memory"),
        pytest.param(1, {**APART, "experts_per_rank": 3}, ["experts_per_rank is 3", "4..7"], id="apart-too-few"),
    ],
)
def test_settings(tiny_moe: Path, ranks: int, settings: object, words: list[str]) -> None:
    message = refusal(lambda: build(tiny_moe, data_parallel_size=ranks, additional_config={"dwdp": settings}))
    check_message(message, words)


@pytest.mark.parametrize(
    ("view", "told", "words"),
    [
        ("contiguous", 8, ["direct_tokens is 8", "contiguous", "pulls in every forward", "split or auto"]),
        ("contiguous", 0, None),
        ("contiguous", "auto", None),
        ("split", 8, None),
        ("auto", 8, None),
    ],
)
def test_direct_tokens_on_gpus(view: Any, told: Any, words: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    config = DwdpConfig(weight_view=view, direct_tokens=told)
    if words is None:
        options.check_settings(config, platform=CUDA)
    else:
        check_message(refusal(lambda: options.check_settings(config, platform=CUDA)), words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight_view": "contiguous"}, ['weight_view "contiguous"', "every forward pulls", "one of them out"]),
        ({"weight_view": "composite"}, ['weight_view "composite"', "tables of the split view", "one of them out"]),
        ({"transport": "cuda_pinned"}, ['transport "cuda_pinned"', "every forward pulls", "one of them out"]),
        ({"direct_tokens": 0}, ["direct_tokens 0", "every forward pulls", "one of them out"]),
        ({"ranks_per_device": 2}, ["ranks_per_device 2", "share a GPU", "one of them out"]),
        ({}, None),
        ({"weight_view": "split", "direct_tokens": 8}, None),
    ],
)
def test_what_does_not_go_with_tokens_that_travel(
    settings: dict[str, Any], words: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for decode in ("auto", "direct"):
        options.check_settings(DwdpConfig(**settings, decode=decode), platform=CUDA)  # type: ignore[arg-type]
    config = DwdpConfig(**settings, decode="travel")
    if words is None:
        options.check_settings(config, platform=CUDA)
    else:
        refused = refusal(lambda: options.check_settings(config, platform=CUDA))
        check_message(refused, ['dwdp.decode is "travel" with', *words])


def test_servers_of_their_own_on_gpus_and_without_an_api(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for key, told in (("transport", "cupy_ipc"), ("weight_view", "composite"), ("decode", "travel")):
        config = DwdpConfig.parse({"group": "a", "rank": 0, "ranks": 2, key: told})
        refused = refusal(lambda config=config: options.check_settings(config, platform=CUDA))
        check_message(refused, [f'dwdp.{key} is "{told}" with dwdp.group', "leave"])
    apart = DwdpConfig(group="a", rank=0, ranks=2)
    options.check_settings(apart, platform=CUDA)
    options.check_settings(dataclasses.replace(apart, rank=2), platform=CUDA)
    # Each starts when memory is not what it was.
    assert DwdpConfig().goes_by_memory(CUDA) and not apart.goes_by_memory(CUDA)
    monkeypatch.undo()
    headless = refusal(lambda: build(tiny_moe, True, data_parallel_size=1, additional_config={"dwdp": APART}))
    check_message(headless, ["--headless does not go with dwdp.group 'a'", "leave it out"])


def test_a_vllm_that_was_run_on_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("vllm.version.__version__", "0.31.0")
    options.check_settings(DwdpConfig(), platform=CPU)
    refused = refusal(lambda: options.check_settings(DwdpConfig(), platform=CUDA))
    check_message(refused, ["vLLM 0.31.0 on CPU only", "use vLLM 0.32.0 on GPUs"])


@pytest.mark.parametrize("told", [0, "auto"])
def test_direct_tokens_that_cpus_take(told: Any) -> None:
    options.check_settings(DwdpConfig(direct_tokens=told), platform=CPU)


def changed(moe: Path, folder: Path, **values: Any) -> Path:
    """A folder like that of `moe` with another config.json."""
    folder.mkdir()
    for file in moe.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((moe / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "words"),
    [
        pytest.param({"quantization_config": {"quant_method": "fp8"}}, ["'fp8'", "use a BF16"], id="fp8"),
        pytest.param({"quantization_config": {"quant_method": "mxfp4"}}, ["'mxfp4'", "use a BF16"], id="mxfp4"),
    ],
)
def test_models(tiny_moe: Path, tmp_path: Path, values: dict[str, Any], words: list[str]) -> None:
    model = changed(tiny_moe, tmp_path / "model", **values)
    check_message(refusal(lambda: build(model)), words)


def test_a_dense_model(checkpoint: Callable[..., Path]) -> None:
    dense = checkpoint(family="qwen3", **TINY)
    words = [str(dense), "no routed experts", "--data-parallel-size alone"]
    check_message(refusal(lambda: build(dense)), words)


def test_a_drafter_with_experts(tiny_moe: Path) -> None:
    drafter = {"model": str(tiny_moe), "method": "draft_model", "num_speculative_tokens": 2}
    words = [str(tiny_moe), "8 routed experts", "dense drafter or ngram"]
    check_message(refusal(lambda: build(tiny_moe, speculative_config=drafter)), words)


def test_one_process(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    check_message(refusal(lambda: build(tiny_moe)), ["VLLM_ENABLE_V1_MULTIPROCESSING=0", "one per rank", "unset it"])


def test_ray_without_ray(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else find(name, *more))
    message = refusal(lambda: build(tiny_moe, additional_config={"dwdp": {"launcher": "ray"}}))
    check_message(message, ['launcher "ray"', "pip install '.[ray]' in", "leave launcher out"])


def test_another_vllm(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "failures", ["vLLM 9.9.9 is installed, this vllm-dwdp was made for vLLM 0.32.0"])
    check_message(refusal(lambda: build(tiny_moe)), ["vLLM 9.9.9", "vLLM 0.32.0", "install the matching pair"])


def test_another_client(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrapped only where dwdp is selected is checked before anything is built."""
    from vllm.v1.engine.core_client import EngineCoreClient

    monkeypatch.setattr(patches, "failures", [])
    monkeypatch.setattr(EngineCoreClient, "make_client", staticmethod(lambda vllm_config: None))
    words = ["takes ['vllm_config'] of the expected ['multiprocess_mode'", "install the matching pair"]
    check_message(refusal(lambda: build(tiny_moe)), words)


def test_the_environment_of_a_launch_passes_vllms_check(tiny_moe: Path) -> None:
    """Several API servers build their configs in it."""
    first = build(tiny_moe)
    second = build(tiny_moe, fail_on_environ_validation=True)
    assert first.compute_hash() == second.compute_hash()


def test_another_platform(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_message(
        refusal(lambda: options.check_settings(DwdpConfig(), platform=CUDA)), ["CuPy", "pip install '.[cuda13]' in"]
    )
    monkeypatch.undo()
    on_gpu = {"transport": ("shm", "cupy_ipc"), "weight_view": ("inplace", "split")}
    for key, (wrong, instead) in on_gpu.items():
        config = DwdpConfig(**{key: wrong})  # type: ignore[arg-type]
        check_message(refusal(lambda config=config: options.check_settings(config, platform=CUDA)), [wrong, instead])
    monkeypatch.setattr(configure, "platform_of", lambda vllms: dataclasses.replace(CPU, worker=("another", "ours")))
    check_message(refusal(lambda: build(tiny_moe)), ["vllm.v1.worker.cpu_worker.CPUWorker", "CPU and CUDA platforms"])


def test_a_kept_memory_profile_is_refused_on_gpus(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says the same for ranks and starts that hold more and less; on CPU nothing reads it."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.startup_plan import compute_plan_fingerprint

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    options.check_settings(DwdpConfig(), CUDA)
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "1")
    words = [
        "VLLM_ENABLE_STARTUP_PLAN=1",
        "one size of the KV cache for all ranks",
        "unset it",
        "--kv-cache-memory-bytes",
    ]
    check_message(refusal(lambda: options.check_settings(DwdpConfig(), CUDA)), words)
    options.check_settings(DwdpConfig(), CPU)
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "2")  # vLLM takes any whole number but 0
    check_message(refusal(lambda: options.check_settings(DwdpConfig(), CUDA)), ["VLLM_ENABLE_STARTUP_PLAN=2"])
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "0")
    options.check_settings(DwdpConfig(), CUDA)
    monkeypatch.undo()
    monkeypatch.setattr(current_platform, "get_device_total_memory", lambda: 1, raising=False)
    config, kept = vllm_config(tiny_moe, additional_config={"dwdp": DwdpConfig().compiled_by()}), set()
    for rank in range(2):
        # As an engine of a launch sets it; its worker is the only one of this engine.
        config.parallel_config.data_parallel_rank = config.parallel_config.data_parallel_index = rank
        kept.add(compute_plan_fingerprint(config, 0, 1))
    assert len(kept) == 1, "vLLM keeps ranks apart: nothing needs to be refused for them"
