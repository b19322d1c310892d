"""ci/report/calibrate.py: known efficiencies are found again, and the error of the held-out half is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ci.report import calibrate as gpu_calibrate
from ci.report import planner as gpu_planner
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.hardware_file import load_hardware
from vllm_dwdp.predict.strategies import data_parallel, dwdp
from vllm_dwdp.predict.work import Lengths, prefill

PLANNER = gpu_planner.Planner(gpu_planner.qwen3_layers(), load_hardware("h200"))
NOTHING = "nothing: as shipped"
RATES = {"cuda_pinned": 51.0, "cupy_ipc": 400.0}
JOBS = ("plain graphs", "split 64 pinned", "contiguous 96 ipc")
LENGTHS = (4096, 8192, 32768)


def synthetic(terms: gpu_planner.Terms) -> dict[str, Any]:
    """A prefill.json of times that the planner gives with `terms`."""
    blank = {job: {"prefill": {str(n): engine_cell(1.0) for n in LENGTHS}} for job in JOBS}
    for point in gpu_calibrate.points(blank, RATES, None)[0]:
        ms, waited = PLANNER.predict(point, terms)
        blank[point.job]["prefill"][str(point.tokens)] = engine_cell(ms / 1e3, exposed_s=3 * waited / 1e3)
    return blank


def engine_cell(seconds: float, **more: float) -> dict[str, Any]:
    return {"median_s": seconds, "seconds": [seconds] * 3, **more}


def best_of(told: dict[str, Any]) -> dict[str, Any]:
    """The chosen set of terms."""
    return next(one for one in told["sets"] if one["fitted"] == (", ".join(told["chosen"]) or NOTHING))


ENGINES = {
    "about": {"gpus": 1},
    "plain graphs": {"prefill": {"4096": engine_cell(0.02), "8192": engine_cell(0.03)}, "decode": {}},
    "split 64 pinned": {"prefill": {"8192": engine_cell(0.06), "4096": engine_cell(0.04, exposed_s=0.03)}},
    "an odd name": {"error": "not done after 120 s"},
}


def read(prefill_json: dict[str, Any]) -> list[gpu_planner.Point]:
    return gpu_calibrate.points(prefill_json, RATES, None)[0]


def test_halves_are_disjoint_and_whole() -> None:
    points = read(synthetic(PLANNER.shipped()))
    halves = gpu_planner.halves(points)
    assert sorted(halves[0] + halves[1]) == sorted(points) and not set(halves[0]) & set(halves[1])
    assert halves == gpu_planner.halves(points[::-1])
    assert [len(half) for half in halves] == [5, 4]
    for half in halves:
        assert {p.job for p in half} == set(JOBS) and {p.tokens for p in half} == set(LENGTHS)


def test_without_host_the_step_is_the_planners() -> None:
    hardware = load_hardware("h200")
    for point in read(synthetic(PLANNER.shipped())):
        work = prefill(Lengths(point.tokens), point.tokens)
        if point.share is None:
            step = data_parallel(PLANNER.model, hardware, work)
        else:
            efficiency = hardware.with_efficiency(link=(point.gbs or 0.0) / 450)
            step = dwdp(PLANNER.model, efficiency, work, 2, point.share, merge=point.view == "contiguous")
        ms, waited = PLANNER.predict(point, PLANNER.shipped())
        assert (ms, waited) == pytest.approx((step.seconds * 1e3, step.exposed * 1e3), rel=1e-9, abs=1e-9)


def test_pulls_run_on_during_host_time() -> None:
    waiting = [p for p in read(synthetic(PLANNER.shipped())) if p.waited > 3]
    assert waiting
    for point in waiting:
        ms, waited = PLANNER.predict(point, replace(PLANNER.shipped(), host=3.0))
        assert (ms, waited) == pytest.approx((point.ms, point.waited - 3.0))


@pytest.mark.parametrize(
    ("true", "chosen"),
    [
        (gpu_planner.Terms(0.6, 0.45, 9.0), ("matmul", "grouped", "host")),
        (gpu_planner.Terms(0.6, PLANNER.shipped().grouped, 9.0), ("matmul", "host")),
        (PLANNER.shipped(), ()),
    ],
)
def test_known_efficiencies_are_found_again(true: gpu_planner.Terms, chosen: tuple[str, ...]) -> None:
    text, told = gpu_calibrate.report(PLANNER, read(synthetic(true)))
    assert told["chosen"] == list(chosen)
    best = best_of(told)
    for name in ("matmul", "grouped", "host"):
        assert best[name] == pytest.approx(getattr(true, name), rel=0.01, abs=1e-9)
    assert max(map(abs, best["held_out_errors"])) < 1e-3
    assert len(told["points"]) == 9 and text.count("| held out |") == 5
    for point in told["points"]:
        assert point["predicted_wait_ms"] == pytest.approx(point["waited"], abs=0.05)


def test_a_wrong_link_shows_in_the_held_out_half() -> None:
    """The error told is no constant: a link of half the rate makes it large."""
    slow, _ = gpu_calibrate.points(synthetic(gpu_planner.Terms(0.6, 0.45, 9.0)), {}, 25.0)
    _, told = gpu_calibrate.report(PLANNER, slow)
    assert max(map(abs, best_of(told)["held_out_errors"])) > 0.1


def test_links_are_those_of_the_transport_and_slices() -> None:
    names = (
        "a, 64 KiB, 1 in flight",
        "a, 4096 KiB, 8 in flight",
        "a, 4096 KiB, 1 in flight",
        "b, 1024 KiB, 2 in flight",
    )
    rows = [{"part": "rate", "name": name, "value": 7.0 + i} for i, name in enumerate((*names, "wrong bytes"))]
    rows += [{"part": "overlap", "name": "256 KiB: slow-down", "value": 3.0}]
    assert gpu_calibrate.link_rates({"rows": rows}, 4096) == {"a": 9.0, "b": 10.0}
    points, left_out = gpu_calibrate.points(ENGINES, {}, None)
    assert [p.job for p in points] == ["plain graphs"] * 2 and "--link-gbs" in left_out[0]
    points, left_out = gpu_calibrate.points(ENGINES | {"dwdp": ENGINES["plain graphs"]}, {}, 42.0)
    assert {p.gbs for p in points} == {None, 42.0} and "does not tell view" in left_out[0]
    assert next(p for p in points if p.gbs and p.tokens == 4096).waited == pytest.approx(10.0)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = synthetic(gpu_planner.Terms(0.6, PLANNER.shipped().grouped, 9.0)) | {"dwdp": ENGINES["plain graphs"]}
    rows = [{"part": "rate", "name": f"{k}, 4096 KiB, 1 in flight", "value": v} for k, v in RATES.items()]
    (tmp_path / "prefill.json").write_text(json.dumps(content))
    (tmp_path / "ipc.json").write_text(json.dumps({"rows": rows}))
    out = tmp_path / "calibrated.json"
    assert gpu_calibrate.main([str(tmp_path / "prefill.json"), "--only", "p", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "**matmul, host**" in printed and "Left out: dwdp" in printed
    assert "Link (ipc.json): contiguous 96 ipc 400.0 GB/s, split 64 pinned 51.0 GB/s." in printed
    assert json.loads(out.read_text())["chosen"] == ["matmul", "host"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none", None, "no readable JSON"),
        ("prefill", [], "holds a list"),
        ("prefill", {"plain": {"decode": {}}}, "no prefill times"),
        ("prefill", {"plain": {"prefill": {"4096": engine_cell(0.1)}}}, "too few"),
        ("prefill", {"plain": {"prefill": {"4096": 3}}}, "not understood"),
    ],
)
def test_bad_measurements_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any, says: str
) -> None:
    if content is not None:
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert gpu_calibrate.main([str(tmp_path / f"{name}.json")]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_times_on_the_device_leave_out_what_the_client_saw() -> None:
    cell = engine_cell(0.5) | {"steps_device_s": [0.01, 0.02, 0.04]}
    for device, expected in ((False, 500.0), (True, 20.0)):
        [point] = gpu_calibrate.points({"plain": {"prefill": {"4096": cell}}}, RATES, None, device)[0]
        assert point.ms == expected


def test_too_few_points_are_an_error() -> None:
    with pytest.raises(DwdpError, match="too few to halve"):
        gpu_calibrate.report(PLANNER, read(synthetic(PLANNER.shipped()))[:5])
