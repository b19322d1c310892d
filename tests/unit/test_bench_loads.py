"""ci/bench/loads.py: turns and their ratios, systems that fail, pictures."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ci.bench import client as bench_client
from ci.bench import counted
from ci.bench import loads as bench_loads
from ci.bench import results as bench_results
from ci.bench import run as bench_run
from ci.bench import servers as bench_servers
from ci.bench.load import Load
from ci.bench.models import write_model
from ci.bench.servers import Target
from ci.report import loads_picture as bench_picture


@pytest.mark.parametrize("count", [1, 2, 3])
def test_systems_take_turns_in_changing_order(count: int) -> None:
    names = ["a", "b", "c"][:count]
    orders = [bench_results.order(names, turn) for turn in range(6 * count)]
    assert all(sorted(order) == names for order in orders)
    if count > 1:
        assert all(one != other for one, other in itertools.pairwise(orders))
    firsts = Counter(order[0] for order in orders)
    assert len(set(firsts.values())) == 1 and len(firsts) == count
    before = Counter((x, y) for order in orders for x in order for y in order[order.index(x) + 1 :])
    assert len(set(before.values())) <= 1


def test_warm_ups_end_when_two_in_a_row_agree() -> None:
    assert not bench_results.settled([100.0])
    assert not bench_results.settled([100.0, 50.0, 89.0])
    assert bench_results.settled([10.0, 100.0, 91.0])


def test_a_turn_is_as_long_as_the_time_left_allows_within_bounds() -> None:
    assert bench_results.turn_length(1000, 2, 3, 5, most_s=5, least_s=2, more_s=2) == 5
    assert bench_results.turn_length(180, 2, 3, 5, most_s=5, least_s=2, more_s=2) == 4
    assert bench_results.turn_length(60, 2, 3, 5, most_s=5, least_s=2, more_s=2) == 2


def turn(rate: float) -> dict[str, Any]:
    return {"tokens_per_s": rate, "output_per_s": rate / 2, "ttft_s": [0.1, rate / 1000], "itl_s": [], "ttft_by": {}}


def test_ratios_compare_what_two_systems_did_in_one_turn() -> None:
    # Both slow down alike: medians of each would say 20 / 20, turn by turn it is always half or more.
    turns = {"mixed": {"dpep": [turn(40), turn(20), turn(10)], "dwdp": [turn(20), turn(10), turn(20)]}}
    found = bench_results.summary(turns, "dpep")["mixed"]
    assert (found["dwdp"]["ratio"], found["dwdp"]["ratio_low"], found["dwdp"]["ratio_high"]) == (0.5, 0.5, 2.0)
    assert (found["dpep"]["tokens_per_s"], found["dpep"]["tokens_per_s_low"]) == (20, 10)
    assert found["dwdp"]["ttft_p50_s"] == 0.1 and found["dwdp"]["itl_p50_s"] is None
    text = bench_results.table({"mixed": found}, "dpep")
    assert "0.500 (0.500 to 2.000)" in text and "20 (10 to 20)" in text and text.count("\n") == 2
    assert "ratio" not in bench_results.summary(turns, None)["mixed"]["dwdp"]


def test_a_base_that_became_slower_is_told() -> None:
    now, earlier = ({"mixed": {"dpep": {"tokens_per_s": rate}}} for rate in (89.0, 100.0))
    assert len(bench_results.slower_bases(now, earlier, "dpep")) == 1
    assert bench_results.slower_bases(earlier, now, "dpep") == []
    assert bench_results.slower_bases(now, {}, "dpep") == []


def test_first_tokens_are_compared_by_place() -> None:
    def told(seconds: float) -> list[dict[str, Any]]:
        by = {"long, rank 0": [seconds] * 2, "short, other ranks": [seconds / 2]}
        return [turn(40) | {"ttft_s": [seconds] * 2 + [seconds / 2], "ttft_by": by}]

    found = bench_results.summary({"uneven": {"dpep": told(0.8), "dwdp": told(0.2)}}, "dpep")
    row = found["uneven"]["dwdp"]
    assert row["ttft_p99_ratio"] == row["ttft_by"]["long, rank 0"]["ttft_p99_ratio"] == pytest.approx(0.25)
    assert row["ttft_by"]["short, other ranks"]["ttft_p50_s"] == 0.1
    lines = bench_results.table(found, "dpep").splitlines()
    assert len(lines) == 7 and "0.25, 0.25" in lines[5] and "short, other ranks" in lines[6]


class Up:
    """A server that is up; its only address is its name, and nobody answers at its URL."""

    url = "http://127.0.0.1:1"

    def __init__(self, system: bench_servers.System, *_: Any) -> None:
        self._name = system.name
        self.stopped = 0

    def targets(self, pinned: bool) -> list[Target]:
        return [Target(self._name, {})]

    def wait(self, deadline: float) -> None:
        if self._name == "late":
            raise bench_servers.ServerFailed("late was not up in time")

    def facts(self) -> bench_servers.LogFacts:
        return bench_servers.LogFacts(245744, 2, ["Using default MoE config"], [])

    def trouble(self) -> str:
        return "what its log says"

    def leave(self) -> None: ...

    def stop(self, limit_s: float = 1) -> None:
        self.stopped += 1


def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, systems: list[str], *more: str) -> bench_run.Bench:
    """Two loads of one request at a time without warm-ups that fail, on servers that are up at once."""
    words = ["--systems", *systems, "--loads", "one=4/1/1", "two=4/1/1", "--json", str(tmp_path / "r.json"), *more]
    monkeypatch.setattr(sys, "argv", ["ci/bench/loads.py", "--cpu", *words])
    monkeypatch.setattr(bench_run, "Server", Up)
    monkeypatch.setattr(bench_run.time, "sleep", lambda _: None)
    made = bench_run.Bench(bench_loads.arguments())
    made.start(tmp_path, [], ["0", "1"], tmp_path)
    return made


def test_a_system_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    async def play(targets: list[Target], load: Load, *_: Any) -> bench_client.Window:
        name = targets[0].url
        asked.append(name)
        if name == "weak" and asked.count("weak") > 3 and load.name == "one":
            raise bench_client.LoadFailed("status 500")
        return bench_client.Window(5.0, 100.0 if name == "replicas" else 50.0, 1.0, 5, [0.1], [], {})

    monkeypatch.setattr(bench_run, "turn", play)
    made = bench(tmp_path, monkeypatch, ["replicas", "dwdp:weak", "dwdp:late"], "--turns", "4")
    write_model("tiny", 1, tmp_path)
    weak = made.servers["weak"]
    made.run(tmp_path)
    made.tell()
    found = json.loads((tmp_path / "r.json").read_text())
    assert set(found["failed"]) == {"weak", "late"} and "status 500; what its log says" in found["failed"]["weak"]
    assert weak.stopped == 1 and list(made.servers) == ["replicas"]  # type: ignore[attr-defined]
    assert {load: list(rows) for load, rows in found["turns"].items()} == {"one": ["replicas"], "two": ["replicas"]}
    assert [turn["turn"] for turn in found["turns"]["one"]["replicas"]] == [0, 1, 2, 3]
    assert found["starts"]["replicas"]["kv_tokens"] == 245744
    assert "Using default MoE config" in capsys.readouterr().out


def test_ratios_are_to_the_next_base_where_the_first_never_came_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def play(targets: list[Target], *_: Any) -> bench_client.Window:
        return bench_client.Window(5.0, {"tp": 100.0}.get(targets[0].url, 150.0), 1.0, 5, [0.1], [], {})

    def wait(self: Up, _: float) -> None:
        if self._name == "replicas":
            raise bench_servers.ServerFailed("no memory")

    monkeypatch.setattr(Up, "wait", wait)
    monkeypatch.setattr(bench_run, "turn", play)
    made = bench(tmp_path, monkeypatch, ["replicas", "tp", "dwdp"], "--turns", "2")
    assert made.found["base"] == "replicas" and set(made.failed) == {"replicas"}
    write_model("tiny", 1, tmp_path)
    made.run(tmp_path)
    made.tell()
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["base"] == "tp" and found["summary"]["one"]["dwdp"]["ratio"] == pytest.approx(1.5)
    assert "ratio to tp" in capsys.readouterr().out


def test_turns_of_dwdp_have_its_counters_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two turns of two loads; counters grow by each turn, and while the server is asked nothing is read."""
    waited, asking, reads = 0.0, False, 0

    def read(url: str) -> counted.Counts:
        nonlocal reads
        assert url == Up.url and not asking
        reads += 1
        return {name: {0: waited, 1: waited} for name in counted.SERIES}

    async def play(targets: list[Target], *_: Any) -> bench_client.Window:
        nonlocal waited, asking
        asking = True
        await asyncio.sleep(0.01)
        waited, asking = waited + (0.25 if targets[0].url == "d" else 0.0), False
        return bench_client.Window(5.0, 50.0, 1.0, 5, [0.1], [], {})

    monkeypatch.setattr(counted, "read", read)
    monkeypatch.setattr(bench_run, "turn", play)
    made = bench(tmp_path, monkeypatch, ["replicas", "dwdp:d"], "--turns", "2")
    write_model("tiny", 1, tmp_path)
    made.run(tmp_path)
    made.tell()
    found = json.loads((tmp_path / "r.json").read_text())
    for load in ("one", "two"):
        for turn in found["turns"][load]["d"]:
            assert turn["dwdp"]["by_rank"]["exposed_wait_seconds"] == [0.25, 0.25] and turn["dwdp"]["seconds"] >= 0.01
        assert found["summary"][load]["d"]["dwdp"]["turns"] == 2
        assert not any("dwdp" in turn for turn in found["turns"][load]["replicas"])
    assert reads == 6  # before each turn, and after the last of a load
    assert "two: d: exposed wait " in capsys.readouterr().out


