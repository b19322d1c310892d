"""Options of vLLM that do not go with dwdp: one line with the numbers and a remedy, and nothing started."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs

from tests.unit.leftovers import build, check_message, refusal
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import options

pytestmark = pytest.mark.usefixtures("nothing_left")

ONE_MACHINE = ["all ranks on one machine", "leave it out"]
ONE_WORKER = ["each rank is one worker", "use 1 and more --data-parallel-size"]
LOCKSTEP = ["lockstep", "independent", "leave it out"]
WHOLE = ["reads the whole checkpoint on every rank", "leave it out"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param({"data_parallel_size": 1}, ["at least 2", "--data-parallel-size is 1", "raise it"], id="one-rank"),
        pytest.param({"data_parallel_size": "2"}, ["'2'", "str", "whole number >= 2"], id="ranks-as-text"),
        pytest.param({"data_parallel_size": 16}, ["16 ranks", "8 experts", "group_size to 8 or less"], id="N-above-E"),
        pytest.param({"tensor_parallel_size": 2}, ["--tensor-parallel-size 2", *ONE_WORKER], id="tp"),
        pytest.param(
            {"tensor_parallel_size": 8, "data_parallel_size": 1},
            ["--tensor-parallel-size 8", *ONE_WORKER],
            id="tp-instead-of-ranks",
        ),
        pytest.param({"pipeline_parallel_size": 3}, ["--pipeline-parallel-size 3", *ONE_WORKER], id="pp"),
        pytest.param(
            {"prefill_context_parallel_size": 2}, ["--prefill-context-parallel-size 2", *ONE_WORKER], id="pcp"
        ),
        pytest.param({"decode_context_parallel_size": 2}, ["--decode-context-parallel-size 2", *ONE_WORKER], id="dcp"),
        pytest.param({"enable_expert_parallel": True}, ["--enable-expert-parallel", *LOCKSTEP], id="ep"),
        pytest.param({"enable_eplb": True}, ["--enable-eplb", *LOCKSTEP], id="eplb"),
        pytest.param({"enable_elastic_ep": True}, ["--enable-elastic-ep", *LOCKSTEP], id="elastic"),
        pytest.param({"enable_dbo": True}, ["--enable-dbo", *LOCKSTEP], id="dbo"),
        pytest.param({"ubatch_size": 4}, ["--ubatch-size 4", "leave it out"], id="ubatch"),
        pytest.param({"headless": True}, ["--headless", "start one `vllm serve`", "size 2"], id="headless"),
        pytest.param({"data_parallel_hybrid_lb": True}, ["hybrid", *ONE_MACHINE], id="hybrid"),
        pytest.param({"data_parallel_start_rank": 0}, ["--data-parallel-start-rank", *ONE_MACHINE], id="start-rank"),
        pytest.param({"data_parallel_external_lb": True}, ["external", *ONE_MACHINE], id="external"),
        pytest.param({"data_parallel_rank": 1}, ["--data-parallel-rank", *ONE_MACHINE], id="rank"),
        pytest.param({"data_parallel_multi_port_external_lb": True}, ["multi-port", *ONE_MACHINE], id="multi-port"),
        pytest.param(
            {"data_parallel_size": 4, "data_parallel_size_local": 2},
            ["--data-parallel-size-local 2 of 4 ranks", *ONE_MACHINE, "set it to 4"],
            id="fewer-local-ranks",
        ),
        pytest.param({"nnodes": 2}, ["--nnodes 2", "use --nnodes 1"], id="nodes"),
        pytest.param(
            {"data_parallel_backend": "ray"}, ["--data-parallel-backend ray", '"launcher": "ray"'], id="dp-ray"
        ),
        # vLLM's own answer is to turn external load balancing on.
        pytest.param(
            {"enable_fault_tolerance": True}, ["--enable-fault-tolerance", *ONE_MACHINE], id="fault-tolerance"
        ),
        pytest.param(
            {"enable_sleep_mode": True}, ["--enable-sleep-mode", "while it sleeps", "leave it out"], id="sleep"
        ),
        pytest.param({"enable_lora": True}, ["--enable-lora", "adapters on experts", "leave it out"], id="lora"),
        pytest.param(
            {"enable_return_routed_experts": True},
            ["--enable-return-routed-experts", "one replica", "leave it out"],
            id="routed-experts",
        ),
        pytest.param(
            {"aux_output_config": {"enable_return_routed_experts": True}},
            ["--enable-return-routed-experts", "leave it out"],
            id="routed-experts-by-config",
        ),
        pytest.param(
            {"weight_transfer_config": {}},
            ["--weight-transfer-config", "replaced", "leave it out"],
            id="weight-transfer",
        ),
        pytest.param({"cpu_offload_gb": 1.0}, ["--cpu-offload-gb", "leave it out"], id="offload"),
        pytest.param({"offload_group_size": 2}, ["--offload-group-size", "leave it out"], id="offload-groups"),
        pytest.param({"mm_encoder_only": True}, ["--mm-encoder-only", "no experts", "leave it out"], id="encoder-only"),
        pytest.param(
            {"engram_config": {"embedding_across_dp": True}},
            ["--engram-config", "wait for each other", "leave it out"],
            id="engram",
        ),
        pytest.param({"worker_cls": "a.B"}, ["--worker-cls a.B", "use --worker-extension-cls"], id="worker-class"),
        # What `LLM` makes of a class.
        pytest.param(
            {"worker_cls": b"\x80"}, ["--worker-cls (a class)", "use --worker-ext"], id="worker-class-pickled"
        ),
        pytest.param({"load_format": "gguf"}, ["--load-format gguf", "auto", "dummy", "safetensors"], id="load-format"),
        pytest.param({"safetensors_load_strategy": "eager"}, ["eager", *WHOLE], id="eager"),
        pytest.param(
            {"model_loader_extra_config": {"enable_multithread_load": True}}, ["multithread", *WHOLE], id="multithread"
        ),
        pytest.param({"quantization": "fp8"}, ["'fp8'", "use a BF16, FP16 or FP32 checkpoint"], id="quantization"),
        pytest.param(
            {"quantization_config": {"moe": "fp8_per_tensor"}},
            ["--quantization-config", "leave it out"],
            id="quantised-while-loading",
        ),
        pytest.param({"additional_config": "num_slots=2"}, ["str", '{"dwdp": {"num_slots": 2}}'], id="config-as-text"),
        pytest.param(
            {"additional_config": {"dwpd": {"num_slots": 3}}}, ["'dwpd'", 'did you mean "dwdp"?'], id="misspelt"
        ),
        pytest.param(
            {"additional_config": {"num_slots": 3}}, ["'num_slots'", '{"dwdp": {"num_slots": ...}}'], id="outside"
        ),
        pytest.param(
            {"additional_config": {"dwdp": {}, "group_size": 2}}, ["'group_size'", '{"dwdp": {"gr'], id="beside"
        ),
    ],
)
def test_options(tiny_moe: Path, arguments: dict[str, Any], words: list[str]) -> None:
    check_message(refusal(lambda: build(tiny_moe, **arguments)), words)


@pytest.mark.parametrize("key", sorted({field.name for field in fields(DwdpConfig)}))
def test_no_setting_outside_is_passed_over(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(options.logger, "warning", lambda text, *values: told.append(text % values))
    args: Any = SimpleNamespace(additional_config={"dwdp": {}, key: 2})
    # Refused where no other plugin can mean it, which most names of two words tell.
    if "_" in key and key != "timeout_s":
        check_message(refusal(lambda: options.settings_of(args)), [repr(key), f'{{"dwdp": {{"{key}": ...}}}}'])
    else:
        assert options.settings_of(args) == DwdpConfig() and len(told) == 1 and repr(key) in told[0]


def test_a_setting_whose_name_others_may_have(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside `dwdp` it may be another plugin's: ours does not read it, and says so."""
    told: list[str] = []
    monkeypatch.setattr(options.logger, "warning", lambda text, *values: told.append(text % values))
    build(tiny_moe, additional_config={"dwdp": {"decode": "auto"}, "other": 1})
    assert not told
    build(tiny_moe, additional_config={"decode": "direct", "other": 1})
    check_message(told.pop(), ["'decode' beside \"dwdp\"", "has to be inside"])
    assert not told


