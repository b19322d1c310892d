"""ci/bench/returns.py without engines: a rank is killed and returns, and whatever goes wrong then is told."""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("vllm")
from ci.bench import returns, returns_apart, returns_plain
from ci.bench.load import Load
from ci.bench.returns_apart import AFTER, BEFORE, DEAD, STARTS, Mark, figures, judge
from ci.bench.returns_plain import fate
from ci.bench.returns_servers import more_in_use, words_of_all
from ci.bench.steady import Asked
from ci.report.returns_picture import by_second, title_of
from ci.root import ROOT
from tests.unit.returns_told import serve

pytest_plugins = ("tests.unit.returns_told",)


def test_a_rank_dies_and_returns(returns_told: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = returns_told("", "--plain", "--logs", str(tmp_path / "logs"))
    assert (code, found["wrong"]) == (0, [])
    apart, plain = found["apart"], found["plain"]
    parts = apart["parts"]
    assert list(parts) == ["before", "rank 1 is dead", "rank 1 starts", "after"]
    for name, (rank_0, rank_1) in parts.items():
        assert rank_0["failed"] == 0 and rank_0["answers"] > 0 and 0 < rank_0["gap_s"] < 1, name
        if name in ("before", "after"):
            assert rank_1["failed"] == 0 and min(rank_0["answers"], rank_1["answers"]) > 10, name
    assert parts["rank 1 is dead"][1]["failed"] > 2 and parts["rank 1 is dead"][1]["answers"] < 5
    assert len(set(apart["digests"])) == 1 and len(apart["digests"]) == 4
    assert (
        apart["way"].endswith("rank 1: experts adopted, in 0.1 s of loading") and 0 <= apart["noticed_s"]["rank 0"] < 2
    )
    assert list(plain["others"]) == ["rank 0"] and list(apart["noticed_s"]) == ["rank 0"]
    other = plain["others"]["rank 0"]
    assert 0 <= other["under_way_failed"] <= other["under_way"] <= 2
    assert other["later_failed"] > 2 and plain["exit"] == 1
    assert plain["ended_after_s"] < 5 and plain["before"][1]["failed"] == 0 < plain["after"][0]["failed"]
    assert {log.name for log in (tmp_path / "logs").iterdir()} == {
        "rank-0.log", "rank-1.log", "rank-1-again.log", "plain.log",
    }  # fmt: skip
    assert not list(tmp_path.glob("returns-*")), "the checkpoint goes"
    printed = capsys.readouterr().out
    assert "around the kill" in printed and "plain vLLM, DP 2 with EP" in printed and "(exit 1)" in printed


def test_one_of_four_dies_and_returns(returns_told: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = returns_told("", "--ranks", "4", "--plain", "--logs", str(tmp_path / "logs"))
    assert (code, found["wrong"], found["ranks"]) == (0, [], 4)
    apart, plain = found["apart"], found["plain"]
    for name, of_part in apart["parts"].items():
        assert len(of_part) == 4
        for rank in (0, 2, 3):
            assert of_part[rank]["failed"] == 0 and of_part[rank]["answers"] > 0, (name, rank)
    dead = apart["parts"]["rank 1 is dead"][1]
    assert dead["failed"] > 2 and dead["answers"] < 5
    assert len(set(apart["digests"])) == 1 and len(apart["digests"]) == 8
    assert set(apart["noticed_s"]) == set(plain["others"]) == {"rank 0", "rank 2", "rank 3"}
    assert all(0 <= seconds < 2 for seconds in apart["noticed_s"].values())
    assert all(fate["later_failed"] > 2 for fate in plain["others"].values()) and len(plain["before"]) == 4
    logs = {log.name for log in (tmp_path / "logs").iterdir()}
    assert logs == {*(f"rank-{rank}.log" for rank in range(4)), "rank-1-again.log", "plain.log"}
    words = json.loads((tmp_path / "servers" / "plain.json").read_text())
    assert words[words.index("--data-parallel-size") + 1] == "4" and "--enable-expert-parallel" in words
    printed = capsys.readouterr().out
    assert all(f"rank {rank}: no answer for" in printed and f"then, at rank {rank}" in printed for rank in (0, 2, 3))
    assert "rank 1: no answer for" not in printed and "plain vLLM, DP 4 with EP" in printed
    figure = by_second(apart, title_of(found))
    assert [line.get_label() for line in figure.axes[0].lines[:4]] == [f"rank {rank}" for rank in range(4)]
    assert len({line.get_color() for line in figure.axes[0].lines[:4]}) == 4


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("other-bytes@rank-2", "experts changed, or differ between ranks: 0a 0a 0b 0a 0a 0b"),
        ("falls-over@rank-2", "requests failed at rank 2, the first: OSError: status 500: engine is dead"),
        ("stalls@rank-2", "rank 2 gave no answer for 1."),
        ("blind@rank-2", "rank 2 did not see within 2 s that rank 1 is gone"),
        ("lonely@rank-2", "rank 2 sees 1 peers at the end, and there are 2"),
        ("lonely@rank-1-again", "rank 1 sees 1 peers at the end, and there are 2"),
    ],
)
def test_what_is_wrong_at_another_rank_is_told(returns_told: Any, fault: str, why: str) -> None:
    code, found = returns_told(fault, "--ranks", "3")
    assert code == 1 and any(why in line for line in found["wrong"]), found["wrong"]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("other-bytes@rank-1-again", "experts changed, or differ between ranks: 0a 0a 0a 0b"),
        ("read", "rank 1 did not adopt its experts: dwdp rank 1: experts read from the checkpoint"),
        ("falls-over", "requests failed at rank 0, the first: OSError: status 500: engine is dead"),
        ("stalls", "rank 0 gave no answer for 1."),
        ("blind", "rank 0 did not see within 2 s that rank 1 is gone"),
        ("twice", "3 MiB of GPU 1 are in use more than before the kill: its experts are there twice"),
        ("down", "NotUp: rank-0 ended with 3: ValueError: on purpose"),
    ],
)
def test_what_is_wrong_is_told(returns_told: Any, fault: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "twice":
        # A share of the model has 1.5 MiB.
        looks = iter([[9.0, 5.0], [9.0, 5.0], [9.0, 8.0]])
        monkeypatch.setattr(returns_apart, "device_mib", lambda: next(looks))
    code, found = returns_told(fault)
    assert code == 1 and any(why in line for line in found["wrong"]), found["wrong"]


def test_a_signal_ends_it_and_all_servers(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.unit.test_bench_returns", "--model", "tiny", "--load", "small=96/1/2"]
    words += ["--part-s", "60", "--settle-s", "0", "--scratch", str(tmp_path), "--json", str(tmp_path / "found.json")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, env=environ, cwd=ROOT, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        for line in program.stdout:
            if "load is steady" in line:
                break
        started = psutil.Process(program.pid).children()
        servers = [each for each in started if each.status() != psutil.STATUS_ZOMBIE and "-m" in each.cmdline()]
        program.terminate()
        said, _ = program.communicate(timeout=60)
    assert len(servers) == 2 and not any(server.is_running() for server in servers)
    assert program.returncode == 143 and "2 servers stopped" in said
    assert json.loads((tmp_path / "found.json").read_text())["wrong"] == ["it was cut off"]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_without_plain_vllm_the_rest_is_measured(returns_told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = returns_plain.Plain.__init__

    def broken(self: returns_plain.Plain, *words: Any) -> None:
        monkeypatch.setattr(returns_plain, "serve", functools.partial(serve, fault="down"))
        real(self, *words)

    monkeypatch.setattr(returns_plain.Plain, "__init__", broken)
    code, found = returns_told("", "--plain")
    assert code == 1 and "plain ended with 3" in found["wrong"][0] and len(found["wrong"]) == 1
    assert found["apart"]["parts"]["after"][1]["answers"] > 10 and "plain" not in found


def test_what_became_of_the_other_ranks_requests() -> None:
    kill = 10.0
    asked = [
        Asked(8.0, 9.0, 5), Asked(9.0, 10.5, 5), Asked(9.5, 11.0, 0, "reset"), Asked(10.5, 12.0, 5),
        Asked(11.2, 11.25, 0, "refused"),
    ]  # fmt: skip
    assert fate(asked, kill) == {
        "under_way": 2, "under_way_failed": 1, "later": 2, "later_failed": 1, "last_answer_s": 2.0, "first_failure_s": 1.0,
    }  # fmt: skip
    assert fate(asked[:1], kill)["last_answer_s"] is None


def test_memory_that_stays_in_use_is_told() -> None:
    assert more_in_use([100.0, 4.0], [100.0, 69.0]) == ["65 MiB of GPU 1"]
    assert more_in_use([100.0, 4.0], [100.0, 60.0]) == more_in_use([], [3.0]) == []


def test_words_of_servers() -> None:
    args = argparse.Namespace(
        load=Load("a", 100, 1, 2), batched_tokens=512, kv_gib=0.5, cpu=False, eager=True, more=["--x"]
    )
    words = words_of_all(args)
    assert words[:2] == ["--max-model-len", "129"] and words[-2:] == ["--enforce-eager", "--x"]
    assert words[words.index("--kv-cache-memory-bytes") + 1] == str(1 << 29)


def test_what_is_wrong_with_requests() -> None:
    """At rank 1 they may fail from the kill on, until it is back; at rank 0 never."""
    marks = [Mark(0.0, BEFORE), Mark(10.0, DEAD), Mark(20.0, STARTS), Mark(30.0, ""), Mark(32.0, AFTER), Mark(40.0, "")]
    good = [Asked(at, at + 0.4, 10) for at in range(40)]

    def wrong(rank: int, *more: Asked) -> list[str]:
        asked = [good, [each for each in good if not 10 <= each.ended <= 30]]
        asked[rank] = sorted([*asked[rank], *more], key=lambda each: each.ended)
        return judge(asked, marks, figures(asked, marks)["parts"])

    assert wrong(0) == wrong(1, Asked(9.0, 10.1, 0, "reset"), Asked(29.9, 30.1, 0, "refused")) == []
    for failed in (Asked(2.0, 3.0, 0, "reset"), Asked(30.1, 30.2, 0, "refused"), Asked(35.0, 36.0, 0, "reset")):
        assert wrong(1, failed) == [f"1 requests failed at rank 1, the first: {failed.trouble}"]
    assert wrong(0, Asked(15.0, 15.1, 0, "reset")) == ["1 requests failed at rank 0, the first: reset"]
    good = [each for each in good if not 9.5 < each.ended < 11.9]
    assert wrong(0) == ["rank 0 gave no answer for 3.00 s around the kill; before, for 1.00 s at most"]
    good = [each for each in good if each.ended < 32]
    assert "after: rank 0 answered nothing" in wrong(0) and "after: rank 1 answered nothing" in wrong(0)


def test_its_limit_stands_still_while_it_waits_for_its_turn(tmp_path: Path) -> None:
    ended: list[int] = []
    signal.signal(signal.SIGALRM, lambda *_: ended.append(1))
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        threading.Timer(1.5, (tmp_path / "go").touch).start()
        returns.hold(tmp_path / "go")
        left = signal.getitimer(signal.ITIMER_REAL)[0]
        assert not ended and 0.5 < left <= 1.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def main() -> int:
    """As the program runs, with these servers."""
    returns_apart.serve = serve
    returns.visible_gpus = lambda: 2
    returns.machine = lambda cpu: "a test"  # type: ignore[assignment]
    return returns.main()


if __name__ == "__main__":
    sys.exit(main())