def test_what_does_not_fit_into_the_time_left_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench(tmp_path, monkeypatch, ["replicas", "dwdp"], "--turns", "4")
    write_model("tiny", 1, tmp_path)
    now = time.monotonic()
    # A turn of both may take 14 s, and 30 s with its warm-ups.
    made.deadline = now + 48
    monkeypatch.setattr(bench_run.time, "monotonic", lambda: now)

    async def play(_: Any, load: Load, pool: Any, first: int, ramp: float, length: float, limit: float) -> Any:
        nonlocal now
        now += length
        return bench_client.Window(length, 50.0, 1.0, 5, [0.1], [], {})

    monkeypatch.setattr(bench_run, "turn", play)
    made.run(tmp_path)
    # 8 s of warm-ups and three turns of 10 s; a fourth could end too late, and so could the second load's first.
    assert {load: {n: len(rows) for n, rows in of.items()} for load, of in made.turns.items()} == {
        "one": {"replicas": 3, "dwdp": 3}
    }


FOUND = {
    "base": "dpep",
    "machine": "2 x GPU",
    "model": "qwen3",
    "systems": [{"name": n, "kind": n.rstrip("64")} for n in ("dpep", "dwdp64", "dwdp")],
    "loads": [{"name": "decode1", "input": 512, "output": 128, "concurrency": 1}],
}


