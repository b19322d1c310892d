"""ci/checks/chaos.py: what is wrong with requests and with processes is told, and nothing else."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ci.checks import chaos, chaos_events
from ci.checks.chaos import REQUEST_LIMIT_S
from ci.checks.chaos_events import GRACE_S, Chaos, Disturbance
from ci.checks.chaos_load import Drawn, Truth, differing, lag, prompts
from ci.checks.chaos_positions import MEMORY_MIB, SETTLED_S, Group, Position

from servers import Server, Servers, free_ports  # isort: skip - found by ci.checks.chaos
from steady_load import TOKENS, Asked, complete  # isort: skip

TRUTHS = {"a": Truth([1, 2], [5, 6, 7])}


def answer(began: float, ended: float, streamed: bool, tokens: tuple[int, ...] = (), trouble: str = "") -> Asked:
    return Asked(began, ended, streamed, tokens, trouble, "a")


def test_requests_that_fail_and_streams_that_nobody_cut_are_wrong() -> None:
    fine = [answer(0, 1, False, (5,)), answer(0, 1, True, (5,))]
    assert chaos.judge(fine, [], 1) == chaos.judge(fine[1:], [], 1) == []
    cut = [answer(10, 12, True, (5,), "ended"), answer(10, 12, True, (), "refused")]
    assert chaos.judge([*fine, *cut], [Disturbance(11, 0, end=12)], 2) == []
    assert chaos.judge([*fine, *cut], [Disturbance(11, 0)], 2) == []
    assert len(chaos.judge([*fine, *cut], [Disturbance(1, 0, end=11.9 - GRACE_S), Disturbance(13, 1, end=14)], 2)) == 2
    failed = chaos.judge([*fine, answer(10, 12, False, (), "status 503")], [Disturbance(11, 0, end=12)], 2)
    assert failed == ["a request that does not stream failed: status 503"]


def test_an_end_breaks_a_stream_of_each_client() -> None:
    """Three streams of two clients are one too many, but not where two servers ended."""
    cut = [answer(10, 12 + i, True, (5,), "ended") for i in range(3)]
    first, second = Disturbance(11, 0, end=14), Disturbance(13.5, 1, end=20)
    assert len(chaos.unexplained(cut, [first], 2)) == 1
    assert chaos.unexplained(cut, [second, first], 2) == []


def test_a_stop_breaks_what_the_router_gives_up() -> None:
    """A stream that ends sooner was not given up, however long the server was stopped."""
    stop = [Disturbance(10, 0, stopped=True, end=50)]
    assert chaos.unexplained([answer(9, 9 + REQUEST_LIMIT_S, True, (5,), "timeout")], stop, 1) == []
    soon = answer(12, 11.9 + REQUEST_LIMIT_S, True, (5,), "ended")
    assert chaos.unexplained([soon], stop, 1) == [soon]


def test_tokens_are_compared_as_far_as_they_came() -> None:
    assert differing([answer(0, 1, True, (5, 6)), answer(0, 1, True)], TRUTHS) == []
    other = answer(0, 1, False, (5, 7))
    assert differing([other, other, answer(0, 1, False, (5, 6, 7))], TRUTHS) == [other]


class Plain(http.server.BaseHTTPRequestHandler):
    """Answers as vLLM, where the choice after 5 is 6, and 7 is 0.5 behind."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice: dict[str, Any] = {"token_ids": [5, 6, 7][: body["max_tokens"]]}
        if "prompt_logprobs" in body:
            chosen = {"5": {"logprob": -0.1}, "6": {"logprob": -0.2}}
            choice["prompt_logprobs"] = [None, chosen, {"5": chosen["5"]}, {"6": chosen["6"], "7": {"logprob": -0.7}}]
        text = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_an_answer_is_followed_token_by_token(url: str) -> None:
    assert lag(url, answer(0, 1, False, (5, 7)), TRUTHS) == pytest.approx(0.5)
    assert lag(url, answer(0, 1, False, (5, 6)), TRUTHS) == 0
    assert complete(url, "a", count=3).tokens == (5, 6, 7)
    assert complete(url, "a", count=9).trouble == "ended after 3 of 9 tokens"
    assert "refused" in complete(url.replace("127.0.0.1", "127.0.0.2"), "a").trouble


