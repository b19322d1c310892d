"""ci/bench/returns.py --extra, without engines: an extra rank joins and leaves, and whatever goes wrong then is told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from ci.bench import returns_extra
from ci.bench.returns_apart import Mark, figures, judge
from ci.bench.steady import Asked

pytest_plugins = ("tests.unit.returns_told",)


def test_an_extra_rank_joins_and_leaves(returns_told: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = returns_told("", "--ranks", "3", "--extra")
    assert (code, found["wrong"]) == (0, [])
    apart, extra = found["apart"], found["apart"]["extra"]
    assert list(apart["parts"])[3:] == ["after", "an extra rank starts", "an extra rank is there", "it has left"]
    for name in list(apart["parts"])[3:]:
        assert all(row["answers"] > 0 and row["failed"] == 0 for row in apart["parts"][name]), name
    assert apart["parts"]["an extra rank is there"][0]["seconds"] >= 1.5 <= apart["parts"]["it has left"][0]["seconds"]
    assert extra["way"].endswith("in 0.1 s of loading") and extra["start_s"] > 0 and extra["exit"] == 0
    assert extra["rank"] == 3 and extra["part"]["answers"] > 10 and extra["part"]["failed"] == 0
    assert len(apart["digests"]) == 7 and len(apart["per_second"]) == 3
    printed = capsys.readouterr().out.splitlines()
    assert any("rank 3, an extra one, answered" in line for line in printed)
    head = next(line for line in printed if line.endswith("gap s"))
    rows = printed[printed.index(head) + 1 :][: 3 * len(apart["parts"])]
    assert {len(row) for row in rows} == {len(head)}, "columns stand below one another"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("other-bytes@rank-2", "experts changed, or differ between ranks: 0a 0a 0a 0a 0b"),
        ("deaf@rank-2", "rank 2 did not end within 1 s after SIGTERM"),
        ("falls@rank-2", "rank 2 ended with 4 after SIGTERM, not with 0"),
        ("leaves@rank-2", "rank 2 left process "),
        ("slow@rank-2", "rank 2 answered nothing"),
        ("late@rank-2", "a request failed at rank 2: OSError: status 500: not yet"),
        ("blind@rank-0", "rank 2 has left, but rank 0 sees 2 peers, not 1"),
        ("lonely@rank-1-again", "there is an extra rank, number 2, but rank 1 sees 1 peers, not 2"),
        ("down@rank-2", "NotUp: rank-2 ended with 3: ValueError: on purpose"),
        ("kept", "70 MiB of GPU 1 are in use more than before rank 2 came"),
    ],
)
def test_what_is_wrong_with_an_extra_rank_is_told(
    returns_told: Any, fault: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "kept":
        looks = iter([[9.0, 5.0], [9.0, 75.0]])
        monkeypatch.setattr(returns_extra, "device_mib", lambda: next(looks))
    code, found = returns_told(fault, "--extra", "--part-s", "0.5")
    assert code == 1 and any(why in line for line in found["wrong"]), found["wrong"]


def test_an_extra_rank_takes_a_gpu(returns_told: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        returns_told("", "--ranks", "4", "--extra")
    assert "this takes 5 GPUs, and 4 can be seen" in capsys.readouterr().err


def test_what_others_notice_of_a_start_that_fails_is_judged(
    returns_told: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = returns_told("down@rank-2", "--extra")
    apart = found["apart"]
    assert code == 1 and len(found["wrong"]) == 1 and found["wrong"][0].startswith("NotUp: rank-2 ended with 3")
    assert list(apart["parts"])[4:] == ["an extra rank starts"] and len(apart["digests"]) == 4
    assert all(row["failed"] == 0 for row in apart["parts"]["after"]) and apart["extra"] == {"rank": 2}
    assert "rank 2, an extra one, did not come and go" in capsys.readouterr().out


def test_what_goes_wrong_at_others_while_it_comes_and_goes() -> None:
    names = [
        "before",
        "rank 1 is dead",
        "rank 1 starts",
        "after",
        returns_extra.STARTS,
        returns_extra.THERE,
        returns_extra.LEFT,
    ]
    marks = [*(Mark(10.0 * n, name) for n, name in enumerate(names)), Mark(70.0, "")]
    good = [Asked(at, at + 0.4, 10) for at in range(70)]

    def wrong(*asked: list[Asked]) -> list[str]:
        return judge(asked, marks, figures(asked, marks)["parts"])

    assert wrong(good, good) == []
    for part, at in ((4, 45.0), (5, 55.0), (6, 65.0)):
        failed = Asked(at, at + 0.1, 0, "reset")
        assert wrong(good, [*good, failed]) == ["1 requests failed at rank 1, the first: reset"]
        silent = [each for each in good if not 10 * part <= each.began < 10 * (part + 1)]
        assert wrong(good, silent) == [f"{names[part]}: rank 1 answered nothing"]


def test_what_was_found_stays_where_time_is_over(
    returns_told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def over(self: returns_extra.Visit, server: Any) -> None:
        self.servers.stop()
        raise SystemExit("it took longer than 1 s")

    monkeypatch.setattr(returns_extra.Visit, "_leave", over)
    with pytest.raises(SystemExit):
        returns_told("falls-over", "--extra")
    found = json.loads((tmp_path / "returns.json").read_text())
    assert found["wrong"] == ["it was cut off"]
    apart = found["apart"]
    assert any("requests failed at rank 0" in line for line in apart["wrong"])
    assert list(apart["parts"]) == ["before", "rank 1 is dead", "rank 1 starts", "after"]
    assert apart["digests"] == ["0a", "0a"] and apart["extra"]["digest"] == "0a"
    assert apart["extra"]["part"]["answers"] > 10 and "start_s" in apart["extra"]


@pytest.mark.parametrize(("answers", "left"), [(3, []), (0, []), (3, [77])])
def test_what_an_extra_rank_did(answers: int, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens/s are of the time in which it is asked, however long its peers took to see it."""
    now = [100.0]

    class Asking:
        def __init__(self, *_: Any) -> None:
            self.asked = [Asked(now[0], now[0] + 0.1 * (1 + i), 50) for i in range(answers)]

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            now[0] += 1.0

        def troubles(self) -> list[str]:
            return []

    def passes(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(returns_extra, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=passes))
    monkeypatch.setattr(returns_extra, "Steady", Asking)
    monkeypatch.setattr(returns_extra, "device_mib", lambda: [])
    monkeypatch.setattr(returns_extra, "wait_up", lambda server, deadline: passes(30))
    monkeypatch.setattr(returns_extra, "told", lambda server: [])
    monkeypatch.setattr(returns_extra.Visit, "_await_peers", lambda visit, peers, why: passes(8))
    monkeypatch.setattr(returns_extra.positions, "members", lambda pid: left)
    process = SimpleNamespace(pid=5, returncode=0, terminate=lambda: None, wait=lambda limit: passes(4), poll=lambda: 0)
    server: Any = SimpleNamespace(url="http://127.0.0.1:1", process=process)
    servers: Any = SimpleNamespace(stop=lambda server: None)
    load = returns_extra.Load([], 1, 1.0)
    seen = returns_extra.Visit(servers, lambda: server, [server] * 2, lambda asked: ["0a"], load, 60.0, 5.0)
    seen.run()
    own = seen.found["part"]
    assert (own["seconds"], own["answers"], own["tokens_per_s"]) == (5.0, answers, 10.0 * answers)
    # What is left has a while to tidy up.
    assert seen.found["stop_s"] == (pytest.approx(9, abs=0.1) if left else 4)
    assert seen.found["start_s"] == 30 and [at for at, _ in seen.marks[:2]] == [100, 130]
    nothing = ["rank 2 answered nothing"] * (not answers)
    assert seen.wrong == nothing + [f"rank 2 left process {pid}" for pid in left]