def test_a_picture_is_drawn_where_there_is_a_ratio(tmp_path: Path) -> None:
    turns = {"decode1": {"dpep": [turn(40)], "dwdp64": [turn(20)], "dwdp": [turn(60)]}}
    results = tmp_path / "r.json"
    results.write_text(json.dumps({**FOUND, "turns": turns, "summary": bench_results.summary(turns, "dpep")}))
    assert bench_picture.draw(results, tmp_path / "r.png") == [tmp_path / "r.png"]
    assert (tmp_path / "r.png").stat().st_size > 1000
    never_up = {**FOUND, "systems": [*FOUND["systems"], {"name": "late", "kind": "dwdp"}]}
    figure = bench_picture.ratio_by_load({**never_up, "summary": bench_results.summary(turns, "dpep")})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dpep = 1", "dwdp64", "dwdp"]
    results.write_text(json.dumps({**FOUND, "turns": {}, "summary": {}}))
    assert not bench_picture.draw(results, tmp_path / "none.png")


def test_first_tokens_are_drawn_where_requests_have_times_of_their_own(tmp_path: Path) -> None:
    turns = {"burst": {"dpep": [turn(40)], "dwdp64": [turn(20)]}}
    loads = [{"name": "burst", "input": 512, "output": 1, "concurrency": 8, "every": 2.0, "burst": True}]
    results = tmp_path / "r.json"
    whole = {**FOUND, "loads": loads, "turns": turns, "summary": bench_results.summary(turns, "dpep")}
    results.write_text(json.dumps(whole))
    assert bench_picture.draw(results, tmp_path / "r.png") == [tmp_path / "r-ttft.png"]


def test_numbers_of_a_turn_are_one_line_of_the_results() -> None:
    found = {"turns": [{"ttft_s": [0.5, 1e-05, -2], "name": "a [1,\n2]"}, {"ttft_s": []}], "command": ["ci", "3"]}
    text = bench_results.as_text(found)
    assert json.loads(text) == found and '"ttft_s": [ 0.5, 1e-05, -2 ]' in text


def test_a_bench_waits_for_its_turn_and_keeps_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench(tmp_path, monkeypatch, ["replicas"], "--go", str(tmp_path / "go"))
    before, now = made.deadline, [100.0]
    monkeypatch.setattr(bench_run.time, "monotonic", lambda: now[0])

    def sleep(_: float) -> None:
        now[0] += 50
        if now[0] == 200:
            (tmp_path / "go").touch()

    monkeypatch.setattr(bench_run.time, "sleep", sleep)
    made.hold(tmp_path / "go")
    assert now[0] == 200 and made.deadline == pytest.approx(before + 100)
    monkeypatch.setattr(bench_run, "GO_S", 20.0)
    with pytest.raises(bench_servers.ServerFailed, match=r"--go .*never: nobody made it for 20 s; make it"):
        made.hold(tmp_path / "never")


@pytest.mark.parametrize("kept", [False, True])
def test_traces_lie_with_the_logs(kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: Any, __: Path, common: list[str], ___: list[str], logs: Path) -> None:
        told = json.loads(common[common.index("--profiler-config") + 1])["torch_profiler_dir"]
        assert told == str(logs / "traces") and (logs == tmp_path) is kept
        raise bench_servers.ServerFailed("seen")

    monkeypatch.setattr(bench_run.Bench, "start", start)
    monkeypatch.setattr(sys, "argv", ["loads", "--cpu", "--profile", *(["--logs", str(tmp_path)] if kept else [])])
    with pytest.raises(SystemExit, match="bench: seen"):
        bench_loads.main()
