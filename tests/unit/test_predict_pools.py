"""Pools of prefill and decode: what holds whatever is asked, the simulator's queues, T5 and T6, and wrong input."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict import prefill_pool
from vllm_dwdp.predict.arguments import build
from vllm_dwdp.predict.cli import main
from vllm_dwdp.predict.decode_pool import DecodeEngine, decode_engines, decode_step_s, sequences_in_memory
from vllm_dwdp.predict.fitted import FITTED
from vllm_dwdp.predict.hardware_file import load_hardware
from vllm_dwdp.predict.paper_model import end_to_end
from vllm_dwdp.predict.pools import PoolRequest, Pools, pools
from vllm_dwdp.predict.pools_report import OF_ONE_LAUNCH
from vllm_dwdp.predict.prefill_pool import LOADS, PrefillGroup, prefill_group
from vllm_dwdp.predict.published import T5
from vllm_dwdp.predict.read_config import load_model
from vllm_dwdp.predict.reproduce import KNOWN_MISSES, held_out_rows
from vllm_dwdp.predict.strategies import Options
from vllm_dwdp.predict.verdict import Case
from vllm_dwdp.predict.work import Lengths

R1 = Case(
    load_model("DeepSeek-R1-FP4", None, "fp8"), load_hardware("gb200"), 4, Lengths(8192, 0.8), 32768, osl=1024,
    options=Options(kv_element=1.0),
)  # fmt: skip


MANY = prefill_pool._PROMPTS


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds, holds of short simulations too."""
    monkeypatch.setattr(prefill_pool, "_PROMPTS", 120)
    monkeypatch.setattr(prefill_pool, "_OF_A_RANK", 30)


def asked(rate: float = 50.0, ttft: float = 4.0, user: float = 40.0, transfer: float = 5e10) -> PoolRequest:
    return PoolRequest(R1, rate, ttft, user, transfer)


@cache
def groups() -> dict[str, PrefillGroup]:
    return {way: prefill_group(R1, way) for way in ("DWDP", "DEP")}


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 3000), st.floats(1.0, 30), st.floats(1, 150))
def test_pools_sum_and_no_gpu_does_more_than_its_pool_can(rate: float, more: float, user: float) -> None:
    found = pools(asked(rate, 4.0, user), groups())
    bigger = pools(asked(rate * more, 4.0, user), groups())
    assert set(found) == {"DWDP", "DEP"}
    for way, pool in found.items():
        assert isinstance(pool, Pools)
        assert pool.gpus == pool.prefill_gpus + pool.decode_gpus
        assert pool.prefill_gpus == 4 * pool.groups and pool.decode_gpus == pool.engines * pool.decode.ranks
        assert pool.tokens_per_gpu * pool.gpus == pytest.approx(rate * 1024)
        assert pool.tokens_per_gpu <= min(pool.prefill_limit, pool.decode.tokens_per_gpu)
        assert pool.load < 1 and pool.ttft_s <= 4.0 and pool.decode.step_s <= 1 / user
        more_of = bigger[way]
        assert isinstance(more_of, Pools) and more_of.gpus >= pool.gpus and more_of.groups >= pool.groups
        # The KV cache of 7,373 tokens moves, and decode computes the first token.
        after = R1.model.kv_bytes(7372.8, 1.0) / 5e10 + pool.decode.step_s
        assert pool.ttft_s == pytest.approx(pool.prefill.ttft_s(rate / pool.groups) + after)
        # One group less is late, or is not enough.
        if pool.groups > 1:
            assert pool.prefill.ttft_s(rate / (pool.groups - 1)) + after > 4.0


@settings(max_examples=25, deadline=None)
@given(st.floats(0.02, 0.98), st.floats(1.0, 1.5), st.sampled_from(["DWDP", "DEP"]))
def test_more_load_waits_longer(load: float, more: float, way: str) -> None:
    here = groups()[way]
    rate = load * here.prompts_per_s
    assert here.ttft[0] <= here.ttft_s(rate) <= here.ttft_s(rate * more)
    assert here.ttft_s(here.prompts_per_s) == math.inf
    assert len(here.ttft) == len(LOADS)


