"""ci/checks/chaos.py: what is wrong with requests and with processes is told, and nothing else."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ci.checks import chaos
from ci.checks.chaos_events import Blow
from ci.checks.chaos_load import Answer, Truth, complete, differing, lag, prompts
from ci.checks.chaos_places import MEMORY_MIB, SETTLED_S, Place

TRUTHS = {"a": Truth([1, 2], [5, 6, 7])}


def answer(began: float, ended: float, streamed: bool, tokens: tuple[int, ...] = (), trouble: str = "") -> Answer:
    return Answer(began, ended, "a", streamed, tokens, trouble)


def test_requests_that_fail_and_streams_that_nobody_cut_are_wrong() -> None:
    fine = [answer(0, 1, False, (5,)), answer(0, 1, True, (5,))]
    assert chaos.judge(fine, []) == []
    cut = [answer(10, 12, True, (5,), "ended"), answer(10, 12, True, (), "refused")]
    assert chaos.judge([*fine, *cut], [Blow(11, 13)]) == []
    assert len(chaos.judge([*fine, *cut], [Blow(1, 9), Blow(13, 14)])) == 2
    failed = chaos.judge([*fine, answer(10, 12, False, (), "status 503")], [Blow(11, 13)])
    assert failed == ["a request that does not stream failed: status 503"]


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
    assert complete(url, "a", 3, streamed=False).tokens == (5, 6, 7)
    assert complete(url, "a", 9, streamed=False).trouble == "ended after 3 of 9 tokens"
    assert "refused" in complete(url.replace("127.0.0.1", "127.0.0.2"), "a", 3, streamed=False).trouble


def test_prompts_differ_and_come_from_the_seed() -> None:
    assert prompts(64, 1) == prompts(64, 1) != prompts(64, 2)
    assert len(set(prompts(64, 1))) == 64


def test_growth_of_a_life_is_told_once_it_lasted() -> None:
    place = Place(1, 8000, lives=2)
    first = {"private": 100.0, "descriptors": 20.0, "threads": 8.0}
    place.seen = {
        "worker 0": [first, {**first, "private": 102 + MEMORY_MIB, "descriptors": 21.0}],
        "front end": [first],
    }
    assert place.grown() == []
    place.measured_s = SETTLED_S
    [memory, descriptors] = place.grown()
    assert memory.startswith("rank 1 (life 2), worker 0: private grew by 26.0 in 30 s")
    assert descriptors == "rank 1 (life 2), worker 0: descriptors grew by 1.0 in 30 s, more than 0.0"
