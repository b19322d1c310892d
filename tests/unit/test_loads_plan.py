"""ci/report/loads_plan.py: what results of loads.py say, known terms are found again, the held-out half is told honestly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ci.report import loads_model, loads_plan, loads_points
from ci.report.loads_points import Run
from ci.root import ROOT
from vllm_dwdp.predict.closed_loop import Loop, closed_loop
from vllm_dwdp.predict.hardware_file import load_hardware
from vllm_dwdp.predict.strategies import dwdp
from vllm_dwdp.predict.work import Lengths, prefill

LOG = (
    "dwdp: 4 independent ranks in groups of {group}, workers in their engines",
    "dwdp rank 1: {held} of 128 experts in 12 MoE layers (7247.8 MB), worker in its engine, view {view}, 2 slots "
    "(1208.0 MB), a forward pulls 7247.8 MB, one of at most {few}",
)
TRAVELS = "1024 tokens (as travel_tokens asks) reads missing experts where they are, or has their owners compute"
READS = "40 tokens (as measured) reads missing experts where they are"
SYSTEMS = {
    "dpep": {"kind": "dpep"}, "tp": {"kind": "tp"}, "four": {"kind": "dwdp"}, "two": {"kind": "dwdp"},
}  # fmt: skip
LOADS = {
    "prefill8k": {"input": 8192, "output": 1, "concurrency": 32},
    "apart8k": {"input": 8192, "output": 1, "concurrency": 32, "spread": 0.8},
    "prefill2k": {"input": 2048, "output": 1, "concurrency": 64},
    "mixed": {"input": 8192, "output": 128, "concurrency": 16},
    "decode8": {"input": 512, "output": 128, "concurrency": 8},
}


@pytest.fixture(autouse=True)
def few_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ten take a minute."""
    sets = ((), ("host",), ("host", "launch"), ("grouped", "host", "launch"))
    assert set(sets) <= set(loads_model.SETS)
    monkeypatch.setattr(loads_model, "SETS", sets)
    monkeypatch.setattr(loads_plan, "SETS", sets)


def start(group: int, held: int, few: str, view: str = "split") -> dict[str, Any]:
    lines = [line.format(group=group, held=held, few=few, view=view) for line in LOG]
    return {"kv_tokens": 400000, "engines": 4, "dwdp": lines}


def results(**more: Any) -> dict[str, Any]:
    """As loads.py writes them: four H200s, every system and load, each with 1,000 tokens/s."""
    row = {"tokens_per_s": 1000.0, "tokens_per_s_low": 990.0, "tokens_per_s_high": 1010.0}
    found = {
        "machine": "4 x NVIDIA H200", "model": "qwen3, 12 layers", "command": ["python", "-m", "ci.bench.loads"],
        "systems": [{"name": name, "dwdp": {}, **system} for name, system in SYSTEMS.items()],
        "loads": [{"name": name, "every": 0.0, "uneven": False, **load} for name, load in LOADS.items()],
        "starts": {
            "dpep": {"kv_tokens": 400000, "engines": 4}, "tp": {"kv_tokens": 100000, "engines": 1},
            "four": start(4, 32, READS), "two": start(2, 64, TRAVELS),
        },
        "summary": {load: {name: dict(row) for name in SYSTEMS} for load in LOADS},
    }  # fmt: skip
    return found | more


def read(tmp_path: Path, found: dict[str, Any]) -> tuple[list[Run], list[str]]:
    path = tmp_path / "box" / "loads.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found))
    return loads_points.runs(path)


def one(runs: list[Run], load: str, system: str) -> Run:
    (found,) = [run for run in runs if (run.load, run.system) == (load, system)]
    return found


def test_a_launch_tells_groups_experts_and_what_travels(tmp_path: Path) -> None:
    runs, left_out = read(tmp_path, results(command=["python", "--batched-tokens", "8192"]))
    assert len(runs) == len(SYSTEMS) * len(LOADS) and not left_out
    four, two = one(runs, "mixed", "four"), one(runs, "mixed", "two")
    assert (four.ranks, four.held, four.travel) == (4, 32, 0) and (two.ranks, two.held, two.travel) == (2, 64, 1024)
    assert {run.batched for run in runs} == {8192} and four.file == "box/loads" and four.gpu == "h200"
    assert one(runs, "mixed", "tp").at_a_time == pytest.approx(100000 / 8320), "as many as its KV cache holds"
    assert one(runs, "prefill8k", "tp").at_a_time == 32 and four.at_a_time == 4
    assert (one(runs, "apart8k", "two").spread, two.spread) == (0.8, 0.2)


