"""ci/bench/steady.py: every request counts once, in the part in which it ended, and no silence is lost between parts."""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import ci.checks.chaos_positions  # noqa: F401 - where examples are found
from ci.bench.load import Load, requests
from ci.bench.servers import Target
from ci.bench.steady import Asked, Steady, longest_gap, part, per_second
from ci.root import ROOT

from servers import Server, Servers, free_ports  # isort: skip

pytestmark = pytest.mark.alone

POOL = requests(Load("a", 20, 1, 2), 512, 0.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    servers = Servers(tmp_path)
    port = free_ports(1)
    words = [sys.executable, "-m", "tests.unit.returning", "rank-0", str(port), "0", "falls-over"]
    yield servers.start("rank-0", port, words, {"PYTHONPATH": str(ROOT)})
    servers.stop()


def answers(*ends: float) -> list[Asked]:
    return [Asked(end - 0.5, end, 100) for end in ends]


def test_a_part_of_a_load() -> None:
    asked = [*answers(1.0, 2.0, 3.0, 4.0), Asked(0.0, 3.5, 0, "refused"), Asked(2.5, 6.0, 50)]
    assert part(asked, 1.0, 4.0) == (3.0, 3, 100.0, 1, 0.5, 1.0)
    assert part(asked, 4.0, 8.0) == (4.0, 1, 12.5, 0, 3.5, 2.0)
    assert part([], 0.0, 2.0) == (2.0, 0, 0.0, 0, 0.0, 2.0)


@pytest.mark.parametrize(
    ("ends", "begin", "end", "gap"),
    [
        ((1.0, 2.0, 7.0, 8.0), 5.0, 9.0, 5.0),  # begun before it, whole
        ((1.0, 2.0, 7.0, 8.0), 1.0, 5.0, 3.0),  # still on at its end
        ((1.0, 2.0, 7.0, 8.0), 7.0, 9.0, 1.0),  # what ended with it counts no more
        ((1.0, 2.0), 5.0, 6.0, 4.0),  # nothing came
        ((3.0, 3.5), 0.0, 3.5, 0.5),  # nobody had asked before 2.5
    ],
)
def test_the_longest_time_without_an_answer(ends: tuple[float, ...], begin: float, end: float, gap: float) -> None:
    assert longest_gap(answers(*ends), begin, end) == gap


def test_failures_end_no_gap() -> None:
    assert longest_gap([*answers(1.0, 6.0), Asked(2.0, 3.0, 0, "refused")], 0.0, 6.0) == 5.0


def test_what_was_asked_before_is_not_begun_by_a_later_question() -> None:
    """Of clients that wait for their first answers together, the one that has waited longest counts."""
    assert longest_gap([Asked(1.0, 4.0, 100), Asked(3.0, 5.0, 100)], 0.0, 5.0) == 3.0


def test_tokens_by_second() -> None:
    asked = [*answers(0.5, 1.2, 1.9, 3.0), Asked(1.0, 1.5, 0, "refused")]
    assert per_second(asked, 0.5, 3.0) == [200, 100]
    assert per_second(asked, 0.5, 3.5) == [200, 100, 100]


def test_a_server_that_answers_fails_and_is_gone(server: Server) -> None:
    """Clients go on whatever comes; failures are told with their reasons, and slow them down."""
    begun = threading.active_count()
    with Steady(Target(server.url, {"X": "1"}), POOL, 2, limit_s=5.0) as load:
        deadline = time.monotonic() + 20
        # Nobody is at the port of its peer: it answers with errors, once it is there.
        while not any("status 500: engine is dead" in each for each in load.troubles()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.process.kill()
        gone = time.monotonic()
        while not load.troubles(begin=gone + 0.5):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert all("refused" in each for each in load.troubles(begin=gone + 0.5))
    assert threading.active_count() == begun and not any(each.tokens for each in load.asked)
    assert len(load.asked) < 2 * (1 + 5 * (time.monotonic() - load.asked[0].began))


class Connection:
    """Answers with `text`, or whatever was asked for; `asked` has a body and headers for each."""

    def __init__(self, text: bytes = b"") -> None:
        self._text = text
        self.asked: list[tuple[dict[str, Any], dict[str, str]]] = []

    def request(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        self.asked.append((json.loads(body), headers))

    def getresponse(self) -> Any:
        most = self.asked[-1][0]["max_tokens"]
        text = self._text or b'data: {"usage": {"completion_tokens": %d}}\n\ndata: [DONE]\n\n' % most
        return SimpleNamespace(status=200, read=lambda: text)

    def close(self) -> None: ...


def test_clients_ask_for_all_requests_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all for the same ones; of whom they ask is in their headers, and what comes counts with its prompt."""
    limits: list[float] = []
    connections: list[Connection] = []

    def connect(place: str, timeout: float) -> Connection:
        limits.append(timeout)
        connections.append(Connection())
        return connections[-1]

    monkeypatch.setattr(http.client, "HTTPConnection", connect)
    pool = requests(Load("a", 20, 3, 2), 512, 0.0)
    with Steady(Target("http://127.0.0.1:9", {"X-data-parallel-rank": "1"}), pool, 2, limit_s=5.0) as load:
        deadline = time.monotonic() + 20
        while len(connections) < 2 or min(len(each.asked) for each in connections) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert limits == [5.0, 5.0]
    sent = [[json.dumps(body["prompt"]) for body, _ in each.asked[:3]] for each in connections]
    prompts = [json.dumps(json.loads(each.body + b"}")["prompt"]) for each in pool]
    assert sorted(prompts.index(mine[0]) for mine in sent) == [0, 1]
    assert all(mine == prompts[prompts.index(mine[0]) :: 2][:3] for mine in sent)
    assert all(words["X-data-parallel-rank"] == "1" for each in connections for _, words in each.asked)
    assert {each.tokens for each in load.asked} <= {each.input + each.output for each in pool}
    assert not load.troubles()


def test_an_answer_that_is_not_whole_is_a_failure() -> None:
    load, told = Steady(Target("http://127.0.0.1:9", {}), POOL, 1, limit_s=5.0), list[str]()
    for text in (
        b'data: {"usage": {"completion_tokens": 1}}\n\n',
        b'data: {"error": {}}\n\ndata: [DONE]\n\n',
        b'data: {"usage": {"completion_tokens": 12}}\n\ndata: [DONE]\n\n',
        b'data: {"usage": {"completion_tokens": 1}}\n\ndata: [DONE]\n\n',
    ):
        try:
            load._ask(Connection(text), POOL[0])  # type: ignore[arg-type]
        except OSError as error:
            told.append(str(error))
    assert len(told) == 3 and all("not whole" in each for each in told)