def test_an_option_of_a_later_vllm(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.33's arguments have it; these get it as a class attribute, and it is refused on the same way."""
    monkeypatch.setattr(EngineArgs, "expert_substitution", None, raising=False)
    assert build(tiny_moe).parallel_config.data_parallel_size == 2
    monkeypatch.setattr(EngineArgs, "expert_substitution", "nearest")
    check_message(refusal(lambda: build(tiny_moe)), ["expert_substitution changes which experts", "leave it out"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(
            {"eplb_config": {"num_redundant_experts": 2}}, "num_redundant_experts is set to 2", id="redundant"
        ),
        pytest.param({"enable_cumem_allocator": True}, "cumem allocator is not supported", id="cumem"),
    ],
)
def test_what_vllm_refuses_by_itself(tiny_moe: Path, arguments: dict[str, Any], words: str) -> None:
    assert words in refusal(lambda: build(tiny_moe, **arguments), ValueError)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="nothing-else"),
        pytest.param({"data_parallel_size": 4, "additional_config": {"dwdp": {"group_size": 2}}}, id="two-groups"),
        pytest.param({"data_parallel_size_local": 2}, id="all-ranks-local"),
        pytest.param({"enable_prompt_embeds": True, "async_scheduling": True}, id="engine-options"),
        pytest.param({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, id="ngram"),
        pytest.param(
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, id="kv-transfer"
        ),
    ],
)
def test_what_goes_with_dwdp(tiny_moe: Path, arguments: dict[str, Any]) -> None:
    """The other half of every table above: these are not refused, and what they start goes with the config."""
    config = build(tiny_moe, **arguments)
    assert not config.model_config.is_moe
    assert config.parallel_config.data_parallel_size == arguments.get("data_parallel_size", 2)
