"""Tokens that travel, in the planner: constants of the layer bench, engines that were held out, the settings of a launch."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ci.report.travel import constants, rows
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict import travel
from vllm_dwdp.predict.cli import main
from vllm_dwdp.predict.closed_loop import Loop, closed_loop
from vllm_dwdp.predict.decode import decode_steps, layer_costs, predicted_few, travel_layer
from vllm_dwdp.predict.hardware_file import load_hardware
from vllm_dwdp.predict.measured import RUNS
from vllm_dwdp.predict.read_config import load_model
from vllm_dwdp.predict.reproduce import KNOWN_MISSES, held_out_rows
from vllm_dwdp.predict.roofline import local_time
from vllm_dwdp.predict.work import Lengths, prefill

ROOT = Path(__file__).resolve().parents[2]
MODEL, H100 = load_model("qwen3-30b-a3b"), load_hardware("h100")


def layer(ranks: int = 2, held: int = 64) -> travel.TravelLayer:
    return travel_layer(MODEL, H100, ranks, layer_costs(MODEL, H100, ranks, held, 1e-5))


def test_constants_are_the_medians_of_the_layer_bench() -> None:
    measured = rows()
    assert len(measured) == 25
    for name, seconds in constants(measured).items():
        assert getattr(travel, name) == pytest.approx(seconds, abs=5e-8), name
    # At one token launches decide, and are shorter.
    assert max(abs(m.predicted / m.seconds - 1) for m in measured if m.tokens > 1) < 0.12
    assert max(abs(m.predicted / m.seconds - 1) for m in measured) < 0.31


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.file}-{run.load}")
def test_engines_are_those_of_the_raw_files(run: Any) -> None:
    raw = json.loads((ROOT / f"docs/benchmarks/two-h100/{run.file}.json").read_text())
    (system,) = [name for name in raw["turns"][run.load] if name != "dpep"]
    rates = [turn["tokens_per_s"] for turn in raw["turns"][run.load][system]]
    assert run.tokens_per_s == pytest.approx(statistics.median(rates), abs=1)
    (load,) = [load for load in raw["loads"] if load["name"] == run.load]
    assert (run.loop.isl, run.loop.osl) == (load["input"], load["output"])
    assert run.loop.concurrency <= load["concurrency"]


def test_engines_that_miss_are_listed() -> None:
    held_out = [row for row in held_out_rows() if row.table == "two H100s"]
    assert len(held_out) == len(RUNS) and all(row.limit == 0.25 for row in held_out)
    assert {row.label for row in held_out if not row.kept} == {name for name in KNOWN_MISSES if "layers" in name}


@settings(max_examples=60)
@given(st.integers(2, 8), st.integers(1, 256), st.integers(0, 127), st.floats(0, 1))
def test_a_layer_whose_tokens_travel(ranks: int, tokens: int, more: int, prompts: float) -> None:
    held = min(127, -(-128 // ranks) + more)
    here = layer(ranks, held)
    busy = here.seconds(tokens)
    assert here.seconds(tokens, idle=True) <= busy <= here.seconds(tokens + 1)
    assert busy <= here.seconds(tokens, prompts=prompts) <= here.seconds(tokens, prompts=1.0)
    # With every owner late: the limit and then a direct read, the rest of the layer once.
    direct = here.costs.direct_s(tokens) + travel.LAUNCHES_S
    assert here.seconds(tokens, prompts=1.0) <= max(busy, 2 * direct + 1e-4)
    local = here.costs.other_s + here.costs.local_s(tokens)
    assert busy >= local + travel.LAUNCHES_S + travel.REQUEST_S


def test_nothing_travels_where_nothing_is_missing() -> None:
    costs = layer_costs(MODEL, H100, 2, 128)
    here = travel_layer(MODEL, H100, 2, costs).seconds(32)
    assert here == pytest.approx(costs.local_s(32) + travel.LAUNCHES_S, rel=1e-6)


def test_who_travels_follows_the_settings() -> None:
    few = predicted_few(MODEL, H100, 2)
    most = DwdpConfig().travel_tokens
    assert few.travel == few.direct == most
    assert [few.way(n) for n in (1, most, most + 1)] == ["travel", "travel", "pulled"]
    less = predicted_few(MODEL, H100, 2, travel_tokens=16)
    assert less.travel == 16 < less.direct and less.way(17) == "direct"
    asked = predicted_few(MODEL, H100, 2, decode="direct")
    assert asked.travel == 0 < asked.direct == less.direct
    whole = predicted_few(MODEL, H100, 2, view="contiguous")
    assert whole.way(1) == "pulled" and whole.why is not None
    fp4 = predicted_few(load_model("DeepSeek-R1-FP4"), load_hardware("gb200"), 4)
    assert fp4.travel == 0 < fp4.direct and "nvfp4" in str(fp4.why)
    for view in ("split", "contiguous"):
        with pytest.raises(DwdpError, match="--decode travel, but"):
            predicted_few(load_model("DeepSeek-R1-FP4"), load_hardware("gb200"), 4, view=view, decode="travel")


@settings(max_examples=60)
@given(st.integers(2, 8), st.integers(0, 127), st.integers(1, 64))
def test_few_tokens_are_read_only_where_that_is_surely_faster(ranks: int, more: int, most: int) -> None:
    held = min(127, -(-128 // ranks) + more)
    here = travel_layer(MODEL, H100, ranks, layer_costs(MODEL, H100, ranks, held))
    first = travel.first_to_travel(here, most)
    assert 1 <= first <= min(most, 3)
    for tokens in range(1, most + 1):
        surely = here.costs.direct_s(tokens) + travel.LAUNCHES_S <= 0.75 * here.seconds(tokens)
        assert surely or first <= tokens
        assert not surely or tokens != first or tokens in (most, 3)


@pytest.mark.parametrize(("held", "first"), [(64, 1), (96, 1), (112, 2), (120, 3)])
def test_where_nearly_all_experts_are_held_one_token_is_read(held: int, first: int) -> None:
    """Measured on two H100s with 112 held: 38 to 54 microseconds a layer for 64 to 69 at one token, 246 to 313 for 188 to
    209 at eight."""
    few = predicted_few(MODEL, H100, 2, held)
    assert few.first == first
    assert [few.way(n) for n in (1, 2, 3)] == ["direct"] * (first - 1) + ["travel"] * (4 - first)
    assert predicted_few(MODEL, H100, 2, held, decode="travel").way(1) == "travel"
    said = few.lines(2)[0]
    span = "of at most 1,024" if first == 1 else f"of {first} to 1,024"
    assert f"tokens travel in steps {span} tokens a rank" in said and ("in smaller ones" in said) == (first > 1)


def test_no_more_than_two_tokens_are_read_where_they_could_travel() -> None:
    """By the estimate alone three are, and seven in FP8; nobody has measured it."""
    assert predicted_few(MODEL, load_hardware("h200"), 2, 120).first == travel.MOST_READ + 1 == 3
    assert predicted_few(MODEL, load_hardware("h200"), 2, 120, travel_tokens=2).first == 2


def test_decode_whose_tokens_travel_is_ahead_of_reads_and_pulls() -> None:
    steps = {d.way: d for d in decode_steps(MODEL, H100, 2, 32, 640, travel=256)}
    travels = steps["DWDP, tokens travel"]
    assert travels.pulled == 0 and steps["DWDP, direct reads"].seconds > 3 * travels.seconds
    assert travels.seconds > steps["DP (full replica)"].seconds
    assert "DWDP, tokens travel" not in {d.way for d in decode_steps(MODEL, H100, 2, 32, 640, travel=31)}


def test_a_loop_with_more_requests_gives_more_tokens() -> None:
    rates = [closed_loop(MODEL, H100, 2, Loop(n, 512, 256), share=64) for n in (1, 2, 8, 64)]
    assert [r.tokens_per_s for r in rates] == sorted(r.tokens_per_s for r in rates)
    assert rates[0].decode_s < rates[1].decode_s, "of one request the owner is idle"
    direct = closed_loop(MODEL, H100, 2, Loop(64, 512, 256), share=64, decode="direct")
    assert direct.between_s > 2 * rates[-1].between_s


def test_a_step_with_a_prompt_travels_where_it_is_short_enough() -> None:
    def prompt_s(isl: int, decode: str = "travel", most: int = 1024, at_a_time: int = 64) -> float:
        loop = Loop(at_a_time, isl, 256)
        return closed_loop(MODEL, H100, 2, loop, share=64, decode=decode, travel_tokens=most).prompt_s

    pulled = prompt_s(512, "direct")
    assert prompt_s(512) < 0.9 * pulled
    # The others of its rank, 31, are in the step too.
    assert prompt_s(512, most=542) == pulled > prompt_s(512, most=543)
    assert prompt_s(2048) == prompt_s(2048, "direct")
    assert prompt_s(512, at_a_time=1) < prompt_s(512), "nobody else asks, and no owner computes prompts"
    work = prefill(Lengths(4096), 4096)
    alone = local_time(MODEL, H100, work)
    own_s = float(alone.total.mean() - alone.grouped.mean())
    assert prompt_s(4096, most=4096, at_a_time=1) > own_s, "attention of the prompt, not of a token, is in it"


def test_plan_respects_decode_and_travel_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*more: str) -> dict[str, Any]:
        assert main(["plan", "qwen3-30b-a3b", "--hardware", "h100", "--ranks", "2", "--json", *more]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        found["ways"] = {d["way"] for d in found["decode"]}
        return found

    assert plan()["travel_tokens"] == DwdpConfig().travel_tokens
    assert "DWDP, tokens travel" in plan("--decode", "travel")["ways"]
    for more in (("--decode", "direct"), ("--travel-tokens", "32"), ("--weight-view", "contiguous")):
        assert "DWDP, tokens travel" not in plan(*more)["ways"]
    for words, says in (
        (["--weight-view", "contiguous"], "every forward pulls"),
        (["--expert-format", "nvfp4"], "nvfp4"),
    ):
        assert main(["plan", "qwen3-30b-a3b", "--decode", "travel", *words]) == 2
        line = capsys.readouterr().err
        assert says in line and line.count("\n") == 1
    for more, said in (
        (("--weight-view", "contiguous"), "DWDP pulls in every step."),
        (("--decode", "direct"), "DWDP reads directly in steps of at most "),
        (("--travel-tokens", "2"), "DWDP has tokens travel in steps of at most 2 tokens a rank, reads directly up to "),
    ):
        assert main(["plan", "qwen3-30b-a3b", "--hardware", "h100", "--ranks", "2", *more]) == 0
        text = capsys.readouterr().out
        assert f"  {said}" in text and ("pulls in larger ones" in text) == ("every" not in said)
    with pytest.raises(SystemExit):
        main(["plan", "qwen3-30b-a3b", "--decode", "pull"])
    assert capsys.readouterr().err.count("\n") == 1