def test_with_one_prompt_a_step_it_is_an_m_d_1_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take one prompt: the mean wait is load / (2 (1 - load)) of a prompt's time."""
    monkeypatch.setattr(prefill_pool, "_PROMPTS", MANY)
    alone = prefill_group(replace(R1, lengths=Lengths(8192), tokens=8192), "DWDP")
    assert alone.prompts_per_s == pytest.approx(4 / alone.ttft[0], rel=0.05)
    for load in (0.3, 0.6, 0.8):
        wait = load / 2 / (1 - load) * 4 / alone.prompts_per_s
        assert alone.ttft_s(load * alone.prompts_per_s) == pytest.approx(4 / alone.prompts_per_s + wait, rel=0.12)


def test_groups_are_the_fewest_that_wait_no_longer() -> None:
    here = PrefillGroup("DWDP", 4, 10.0, tuple(1 / (1 - load) for load in LOADS))
    assert here.needed(0.1, 1.5) == 1 and here.needed(100, here.ttft[0] - 1e-9) is None
    for rate in (3.0, 50.0, 700.0):
        found = here.needed(rate, 2.5)
        assert found is not None and here.ttft_s(rate / found) <= 2.5
        assert found == 1 or here.ttft_s(rate / (found - 1)) > 2.5
    # Whatever the target, none is planned above the last of LOADS.
    assert here.needed(97, 1e9) == 10 and here.needed(97.1, 1e9) == 11


def test_looser_targets_never_need_more() -> None:
    by_ttft = [pools(asked(ttft=t), groups())["DWDP"] for t in (1.0, 2.0, 10.0)]
    by_user = [pools(asked(user=u), groups())["DWDP"] for u in (100.0, 40.0, 10.0)]
    for found in (by_ttft, by_user):
        sizes = [pool.gpus for pool in found if isinstance(pool, Pools)]
        assert len(sizes) == 3 and sizes == sorted(sizes, reverse=True)


def test_an_engine_is_full_at_the_speed_or_in_its_memory() -> None:
    found = decode_engines(R1.model, R1.hardware, 7400, 1024, 40, R1.options)
    assert {engine.way for engine in found} == {"DEP", "TP"}, "a replica does not fit"
    for engine in found:
        inside = sequences_in_memory(R1.model, R1.hardware, engine.way, engine.ranks, 8424, R1.options)
        assert engine.sequences <= inside
        one_more = decode_step_s(
            R1.model, R1.hardware, engine.way, engine.ranks, engine.sequences + 1, 7400 + 512, R1.options
        )
        assert engine.step_s <= 1 / 40 and (one_more > 1 / 40 or engine.sequences in (inside, 4096))


def test_some_slots_are_spare() -> None:
    engine = DecodeEngine("DEP", 8, 100, 0.02)
    assert engine.slots == 800 and engine.tokens_per_gpu == 800 / 0.02 / 8
    # 16 requests/s of 1,000 tokens are 320 at a time, and 36 more at times.
    assert engine.needed(16, 1000) == 1 and engine.needed(37, 1000) == 1 and engine.needed(38, 1000) == 2
    assert replace(engine, way="TP").slots == 100


def test_heads_are_split_and_latent_caches_are_not() -> None:
    def inside(model: str, way: str) -> int:
        return sequences_in_memory(load_model(model), load_hardware("h200"), way, 8, 8192)

    # Less weight on a rank, and an eighth of each request; of a latent cache all.
    assert inside("gpt-oss-120b", "TP") > 8 * inside("gpt-oss-120b", "DEP")
    assert inside("DeepSeek-V2", "DEP") < inside("DeepSeek-V2", "TP") < 2 * inside("DeepSeek-V2", "DEP")


def test_t5_and_t6_are_held_out_and_misses_listed() -> None:
    held_out = [row for row in held_out_rows() if row.table == "T5+T6"]
    assert [row.published for row in held_out] == [1.10, 1.08, 1.10, 1.06, 0.97]
    assert all(row.limit == 0.05 and row.absolute for row in held_out)
    assert {row.label for row in held_out if not row.kept} == {name for name in KNOWN_MISSES if "/user" in name}
    # The faster users are served, the more GPUs decode, and the less prefill is worth.
    gains = [end_to_end(FITTED, (band.low + band.high) / 2) for band in T5]
    assert gains == sorted(gains, reverse=True) and min(gains) > 1


