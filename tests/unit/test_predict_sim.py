"""The simulator: queueing theory, the same arrivals for every way, faults, fluid copies against slices and the planner."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.cli import main
from vllm_dwdp.predict.contention import exposed
from vllm_dwdp.predict.hardware_file import load_hardware
from vllm_dwdp.predict.read_config import load_model
from vllm_dwdp.predict.roofline import local_time
from vllm_dwdp.predict.sim.costs import Chunk, StepCost
from vllm_dwdp.predict.sim.flows import simulate_layers
from vllm_dwdp.predict.sim.groups import HEALTHY, Fault, Limits, run_alone
from vllm_dwdp.predict.sim.report import results_text
from vllm_dwdp.predict.sim.requests import Stream
from vllm_dwdp.predict.sim.run import Result, run_scenario, streams_of
from vllm_dwdp.predict.sim.scenario import Scenario, parse_scenario
from vllm_dwdp.predict.sim.slices import simulate_slices
from vllm_dwdp.predict.work import Lengths, decoding, prefill

BASE: dict[str, Any] = {
    "model": "DeepSeek-R1-FP4",
    "hardware": "gb200",
    "ranks": 8,
    "group_size": 4,
    "seconds": "120 s",
    "tokens_per_step": "32K",
    "ways": ["DWDP", "DEP", "TP", "DP"],
    "kv_cache_dtype": "fp8",
    "requests": {"rate": 2.0, "isl": "8K", "length_ratio": 0.8, "osl": 1},
}
ROOT = Path(__file__).resolve().parents[2]


def scenario(**changed: Any) -> Scenario:
    return parse_scenario({**BASE, **changed}, "test")


def results(s: Scenario) -> dict[str, Result]:
    return {r.way: r for r in run_scenario(s)}


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_waiting_is_that_of_an_m_d_1_queue(load: float) -> None:
    """Poisson arrivals, one prompt per step, steps of 1 s: the mean wait is load / (2 (1 - load)) s."""
    stream = Stream(load, Lengths(100)).draw(400_000, np.random.default_rng(3))
    limits = Limits(seconds=1e9, tokens_per_step=100, max_sequences=1)
    engine = run_alone(stream, lambda chunk: (1.0, 0.0), (None,), limits, HEALTHY)
    wait = np.mean(engine.log.ttft) - 1
    assert wait == pytest.approx(load / (2 * (1 - load)), rel=0.02)
    assert engine.log.busy == len(stream)


def test_waiting_without_queue_is_the_step() -> None:
    stream = Stream(0.001, Lengths(100), osl=5).draw(20_000, np.random.default_rng(5))
    engine = run_alone(stream, lambda chunk: (0.5, 0.1), (None,), Limits(1e9, 100, 8), HEALTHY)
    log = engine.log
    assert log.ttft == pytest.approx([0.5] * len(stream))
    assert all(gap == pytest.approx(0.5) for gap, _ in log.tokens)
    assert log.output_tokens == 5 * len(stream)
    assert log.finished == len(stream)
    assert log.exposed == pytest.approx(0.1 * log.steps)


def test_bursts_keep_the_rate_and_wait_longer() -> None:
    rng = np.random.default_rng(1)
    poisson, bursty = (Stream(0.5, Lengths(100), burst=b).draw(100_000, rng) for b in (1, 8))
    assert len(bursty) == pytest.approx(len(poisson), rel=0.05)
    limits = Limits(1e9, 100, 1)
    waits = [np.mean(run_alone(s, lambda c: (1.0, 0.0), (None,), limits, HEALTHY).log.ttft) for s in (poisson, bursty)]
    assert waits[1] > 3 * waits[0]


def test_prefix_cache_hits_are_not_computed() -> None:
    stream = Stream(1.0, Lengths(1000), hit_rate=1.0, hit_share=0.75).draw(1000, np.random.default_rng(0))
    assert {(r.new, r.cached) for r in stream} == {(250, 750)}


@pytest.mark.parametrize("model", ["DeepSeek-R1-FP4", "gpt-oss-120b", "Qwen3-235B-A22B-FP8"])
@pytest.mark.parametrize("resident", [None, 32.0])
def test_step_costs_are_the_planners(model: str, resident: float | None) -> None:
    m, h = load_model(model), load_hardware("b200")
    cost = StepCost(m, h, resident=resident)
    work = prefill(Lengths(4096), 16384)
    groups = {g.attention.window: g.attention for g in m.groups}
    pairs = tuple(float(groups[w].pairs(work.new, work.context).sum()) for w in cost.windows)
    planned = float(local_time(m, h, work, resident=resident).total.mean())
    assert cost.seconds(Chunk(16384, pairs, 4, 0.0)) == pytest.approx(planned, rel=0.01)
    planned = float(local_time(m, h, decoding(64, 2048), resident=resident).total.mean())
    assert cost.seconds(Chunk(64, tuple(0.0 for _ in pairs), 64, 64 * 2048.0)) == pytest.approx(planned, rel=0.02)


def test_same_seed_same_result_and_same_arrivals_for_all_ways() -> None:
    s = scenario()
    first, second = run_scenario(s), run_scenario(s)
    assert repr(first) == repr(second)
    assert repr(first) != repr(run_scenario(replace(s, seed=1)))
    assert streams_of(s, 1) == streams_of(replace(s, ways=("DP",)), 1)


def test_light_load_is_served_by_all_and_heavy_load_best_without_waiting() -> None:
    light = results(scenario(requests={**BASE["requests"], "rate": 0.3}))
    assert all(r.finished >= 0.97 * r.requests for r in light.values())
    heavy = results(scenario(requests={**BASE["requests"], "rate": 6.0}))
    assert heavy["DP"].prompt_per_gpu > heavy["DWDP"].prompt_per_gpu > heavy["DEP"].prompt_per_gpu
    assert heavy["DEP"].prompt_per_gpu > heavy["TP"].prompt_per_gpu
    assert heavy["DEP"].waiting > 0.05
    assert heavy["DWDP"].waiting == 0
    # The planner says +18 % for steps that are full; chunks are.
    assert heavy["DWDP"].prompt_per_gpu / heavy["DEP"].prompt_per_gpu == pytest.approx(1.16, abs=0.05)


@pytest.mark.parametrize("fault", [Fault(slow=2.0), Fault(stall_at=20, stall_for=60)])
def test_a_slow_or_stalled_rank_harms_only_itself_under_dwdp(fault: Fault) -> None:
    calm = scenario(ranks=4, requests={**BASE["requests"], "rate": 1.5})
    hit = replace(calm, faults={1: fault})
    before, after = results(calm), results(hit)
    # A quarter of the ranks is affected: the median request is not.
    assert after["DWDP"].ttft[0] < 1.6 * before["DWDP"].ttft[0]
    assert after["DEP"].ttft[0] > 2 * before["DEP"].ttft[0]
    assert after["DWDP"].finished > after["DEP"].finished


@pytest.mark.parametrize("end", ["20 s", "20.001 s"])
def test_who_dies_behind_the_end_of_a_run_has_not(end: str) -> None:
    busy = {"ranks": 4, "seconds": "20 s", "requests": {"rate": 2.0, "isl": "8K", "osl": 16}}
    late = [{"rank": rank, "dead_at": end} for rank in range(4)]
    well = results(scenario(**busy))
    assert results(scenario(**busy, faults=late)) == results(scenario(**busy, faults=late[:1])) == well
    assert well["DWDP"].finished < well["DWDP"].requests, "some are under way at the end"
    early = {"rank": 0, "dead_at": "7 s"}
    assert results(scenario(**busy, faults=[early, *late[1:]])) == results(scenario(**busy, faults=[early]))


@pytest.mark.parametrize(
    "faults", [[], [{"rank": 1, "dead_at": "7 s"}], [{"rank": r, "dead_at": "7 s"} for r in range(4)]]
)
def test_what_came_is_the_same_for_every_way(faults: list[dict[str, Any]]) -> None:
    s = scenario(ranks=8, seconds="20 s", faults=faults, requests={"rate": 4.0, "isl": "8K", "osl": 16})
    came = sum(len(stream) for group in range(2) for stream in streams_of(s, group))
    for r in results(s).values():
        assert r.requests == came > r.finished + r.lost, (
            f"{r.way}: some are under way at the end, none is counted twice"
        )


def test_a_dead_rank_ends_dep_and_not_dwdp() -> None:
    calm = scenario(ranks=4, requests={**BASE["requests"], "rate": 1.0})
    hit = results(replace(calm, faults={2: Fault(dead_at=60.0)}))
    assert hit["DWDP"].lost == 0
    assert hit["DEP"].lost > 0.4 * results(calm)["DEP"].requests
    assert hit["DWDP"].finished > 0.9 * results(calm)["DWDP"].finished
    everyone = results(replace(calm, faults={r: Fault(dead_at=60.0) for r in range(4)}))
    assert everyone["DWDP"].lost > 0


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("window", [0.6, 1.1, 1.5, 2.5])
@pytest.mark.parametrize("sliced", [True, False])
def test_fluid_copies_agree_with_the_binomial_model(ranks: int, window: float, sliced: bool) -> None:
    """Within a tenth of a pull, though the binomial model knows nothing of time: duty is solved as the planner does."""
    rng = np.random.default_rng(0)
    windows = window * (1 + 0.05 * rng.standard_normal((ranks, 200)))
    run = simulate_layers(windows, 1.0, 1.0, sliced=sliced, starts=list(rng.uniform(0, window, ranks)))
    duty, waits = 1.0, 0.0
    for _ in range(30):
        pull, waits = exposed(1.0, window, ranks, duty, sliced)
        duty = (duty + min(1.0, pull / (window + waits))) / 2
    assert np.mean(run.exposed) / 200 == pytest.approx(waits, abs=0.1)
    if sliced:
        assert run.pull == pytest.approx(1.0)


def test_going_through_peers_in_the_same_order_is_the_worst() -> None:
    windows = np.full((8, 50), 1.2)
    pulls = {
        o: simulate_layers(windows, 1.0, 1.0, sliced=False, order=o).pull for o in ("rotated", "random", "ascending")
    }
    assert pulls["rotated"] == pytest.approx(1.0)
    assert pulls["rotated"] < pulls["random"] < pulls["ascending"]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_slices_agree_with_the_fluid_picture_on_one_layer(ranks: int) -> None:
    assert simulate_slices(ranks, 1.0, 1 / 256, 1.0) == pytest.approx([1.0] * ranks), "all begin together"
    rng = np.random.default_rng(4)
    phases = [simulate_slices(ranks, 1.0, 1 / 256, 1.0, starts=list(rng.uniform(0, 1, ranks))) for _ in range(20)]
    # One slice in flight and ranks out of step: convoys form, which the fluid picture (1) does not know.
    assert 1.0 <= np.mean(phases) < 1.25
    if ranks > 2:
        upwards = simulate_slices(ranks, 1.0, 1 / 4, 1.0, rotated=False)
        assert max(upwards) > 1.2, "all begin with rank 0"
    # Whole tensors in rotated order from a common start: as the fluid run without slices.
    whole = simulate_slices(ranks, 1.0, 1.0, 1.0)
    fluid = simulate_layers(np.full((ranks, 2), 2.0), 1.0, 1.0, sliced=False, order="rotated")
    assert np.mean(whole) == pytest.approx(fluid.pull)


def test_a_timeline_has_no_overlapping_compute() -> None:
    run = simulate_layers(np.full((3, 5), 1.0), 1.2, 1.0, sliced=True, keep=True)
    for rank in range(3):
        spans = sorted((s for s in run.spans if s.rank == rank and s.what != "pull"), key=lambda s: s.start)
        for a, b in pairwise(spans):
            assert b.start == pytest.approx(a.end)
        assert sum(s.end - s.start for s in spans if s.what == "wait") == pytest.approx(run.exposed[rank])
    assert run.exposed == pytest.approx([4 * 0.2] * 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 8}, "did you mean ranks"),
        ({"ranks": 10}, "groups of 4"),
        ({"seconds": 600}, "a number and its unit"),
        ({"seconds": "-5 s"}, "above 0"),
        ({"ways": ["DDP"]}, "DWDP, DEP, TP, DP"),
        ({"requests": {"isl": 100}}, "requests.rate"),
        ({"requests": {"rate": -1, "isl": 100}}, "requests.rate is -1"),
        ({"faults": [{"rank": 9}]}, "ranks 0..7"),
        ({"faults": [{"rank": 1, "stall_at": "5 s"}]}, "stall_for"),
        ({"faults": [{"rank": 1, "slow": 0.5}]}, "at least 1"),
        ({"faults": [{"rank": 1, "slow": 2}, {"rank": 1, "dead_at": "9 s"}]}, "names rank 1 twice"),
        ({"weight_view": "both"}, "split or contiguous"),
    ],
)
def test_wrong_scenarios_are_refused_in_one_line(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DwdpError) as caught:
        scenario(**change)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "examples" / "scenario.toml").read_text()
    short = tmp_path / "s.toml"
    short.write_text(text.replace('"600 s"', '"20 s"').replace("ranks = 72", "ranks = 8"))
    assert main(["simulate", str(short)]) == 0
    assert "DWDP against DEP" in capsys.readouterr().out
    assert main(["simulate", str(short), "--json", "--seed", "5"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["seed"] == 5
    assert {r["way"] for r in out["results"]} == {"DWDP", "DEP", "TP"}
    assert not any(isinstance(v, float) and math.isnan(v) for r in out["results"] for v in r.values())
    assert main(["simulate", str(tmp_path / "none.toml")]) == 2


def test_dwdp_is_divided_by_every_other_way() -> None:
    times = (2.0, 3.0, 4.0)
    dwdp = Result("DWDP", 9, 9, 0, 300.0, 30.0, (1.0, 2.0, 3.0), times, 0.0, 0.0, 0.1, 5)
    others = [
        replace(dwdp, way="DEP", prompt_per_gpu=200.0, ttft=times),
        replace(dwdp, way="TP", prompt_per_gpu=0.0),
    ]
    lines = [line for line in results_text(scenario(), [dwdp, *others]).splitlines() if "against" in line]
    assert lines == ["  DWDP against DEP: 1.50x prompt tokens/s/GPU, 0.50x median TTFT"], "TP computed nothing"