def test_prompts_differ_and_come_from_the_seed() -> None:
    assert prompts(64, 1) == prompts(64, 1) != prompts(64, 2)
    assert len(set(prompts(64, 1))) == 64


def test_what_a_client_asks_comes_from_the_seed() -> None:
    asked = {(seed, client): list(islice(Drawn(["a", "b"], seed)(client), 64)) for seed in (1, 2) for client in (0, 1)}
    assert len({tuple(questions) for questions in asked.values()}) == 4
    assert asked[1, 0] == list(islice(Drawn(["a", "b"], 1)(0), 64))
    assert {question.count for question in asked[1, 0]} == set(range(1, TOKENS + 1))
    assert 4 < sum(question.streamed for question in asked[1, 0]) < 28


def test_growth_of_a_life_is_told_once_it_lasted() -> None:
    position = Position(1, 8000, lives=2)
    first = {"private": 100.0, "descriptors": 20.0, "threads": 8.0}
    position.seen = {
        "worker 0": [first, {**first, "private": 102 + MEMORY_MIB, "descriptors": 21.0}],
        "front end": [first],
    }
    assert position.grown() == []
    position.measured_s = SETTLED_S
    [memory, descriptors] = position.grown()
    assert memory.startswith("rank 1 (life 2), worker 0: private grew by 26.0 in 30 s")
    assert descriptors == "rank 1 (life 2), worker 0: descriptors grew by 1.0 in 30 s, more than 0.0"


class Router(http.server.BaseHTTPRequestHandler):
    """Says that all its servers are healthy, and refuses to add or remove one."""

    workers: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"workers": [{"url": url, "is_healthy": True} for url in self.workers]}).encode())

    def do_POST(self) -> None:
        self.send_error(500)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Chaos]:
    """Ranks 0 and 1 of a group of one, whose servers are processes that only sleep, behind a Router."""
    servers, ports = Servers(tmp_path), free_ports(2)
    positions = [Position(rank, ports + rank, lives=1) for rank in range(2)]
    for position in positions:
        position.server = servers.start(f"rank-{position.rank}", position.port, ["sleep", "60"], {})
        position.become("up")
    Router.workers = [position.url for position in positions]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Router) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        router = Server(
            "router", f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "log", servers.started[0].process
        )
        yield Chaos(servers, Group("model", 1, tmp_path), router, positions, 1, print)
        server.shutdown()
        thread.join()
    servers.stop()


@pytest.mark.parametrize("event", ["leave", "end", "kill"])
def test_a_disturbance_is_over_when_its_server_has_ended(
    running: Chaos, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that breaks long after that was broken by something else. What the router refuses is noted."""
    monkeypatch.setattr(chaos_events, "WEIGHTS", {**dict.fromkeys(chaos_events.WEIGHTS, 0), event: 1})
    running.draw()
    deadline = time.monotonic() + 20
    while all(position.server for position in running.positions):
        running.follow()
        assert time.monotonic() < deadline
    ended = time.monotonic()
    [disturbance] = running.disturbances
    assert running.counted[event] == 1 and disturbance.begin <= disturbance.end <= ended
    late = answer(ended, ended + GRACE_S + 0.1, True, (5,), "ended")
    assert chaos.judge([late._replace(ended=ended)], running.disturbances, 1) == []
    assert len(chaos.judge([late], running.disturbances, 1)) == 1
    refused = ["the router did not remove rank 1: HTTP Error 500: Internal Server Error"]
    assert running.wrong == (refused if event == "leave" else [])


def test_servers_that_do_not_answer_at_the_end_are_told(running: Chaos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos.time, "sleep", lambda seconds: None)
    lines, answers = chaos.last_look(running, TRUTHS)
    assert [line.split(":")[0] for line in lines[:2]] == [
        f"rank {rank} does not say at the end whom it sees" for rank in range(2)
    ]
    assert len(lines) == 4 and len(answers) == 2 and all("refused" in line for line in lines)