def test_files_of_before_engines_were_counted(tmp_path: Path) -> None:
    """Every engine of DP+EP told its KV tokens, of DWDP one for all of its launch."""
    found = results()
    for each in found["starts"].values():
        del each["engines"]
    runs, _ = read(tmp_path, found)
    assert one(runs, "mixed", "dpep").cache == 100000 and one(runs, "mixed", "four").cache == 400000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"machine": "CPU, x86_64"}, "has no hardware file"),
        ({"model": "/some/folder"}, "it is not one of qwen3"),
        ({"decode": {"kind": "tp"}}, "prefill apart from decode"),
        ({"loads": [{"name": "mixed", **LOADS["mixed"], "every": 2.0}]}, "at fixed times"),
        ({"loads": [{"name": "mixed", **LOADS["mixed"], "uneven": True}]}, "different loads"),
        ({"systems": [{"name": "four", "kind": "dptp", "dwdp": {}}]}, "has no dptp"),
        ({"starts": {}, "systems": [{"name": "four", "kind": "dwdp", "dwdp": {}}]}, "does not tell groups"),
        (
            {"starts": {"four": start(4, 32, READS, "contiguous")}, "systems": [{"name": "four", "kind": "dwdp"}]},
            "contiguous",
        ),
    ],
)
def test_what_the_planner_cannot_predict_is_listed(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    runs, left_out = read(tmp_path, results(**change))
    assert not runs and left_out and all(says in line for line in left_out)
    assert left_out[0].startswith("box/loads, ")


def test_rates_are_those_of_the_planner(tmp_path: Path) -> None:
    """Groups of two on four GPUs are two groups that do not touch; steps of prompts are as large as the server's."""
    runs, _ = read(tmp_path, results())
    h200, model, plain = load_hardware("h200"), loads_points.model_of("qwen3, 12 layers"), loads_model.shipped("h200")
    assert model.layers == 12
    mixed = closed_loop(model, h200, 2, Loop(8, 8192, 128), share=64).tokens_per_s
    assert loads_model.predict(one(runs, "mixed", "two"), plain).rate == pytest.approx(2 * mixed)
    step = dwdp(model, h200, prefill(Lengths(9830, 6554 / 9830), 16384), 4, 32)
    predicted = loads_model.predict(one(runs, "prefill8k", "four"), plain)
    assert predicted.rate == pytest.approx(4 * step.tokens_per_gpu * (1 + 1 / 8192), rel=0.01)
    assert predicted.waited == step.waiting == 0
    small = one(runs, "prefill8k", "four")._replace(batched=2048)
    step = dwdp(model, h200, prefill(Lengths(9830, 6554 / 9830), 2048), 4, 32)
    assert loads_model.predict(small, plain).waited == pytest.approx(step.waiting, rel=0.02) and step.waiting > 0.2
    one_by_one = one(runs, "prefill8k", "four")._replace(concurrency=4)
    assert loads_model.predict(one_by_one, plain).rate < predicted.rate, "steps of one prompt, not of two"
    few = one(runs, "prefill8k", "four")._replace(concurrency=2)
    assert loads_model.predict(few, plain).rate == pytest.approx(loads_model.predict(one_by_one, plain).rate / 2)


def test_what_each_term_makes_slower(tmp_path: Path) -> None:
    runs, _ = read(tmp_path, results())
    plain = loads_model.shipped("h200")

    def slower(load: str, system: str, **terms: float) -> float:
        run = one(runs, load, system)
        rate = loads_model.predict(run, plain).rate
        return rate / loads_model.predict(run, replace(plain, **terms)).rate - 1

    # A step of prompts that takes longer than its launches is as long as it was.
    assert slower("prefill8k", "two", launch=1.0) == 0 and slower("decode8", "dpep", launch=1.0) > 0.05
    assert slower("decode8", "two", host=1.0) > 10 * slower("prefill8k", "two", host=1.0) > 0
    assert slower("decode8", "dpep", latency=0.1) > 0.1 and slower("decode8", "two", latency=0.1) < 0.01
    assert slower("prefill8k", "tp", grouped=0.2) > 0.2


def made(tmp_path: Path, terms: loads_model.Terms) -> dict[str, Any]:
    """Results of a machine that does what the planner says with `terms`."""
    found = results()
    for run in read(tmp_path, found)[0]:
        rate = loads_model.predict(run, terms).rate
        row = {"tokens_per_s": rate, "tokens_per_s_low": rate, "tokens_per_s_high": rate}
        found["summary"][run.load][run.system] = row
    return found


def test_terms_that_a_machine_has_are_found_and_no_others(tmp_path: Path) -> None:
    truth = replace(loads_model.shipped("h200"), host=1.3, launch=1.1)
    runs, _ = read(tmp_path, made(tmp_path, truth))
    to_fit, held = loads_model.halves(runs)
    assert sorted(to_fit + held) == sorted(runs) and abs(len(to_fit) - len(held)) <= 1
    for part in (to_fit, held):
        assert {run.load for run in part} == set(LOADS) and {run.system for run in part} == set(SYSTEMS)
    assert loads_model.choose(to_fit) == ("host", "launch")
    found = loads_model.fit(to_fit, ("host", "launch"))
    assert (found.host, found.launch) == pytest.approx((1.3, 1.1), rel=0.02)
    assert loads_model.rms(held, found) < 0.01 < 0.1 < loads_model.rms(held, loads_model.shipped("h200"))


def test_misses_of_the_held_out_half_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = made(tmp_path, replace(loads_model.shipped("h200"), host=1.3))
    held = loads_model.halves(read(tmp_path, found)[0])[1]
    wrong = found["summary"][held[0].load][held[0].system]
    wrong["tokens_per_s"] *= 1.5
    four = next(run for run in held if run.system == "four")
    found["summary"][four.load]["four"]["dwdp"] = {"exposed_wait_share": 0.0123}
    path = tmp_path / "box" / "loads.json"
    path.write_text(json.dumps(found))
    told = tmp_path / "told.json"
    assert loads_plan.main([str(path), "--json", str(told)]) == 0
    text = capsys.readouterr().out
    assert f"{len(held) - 1} of {len(held)} within 10 %" in text and text.count("**no**") == text.count("Missed: ") == 1
    assert f"Missed: box/loads, {held[0].load}, {held[0].system}: " in text and "(-33%)" in text
    assert "| 1.23 % |" in text and text.count("\n| box/loads |") == len(held)
    h200 = json.loads(told.read_text())["h200"]
    assert h200["chosen"] == ["host"] and h200["terms"]["host"]["host"] == pytest.approx(1.3, rel=1e-3), (
        "fitted to the others"
    )
    rows = h200["points"]
    assert len(rows) == len(SYSTEMS) * len(LOADS) and sum(row["held_out"] for row in rows) == len(held)
    assert loads_plan.main([str(path), "--all"]) == 0
    assert capsys.readouterr().out.count("\n| box/loads |") == len(rows)


def test_input_that_says_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    for found, says in (
        ({"machine": "x"}, "has no 'model'"),
        (results(machine="no GPU"), "no load of 1 files can be predicted"),
        (results(loads=[{"name": "mixed", **LOADS["mixed"]}]), "4 points are too few to halve"),
        (results(loads=5), "is not understood"),
    ):
        path.write_text(json.dumps(found))
        assert loads_plan.main([str(path)]) == 2
        errors = capsys.readouterr().err
        assert says in errors and errors.count("\n") == 1


def test_files_that_are_stored_can_be_read() -> None:
    """A point of each kind of system, and of one GPU more than another."""
    found = [run for path in loads_plan.STORED for run in loads_points.runs(path)[0]]
    assert {run.kind for run in found} == {"dwdp", "dpep", "tp"} and {run.gpu for run in found} == {"h100", "h200"}
    assert {run.devices for run in found} == {2, 4} and len(found) >= 78
    assert all(path.is_relative_to(ROOT) for path in loads_plan.STORED)