ARGUMENTS = ["plan", "DeepSeek-R1-FP4", "--hardware", "gb200", "--tokens-per-step", "32K", "--kv-cache-dtype", "fp8"]


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*ARGUMENTS, "--disaggregated", "--rate", "100", "--ttft", "5 s", "--tokens-per-user", "50"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "DWDP over DEP as prefill: +" in text and max(map(len, text.splitlines())) <= 110
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ours, theirs = found["pools"]["DWDP"], found["pools"]["DEP"]
    assert ours["prefill"]["gpus"] + ours["decode"]["gpus"] == ours["gpus"] < theirs["gpus"]
    assert ours["tokens_per_gpu"] == pytest.approx(100 * 1024 / ours["gpus"])
    # A slower network: the KV cache of a prompt takes longer.
    assert main([*words, "--json", "--transfer-rate", "1 GB/s"]) == 0
    assert json.loads(capsys.readouterr().out)["transfer_s"] == pytest.approx(50 * found["transfer_s"])


def test_one_way_may_be_too_slow(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*ARGUMENTS, "--disaggregated", "--rate", "1", "--ttft", "550 ms"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["pools"]
    assert "a prompt alone takes" in found["DWDP"]["reason"] and found["DEP"]["gpus"]
    assert main(words) == 0
    assert "DWDP: a prompt alone takes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--disaggregated"], "needs --rate"),
        (["--rate", "3"], "add --disaggregated"),
        (["--ttft", "3 s"], "add --disaggregated"),
        (["--disaggregated", "--rate", "3", "--ttft", "3"], "a number and its unit"),
        (["--disaggregated", "--rate", "3", "--transfer-rate", "50 Gb/s"], "divide by 8"),
        (["--disaggregated", "--rate", "3", "--plot", "x.png"], "pools have no picture"),
        (["--disaggregated", "--rate", "3", "--decode", "direct"], "--decode direct says how a launch decodes"),
        (["--disaggregated", "--rate", "3", "--skew", "1"], "--skew 1.0 says how a launch decodes"),
        (["--disaggregated", "--rate", "3", "--cached-experts", "8"], "--cached-experts 8 says"),
        (["--disaggregated", "--rate", "3", "--decode-sequences", "8"], "--decode-sequences 8 says"),
        (["--disaggregated", "--rate", "3", "--travel-tokens", "8"], "--travel-tokens 8 says"),
        (["--disaggregated", "--rate", "3", "--ttft", "1 ms"], "no number of GPUs meets --ttft 1 ms"),
        (["--disaggregated", "--rate", "3", "--tokens-per-user", "5000"], "lower --tokens-per-user"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main([*ARGUMENTS, *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [["--rate", "0"], ["--rate", "nan"], ["--tokens-per-user", "-1"]])
def test_wrong_numbers(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit):
        main([*ARGUMENTS, "--disaggregated", *words])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("way", ["DWDP", "DEP"])
def test_prompts_of_too_many_steps_are_refused_at_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is simulated; those of 64 steps are, by all eight ranks of a group."""
    monkeypatch.setattr(prefill_pool, "_PROMPTS", MANY)
    monkeypatch.setattr(prefill_pool, "_OF_A_RANK", 100)

    def simulated(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(prefill_pool, "Fleet", simulated)
    long = replace(R1, ranks=8, lengths=Lengths(131072), tokens=2048)
    with pytest.raises(NotImplementedError):
        prefill_group(long, way)
    with pytest.raises(DwdpError, match=r"^--tokens-per-step 16: prompts take 512 steps .* of 15 at most: raise it"):
        prefill_group(replace(long, lengths=Lengths(8192), tokens=16), way)


def test_a_model_that_does_not_fit_a_group() -> None:
    whole = replace(R1, model=load_model("DeepSeek-R1"), hardware=load_hardware("h200"))
    with pytest.raises(
        DwdpError,
        match=r"GPUs will do \(DWDP: a rank of 4 has no room for a prompt; DEP: a rank of 4 has no room .*\): add --ranks",
    ):
        pools(PoolRequest(whole, 1, 9, 1, 5e10))
    with pytest.raises(DwdpError, match="no engine on H100 decodes"):
        pools(PoolRequest(replace(whole, hardware=load_hardware("h100")), 1, 9, 1, 5e10))


def test_flags_of_one_launch_are_the_parsers() -> None:
    given = vars(build().parse_args(["plan", "qwen3-30b-a3b"]))
    assert {key: given[key] for key in OF_ONE_LAUNCH} == OF_ONE_LAUNCH
