"""`vllm-dwdp plan` as a user meets it: verdicts, memory, crossovers, decode, and wrong input."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hold import choose
from vllm_dwdp.predict.cli import main
from vllm_dwdp.predict.decode import decode_steps, expected_hit, layer_costs, popularity
from vllm_dwdp.predict.hardware_file import FOLDER, load_hardware, shipped
from vllm_dwdp.predict.memory_plan import memory_plan
from vllm_dwdp.predict.read_config import load_model
from vllm_dwdp.predict.strategies import data_parallel, dwdp, expected_maximum, pull_bytes
from vllm_dwdp.predict.units import parse_count, parse_quantity
from vllm_dwdp.predict.verdict import Case, crossover_share, crossover_tokens, judge, threshold
from vllm_dwdp.predict.work import Lengths, prefill


def case(model: str = "DeepSeek-R1-FP4", hardware: str = "gb200", ranks: int = 4, tokens: int = 32768) -> Case:
    return Case(load_model(model), load_hardware(hardware), ranks, Lengths(8192), tokens, osl=1024)


def test_verdicts() -> None:
    assert judge(case()).answer == "use it"
    short = judge(case(tokens=2048))
    assert short.answer == "do not use it here"
    assert short.gain < 0.6
    assert "--max-num-batched-tokens" in short.knob
    full = judge(case("DeepSeek-R1", "h200"))
    assert full.answer == "do not use it here"
    assert "does not fit" in full.reason
    replica = judge(case("Qwen3-30B-A3B", "h200"))
    assert replica.best == "DP", "the whole model fits on every rank"
    assert replica.answer != "use it"


def test_crossover_separates_losing_from_winning() -> None:
    here = case()
    tokens = crossover_tokens(here, "DEP")
    assert tokens is not None
    assert here.gain("DEP", tokens) > 1 > here.gain("DEP", int(tokens * 0.9))
    few = replace(here, tokens=5120)
    share = crossover_share(few, "DEP")
    assert share is not None
    assert replace(few, share=share).gain("DEP") > 1 > replace(few, share=int(share * 0.9)).gain("DEP")


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 6000))
def test_threshold_ends_and_is_near(low: int, span: int, true: int) -> None:
    found = threshold(lambda n: n >= true, low, low + span)
    if true > low + span:
        assert found is None
    else:
        assert found is not None
        assert found >= true
        assert found <= max(low, true) * 1.03 + 1


@settings(max_examples=30)
@given(st.integers(2, 64), st.integers(0, 40))
def test_more_share_means_less_pull_and_more_memory(ranks: int, extra: int) -> None:
    model, hardware = load_model("DeepSeek-R1-FP4"), load_hardware("gb200")
    least = -(-256 // ranks)
    share = min(255, least + extra)
    assert pull_bytes(model, ranks, share) <= pull_bytes(model, ranks, least)
    plans = [memory_plan(model, hardware, ranks, s) for s in (least, share)]
    assert plans[1].share >= plans[0].share
    for plan in plans:
        assert plan.used + plan.kv == pytest.approx(plan.limit)


def test_memory_of_views_and_scales() -> None:
    model, hardware = load_model("DeepSeek-R1-FP4"), load_hardware("gb200")
    split, whole = (memory_plan(model, hardware, 4, view=view) for view in ("split", "contiguous"))
    assert split.slots == 2 * 192 * model.expert_bytes
    assert whole.slots == 2 * 256 * model.expert_bytes
    kept = memory_plan(model, hardware, 4, replicate_scales=True)
    assert kept.scales == 192 * model.expert_params / 16 * 58
    assert kept.slots == pytest.approx(split.slots * 0.5 / 0.5625)
    for settings_of, says in (({"view": "other"}, "split, contiguous"), ({"num_slots": 1}, "at least 2")):
        with pytest.raises(DwdpError, match=says):
            memory_plan(model, hardware, 4, **settings_of)  # type: ignore[arg-type]


def test_what_remains_for_the_cache_is_what_nothing_else_takes() -> None:
    model, hardware = load_model("DeepSeek-R1-FP4"), load_hardware("gb200")
    whole = memory_plan(model, hardware, 4, replicate_scales=True, utilisation=1)
    parts = (whole.replicated, whole.share, whole.slots, whole.scales, whole.working, whole.kv)
    assert sum(parts) == pytest.approx(hardware.memory) and min(parts) > 0
    assert whole.kv_tokens == int(whole.kv / whole.kv_bytes_per_token)
    half = memory_plan(model, hardware, 4, replicate_scales=True, utilisation=0.5)
    assert whole.kv - half.kv == pytest.approx(hardware.memory / 2)
    assert half.kv >= 0 or half.kv_tokens == 0


@pytest.mark.parametrize("view", ["split", "contiguous"])
def test_auto_counts_as_the_table_of_memory_does(view: str) -> None:
    here = replace(case("Qwen3-30B-A3B", "h100", ranks=2, tokens=8192), view=view)
    facts = here.facts()
    for share in (64, 65, 100, 127):
        plan = here.memory(2, share)
        assert facts.kv(share) == pytest.approx(plan.kv) and facts.slots(share) == pytest.approx(plan.slots)
    assert facts.kv_token == here.memory().kv_bytes_per_token


def test_windows_of_attention_hold_a_step_more() -> None:
    here = case("gpt-oss-120b", "h100", tokens=4096)
    # 18 layers look back on 128 tokens, and a step of 4096 is there with them; 18 on all 9216.
    values = 2 * here.model.groups[0].attention.kv_elements()
    assert here.facts().kv_request == 18 * values * (9216 + 128 + 4096)
    # No more than the request has, though.
    assert replace(here, tokens=32768).facts().kv_request == 36 * values * 9216


def test_plan_prints_and_takes_what_auto_would_hold(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "Qwen3-30B-A3B", "--hardware", "h100", "--ranks", "2"]
    assert main([*asked, "--json"]) == 0
    auto = json.loads(capsys.readouterr().out)["auto"]
    here = case("Qwen3-30B-A3B", "h100", ranks=2, tokens=8192)
    held = choose(replace(here, utilisation=0.92).facts())
    assert auto == held.figures() and 64 < auto["experts_per_rank"] < 127
    assert main(asked) == 0
    assert held.describe() in " ".join(capsys.readouterr().out.split())
    assert main([*asked, "--experts-per-rank", "auto", "--json"]) == 0
    with_auto = json.loads(capsys.readouterr().out)
    assert main([*asked, "--experts-per-rank", str(held.share), "--json"]) == 0
    assert with_auto == json.loads(capsys.readouterr().out)
    # Where nothing fits there is nothing to print.
    assert main(["plan", "DeepSeek-R1", "--hardware", "h100", "--ranks", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auto"] is None


def test_dwdp_is_never_ahead_of_a_full_replica() -> None:
    for hardware in map(load_hardware, shipped()):
        for tokens in (512, 8192, 65536):
            work = prefill(Lengths(4096), tokens)
            model = load_model("Qwen3-30B-A3B")
            assert dwdp(model, hardware, work, 4).seconds >= data_parallel(model, hardware, work).seconds


def test_steps_are_filled_with_whole_prompts_or_chunks() -> None:
    chunks, whole = prefill(Lengths(8192, 0.5), 32768), prefill(Lengths(8192, 0.5), 32768, whole=True)
    assert np.allclose(chunks.tokens, 32768)
    assert whole.new.shape[1] == 4
    assert whole.tokens.mean() == pytest.approx(4 * 6144, rel=0.01)
    cached = prefill(Lengths(8192), 8192, cached=0.5)
    assert np.allclose(cached.tokens, 8192)
    assert cached.context.max() > 4096


@given(st.integers(2, 256), st.data(), st.floats(0, 3))
def test_popularity_adds_up(experts: int, data: st.DataObject, skew: float) -> None:
    top_k = data.draw(st.integers(1, experts))
    chance = popularity(experts, top_k, skew)
    assert chance.sum() == pytest.approx(top_k)
    assert chance.max() <= 1 + 1e-9
    assert chance.min() > 0 or skew > 0
    tokens = data.draw(st.integers(1, 64))
    assert expected_hit(chance, tokens) <= expected_hit(popularity(experts, top_k, 0), tokens) + 1e-6


def test_distinct_experts_against_drawing() -> None:
    rng = np.random.default_rng(1)
    drawn = [len(np.unique([rng.choice(64, 4, replace=False) for _ in range(16)])) for _ in range(400)]
    assert expected_hit(popularity(64, 4, 0), 16) == pytest.approx(np.mean(drawn), rel=0.01)


def test_costs_of_a_layer_are_the_models() -> None:
    model, hardware = load_model("qwen3-30b-a3b"), load_hardware("h100")
    costs = layer_costs(model, hardware, 2, 64)
    # Gate, up and down of eight experts: two FLOP for each of 3 * 2048 * 768 weights.
    assert costs.flop == 8 * 2 * 3 * 2048 * 768 and costs.missing == 64 and costs.expert_bytes == 2 * 3 * 2048 * 768


def test_decode_on_demand_and_cache_pull_less() -> None:
    model, hardware = load_model("DeepSeek-R1-FP4"), load_hardware("gb200")
    everything, direct, demand, cache, *_ = decode_steps(model, hardware, 4, 4, 4096, cached=32, skew=1.0)
    assert everything.pulled > direct.pulled == demand.pulled > cache.pulled > 0
    assert demand.seconds < everything.seconds and direct.seconds < everything.seconds
    with pytest.raises(DwdpError, match="misses 192"):
        decode_steps(model, hardware, 4, 4, 4096, cached=193)


@pytest.mark.parametrize("held", [32, 64, 65, 70, 85, 96, 112])
def test_decode_misses_what_is_not_held(held: int) -> None:
    """Also where the experts are no multiple of those held: 85 of 128 miss 43."""
    model, hardware = load_model("Qwen3-30B-A3B"), load_hardware("h100")
    ranks = max(2, 128 // held)
    everything, direct, demand, *_ = decode_steps(model, hardware, ranks, 1 << 16, 4096, share=held)
    missing = (128 - held) * model.expert_bytes * model.moe_layers
    assert everything.pulled == direct.pulled == demand.pulled == pytest.approx(missing, rel=1e-6)
    hit = decode_steps(model, hardware, ranks, 1, 4096, share=held, skew=1.0)[1].pulled / missing * (128 - held)
    assert 0.8 * 8 * (128 - held) / 128 < hit < 8 * (128 - held) / 128, "neither the most popular ones nor the least"


def test_expected_maximum() -> None:
    assert expected_maximum(2) == pytest.approx(0.5642, abs=1e-3)
    assert expected_maximum(4) == pytest.approx(1.0294, abs=1e-3)
    assert expected_maximum(8) == pytest.approx(1.4236, abs=1e-3)


@pytest.mark.parametrize("name", shipped())
def test_every_figure_of_shipped_hardware_has_a_source(name: str) -> None:
    hardware = load_hardware(name)
    assert set(hardware.sources) >= {"memory", "memory_bandwidth", "peak", "link", "interference", "board_power"}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"4.8 TB/s"', '"-4.8 TB/s"', "must be above 0"),
        ('"4.8 TB/s"', '"4.8 Tb/s"', "bits: divide by 8"),
        ('"4.8 TB/s"', '"4.8 PFLOP/s"', "must be in bytes/s"),
        ('"4.8 TB/s"', "4.8", "a number and its unit"),
        ('topology = "switch"', 'topology = "ring"', "switch, mesh"),
        ("[peak]", "[peaks]", "did you mean peak"),
        ("max_ranks = 8", "max_ranks = 1", "whole number >= 2"),
        ('name = "H200"', "name = ", "no valid TOML"),
    ],
)
def test_wrong_hardware_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, says: str
) -> None:
    text = (FOLDER / "h200.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new))
    assert main(["plan", "gpt-oss-120b", "--hardware", str(path)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "nowhere/model"], "give the path of its config.json"),
        (["plan", "gpt-oss-120b", "--hardware", "h20"], "did you mean"),
        (["plan", "gpt-oss-120b", "--ranks", "9"], "2..8"),
        (["plan", "gpt-oss-120b", "--ranks", "1"], "2..8"),
        (["plan", "gpt-oss-120b", "--experts-per-rank", "8"], "holds 32..128"),
        (["plan", "Mixtral-8x7B-v0.1", "--isl", "64K"], "exceed the 32768 positions"),
        (["plan", "gpt-oss-120b", "--cached-experts", "500"], "misses 96"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--isl", "-1"], ["--tokens-per-step", "8GB"], ["--length-ratio", "2"], ["--rank", "x"]]
)
def test_wrong_arguments_end_with_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "gpt-oss-120b", *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_text_and_json_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "DeepSeek-R1-FP4", "--hardware", "GB200", "--ranks", "4", "--tokens_per_step", "32K"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("DWDP: use it")
    assert max(map(len, text.splitlines())) <= 125
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["verdict"]["best"] == "DEP"
    assert plan["steps"]["DWDP"]["tokens_per_gpu"] > plan["steps"]["DEP"]["tokens_per_gpu"]


def test_paper_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["paper"]) == 0
    assert "| T2 (exact) | N=16, C=5, % |" in capsys.readouterr().out
    monkeypatch.setattr("vllm_dwdp.predict.reproduce.KNOWN_MISSES", {})
    assert main(["paper"]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_units() -> None:
    assert parse_count("32K", "x") == 32768
    assert parse_count("32k", "x") == 32000
    assert parse_quantity("900 GB/s", "bytes/s", "x") == 9e11
    assert parse_quantity("1 GiB", "bytes", "x") == 2**30
    assert parse_quantity("4 us", "seconds", "x") == pytest.approx(4e-6)
