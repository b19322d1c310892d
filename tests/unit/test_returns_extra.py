"""ci/bench/returns.py --extra, without engines: an extra rank joins and leaves, and whatever goes wrong then is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from ci.bench import returns_extra
from ci.bench.returns_servers import NotUp
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
    assert extra["rank"] == 3 and extra["part"]["answers"] > 10 and extra["part"]["failed"] == 0
    assert len(apart["digests"]) == 7 and len(apart["per_second"]) == 3
    assert "rank 3, an extra one, answered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("other-bytes@rank-2", "experts changed, or differ between ranks: 0a 0a 0a 0a 0b"),
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
    code, found = returns_told(fault, "--extra")
    assert code == 1 and any(why in line for line in found["wrong"]), found["wrong"]


def test_an_extra_rank_takes_a_gpu(returns_told: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        returns_told("", "--ranks", "4", "--extra")
    assert "this takes 5 GPUs, and 4 can be seen" in capsys.readouterr().err


def test_what_was_found_before_stays(returns_told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def visit(*_: Any) -> None:
        raise NotUp("rank-2 was not up in time")

    monkeypatch.setattr(returns_extra, "visit", visit)
    code, found = returns_told("falls-over", "--extra")
    assert code == 1 and list(found["apart"]["parts"])[-1] == "after"
    assert any("requests failed at rank 0" in line for line in found["wrong"]), found["wrong"]
    assert any("rank-2 was not up in time" in line for line in found["wrong"])


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
    monkeypatch.setattr(returns_extra, "_await_peers", lambda ranks, peers, why: passes(8) or [])
    monkeypatch.setattr(returns_extra.positions, "members", lambda pid: left)
    server: Any = SimpleNamespace(url="http://127.0.0.1:1", process=SimpleNamespace(pid=5, returncode=0))
    servers: Any = SimpleNamespace(stop=lambda server: passes(4))
    load = returns_extra.Load([], 1, 1.0)
    seen = returns_extra.visit(servers, lambda: server, [server] * 2, lambda asked: ["0a"], load, 60.0, 5.0)
    own = seen.found["part"]
    assert (own["seconds"], own["answers"], own["tokens_per_s"]) == (5.0, answers, 10.0 * answers)
    assert seen.found["start_s"] == 30 and seen.found["stop_s"] == 4 and (seen.starts, seen.there) == (100, 130)
    nothing = ["rank 2 answered nothing"] * (not answers)
    assert seen.wrong == nothing + [f"rank 2 left process {pid}" for pid in left]
