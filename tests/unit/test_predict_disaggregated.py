"""The simulator with a pool that decodes: step by step, transfers, the planner's pools, DWDP's small steps, wrong input."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.test_predict_fuzz import changed
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.cli import main
from vllm_dwdp.predict.decode_pool import decode_step_s
from vllm_dwdp.predict.pools import PoolRequest, Pools, pools
from vllm_dwdp.predict.sim import scenario as scenarios
from vllm_dwdp.predict.sim.decode_pool import DecodeCosts, run_decode
from vllm_dwdp.predict.sim.disaggregated import PoolsResult, run_disaggregated
from vllm_dwdp.predict.sim.engine import Engine
from vllm_dwdp.predict.sim.requests import Request
from vllm_dwdp.predict.sim.run import run_scenario
from vllm_dwdp.predict.verdict import Case

BASE: dict[str, Any] = {
    "model": "DeepSeek-R1-FP4",
    "hardware": "gb200",
    "ranks": 8,
    "group_size": 4,
    "seconds": "60 s",
    "tokens_per_step": "32K",
    "ways": ["DWDP", "DEP"],
    "kv_cache_dtype": "fp8",
    "linear_format": "fp8",
    "requests": {"rate": 2.0, "isl": "8K", "length_ratio": 0.8, "osl": 256},
    "decode_pool": {"way": "DEP", "ranks": 8, "group_size": 8, "max_sequences": 64},
}
ROOT = Path(__file__).resolve().parents[2]


def scenario(disaggregated: bool = True, **changed: Any) -> scenarios.Scenario:
    return scenarios.parse_scenario({**BASE, **changed}, "test", disaggregated)


def results(s: scenarios.Scenario) -> dict[str, PoolsResult]:
    return {r.way: r for r in run_disaggregated(s)}


def step_by_step(
    costs: DecodeCosts, requests: list[tuple[float, float, float]], osl: int, per_token: float, until: float
) -> tuple[list[float], int, int, float]:
    """`run_decode` the slow way: (times to first tokens, tokens, requests that ended, seconds busy)."""
    ready, received = [], 0.0
    for _, sent, tokens in requests:
        received = max(received + tokens * per_token / costs.ranks, sent)
        ready.append(received)
    now, at, running = 0.0, 0, []
    ttft, tokens, finished, busy = [], 0, 0, 0.0
    while True:
        new = []
        while at < len(requests) and ready[at] <= now and len(running) < costs.slots:
            running.append([requests[at][2], 0])
            new.append(at)
            at += 1
        if not running:
            if at == len(requests) or ready[at] >= until:
                break
            now = ready[at]
            continue
        seconds, _ = costs.step(len(running), sum(context + made for context, made in running))
        if now + seconds > until:
            busy += until - now
            break
        now += seconds
        busy += seconds
        ttft += [now - requests[i][0] for i in new]
        tokens += len(running)
        for one in running:
            one[1] += 1
        finished += sum(made == osl for _, made in running)
        running = [one for one in running if one[1] < osl]
    return ttft, tokens, finished, busy * costs.ranks


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 60), st.integers(1, 4), st.floats(0.5, 20))
def test_steps_that_are_alike_are_taken_together(seed: int, count: int, osl: int, slots: int, rate: float) -> None:
    costs = DecodeCosts(scenario(decode_pool={"ranks": 2, "group_size": 2, "max_sequences": slots}))
    rng = np.random.default_rng(seed)
    came = np.sort(rng.uniform(0, count / rate, count))
    sent, tokens = came + 0.5, rng.integers(100, 9000, count).astype(float)
    until = float(rng.uniform(0.3, 1.2) * (came[-1] + 3))
    found = run_decode(costs, came, sent, tokens, osl, 1e-6, until)
    ttft, made, finished, busy = step_by_step(
        costs, list(zip(came.tolist(), sent.tolist(), tokens.tolist(), strict=True)), osl, 1e-6, until
    )
    assert list(found.ttft) == pytest.approx(ttft)
    assert (found.tokens, found.finished) == (made, finished)
    assert found.busy == pytest.approx(busy)
    # Every token but a request's first came some time after another one.
    assert sum(found.gaps.values()) == pytest.approx(made - len(ttft))


@pytest.mark.parametrize(("way", "size"), [("DEP", 8), ("TP", 4), ("DP", 1)])
def test_a_step_takes_what_the_planner_says(way: str, size: int) -> None:
    s = scenario(decode_pool={"way": way, "ranks": 8, "group_size": size, "max_sequences": 256})
    costs = DecodeCosts(s)
    for each in (1, 16, 200):
        count = each if way == "TP" else each * size
        seconds, more = costs.step(count, count * 8000.0)
        assert seconds == pytest.approx(decode_step_s(s.model, s.hardware, way, size, each, 8000, s.options), rel=0.01)
        assert costs.step(count, count * 8001.0)[0] == pytest.approx(seconds + more)


def test_prompts_leave_one_after_the_other() -> None:
    engine = Engine([Request(0.0, 100, 20, 1), Request(0.0, 50, 0, 1), Request(9.0, 10, 0, 1)], 1000, 8, (None,), 0.01)
    for start, end in ((0.0, 1.0), (9.0, 9.5)):
        engine.admit(start)
        engine.plan()
        engine.finish(start, end)
    # The KV cache of what was cached moves too; the second waits for the first.
    assert engine.log.handed.tolist() == pytest.approx([0.0, 2.2, 120, 0.0, 2.7, 50, 9.0, 9.6, 10])
    assert not engine.log.ttft and not engine.running and not engine.has_work


def test_a_slower_network_delays_and_loses_nothing() -> None:
    fast, slow = (
        results(scenario(decode_pool={**BASE["decode_pool"], "transfer_rate": rate}))["DWDP"]
        for rate in ("50 GB/s", "1 GB/s")
    )
    assert slow.requests == fast.requests
    # 259 MB take a quarter of a second longer, and the prompts of one step leave one after the other.
    assert 0.2 < slow.ttft[0] - fast.ttft[0] < 0.8
    jammed = results(scenario(decode_pool={**BASE["decode_pool"], "transfer_rate": "100 MB/s"}))["DWDP"]
    assert jammed.output_per_gpu < 0.5 * fast.output_per_gpu


def test_what_comes_is_counted_once() -> None:
    for r in results(scenario()).values():
        assert r.finished <= r.computed <= r.requests and r.lost == 0
        assert r.output_per_gpu * 16 * 60 == pytest.approx(r.finished * 256, rel=0.2)
        assert 0 <= r.decode_idle <= 1 and 0 <= r.prefill_idle <= 1
    again = results(scenario())
    assert again == results(scenario())
    few = results(scenario(decode_pool={**BASE["decode_pool"], "max_sequences": 1}))["DWDP"]
    assert few.finished < again["DWDP"].finished and few.transfer[0] > 1, "requests wait for slots"


def test_a_dead_rank_of_dwdp_hands_its_prompts_on() -> None:
    faults = [{"rank": 1, "dead_at": "20 s"}]
    dead = results(scenario(faults=faults, requests={**BASE["requests"], "rate": 1.0}))
    assert dead["DWDP"].lost == 0 < dead["DEP"].lost
    assert dead["DWDP"].requests == dead["DEP"].requests >= dead["DEP"].finished + dead["DEP"].lost


def test_planned_pools_do_in_the_simulator_what_was_planned() -> None:
    s = scenario()
    case = Case(s.model, s.hardware, 4, s.stream.lengths, s.tokens_per_step, osl=256, options=s.options)
    planned = pools(PoolRequest(case, 40.0, 2.0, 30.0, 5e10))
    for way, pool in planned.items():
        assert isinstance(pool, Pools)
        decode = {"way": pool.decode.way, "ranks": pool.decode_gpus, "group_size": pool.decode.ranks}
        run = results(
            scenario(
                ranks=pool.prefill_gpus, seconds="300 s", ways=[way],
                requests={**BASE["requests"], "rate": 40 / pool.prefill_gpus},
                decode_pool={**decode, "max_sequences": pool.decode.sequences},
            )
        )[way]  # fmt: skip
        assert run.ttft[0] <= 2.0 and run.ttft[0] == pytest.approx(pool.ttft_s, rel=0.35)
        assert run.gap[2] <= 1 / 30 * 1.01
        assert run.output_per_gpu == pytest.approx(pool.tokens_per_gpu, rel=0.1)


def test_without_the_flag_the_same_file_decodes_where_it_computes() -> None:
    together = scenario(disaggregated=False)
    assert together.pool is None
    assert {r.way for r in run_scenario(together)} == {"DWDP", "DEP"}


def test_small_steps_of_dwdp_travel_or_read() -> None:
    def gap(**more: Any) -> float:
        load = {"rate": 0.5, "isl": 512, "osl": 128}
        given = {"model": "qwen3-30b-a3b", "hardware": "h100", "ranks": 2, "group_size": 2, "ways": ["DWDP"], **more}
        (run,) = run_scenario(scenario(False, requests=load, linear_format="bf16", **given))
        return run.gap[0]

    travels, reads = gap(), gap(decode="direct")
    assert travels < 0.7 * reads < reads < 0.05 < gap(weight_view="contiguous")
    assert gap(travel_tokens=1) > travels


@settings(max_examples=60, deadline=20_000, suppress_health_check=list(HealthCheck))
@given(changed(BASE))
def test_scenarios(raw: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenarios, "MOST_EVENTS", 2e4)
        try:
            found = run_disaggregated(scenarios.parse_scenario(raw, "test", True))
        except DwdpError as caught:
            assert "\n" not in str(caught)
            return
    for r in found:
        assert 0 <= r.output_per_gpu < math.inf and 0 <= r.finished + r.lost <= r.requests


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decode_pool": None}, "[decode_pool] is missing"),
        ({"decode_pool": {"rank": 8}}, "did you mean ranks"),
        ({"decode_pool": {"ranks": 8, "way": "DWDP"}}, "DEP, TP, DP"),
        ({"decode_pool": {"ranks": 10, "group_size": 4}}, "engines of 4"),
        ({"decode_pool": {"ranks": 73, "group_size": 73}}, "2..72"),
        ({"decode_pool": {"ranks": 8, "max_sequences": 0}}, "max_sequences"),
        ({"decode_pool": {"ranks": 8, "max_sequences": "1M"}}, "at most 4096"),
        ({"decode_pool": {"ranks": 8, "transfer_rate": 50}}, "a number and its unit"),
        ({"decode": "pull"}, "auto, travel, direct"),
        ({"decode": "travel"}, "experts are nvfp4"),
        ({"travel_tokens": 0}, "travel_tokens"),
    ],
)
def test_wrong_scenarios_are_refused_in_one_line(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DwdpError) as caught:
        scenario(**change)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "examples" / "disaggregated.toml").read_text()
    short = tmp_path / "s.toml"
    short.write_text(
        text.replace('"600 s"', '"40 s"').replace("ranks = 48", "ranks = 8").replace("ranks = 24", "ranks = 8")
    )
    assert main(["simulate", str(short), "--disaggregated"]) == 0
    out = capsys.readouterr().out
    assert "8 GPUs in groups of 4 compute prompts, 8 decode (1 x DEP8)" in out and "DWDP against DEP" in out
    assert main(["simulate", str(short), "--disaggregated", "--json", "--seed", "5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seed"] == 5 and found["decode_pool"]["group_size"] == 8
    assert {r["way"] for r in found["results"]} == {"DWDP", "DEP"}
    assert main(["simulate", str(short), "--disaggregated", "--plot", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ten_thousand_ranks_are_not_refused() -> None:
    raw = scenarios.read_toml(str(ROOT / "examples" / "disaggregated.toml"), "scenario", "")
    raw = {**raw, "ranks": 6672, "decode_pool": {**raw["decode_pool"], "ranks": 3328}}
    assert scenarios.parse_scenario(raw, "test", True).pool is not None
    for many in ({"ranks": 667_200}, {"requests": {**raw["requests"], "rate": 100.0}}):
        with pytest.raises(DwdpError, match="events"):
            scenarios.parse_scenario({**raw, **many}, "test", True)
