"""ci/checks/soak.py: requests that go wrong are told, growth is told, and both from what is expected."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from ci.checks import soak, soak_results
from ci.checks.soak_processes import COLUMNS, Sample, measure, names_of, role
from ci.checks.soak_requests import Ask, Outcome, asks, send

MAX_LEN = 64


def answer_well(body: dict[str, object]) -> tuple[int, str]:
    """Status and text as vLLM's server has them."""
    tokens = body["max_tokens"]
    if not isinstance(tokens, int) or tokens < 1 or isinstance(body["prompt"], list) or body.get("n") == 0:
        return 400, "bad"
    if not isinstance(body["temperature"], int | float):
        return 400, "bad"
    return 200, json.dumps({"usage": {"completion_tokens": tokens}})


class Service:
    """An HTTP server in this process; `wrong`: the kind of answer that it gets wrong."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong
        self.ranks: list[str | None] = []

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.ranks.append(request.headers.get("X-data-parallel-rank"))
        status, text = answer_well(body)
        if self.wrong == "refused" and status == 400:
            status, text = 200, "{}"
        if self.wrong == "whole" and status == 200:
            text = json.dumps({"usage": {"completion_tokens": 99}})
        if status != 200 or not body.get("stream"):
            return web.Response(status=status, text=text, content_type="application/json")
        stream = web.StreamResponse()
        await stream.prepare(request)
        if self.wrong != "stream":
            for _ in range(body["max_tokens"]):
                await stream.write(b"data: {}\n\n")
            await stream.write(b"data: [DONE]\n\n")
        return stream

    async def ask(self, wanted: list[Ask], ranks: int = 2, limit_s: float = 30) -> tuple[int, Outcome]:
        """What a client of 4 requests at a time finds."""
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            outcome = Outcome()
            return await send(f"http://127.0.0.1:{runner.addresses[0][1]}", wanted, ranks, 4, limit_s, outcome), outcome
        finally:
            await runner.cleanup()


def test_requests_are_the_same_for_every_server_and_of_every_kind() -> None:
    wanted = asks(1000, "m", MAX_LEN)
    assert wanted == asks(1000, "m", MAX_LEN) and wanted != asks(1000, "m", MAX_LEN, seed=1)
    lengths = sorted(len(ask.body["prompt"].split()) for ask in asks(1000, "m", 999, long=500) if ask.kind == "whole")
    assert lengths[len(lengths) // 2] <= 24 and 400 < lengths[-1] <= 500
    kinds = Counter(ask.kind for ask in wanted)
    assert 10 < kinds["abort"] < 60 and 5 < kinds["refused"] < 50 and 200 < kinds["stream"] < 300
    assert 50 < sum(ask.pin is not None for ask in wanted) < 150
    assert {answer_well(ask.body)[0] for ask in wanted if ask.kind == "refused"} == {400}


def test_right_answers_are_counted_and_pins_are_sent() -> None:
    wanted, service = asks(300, "m", MAX_LEN), Service()
    sent, outcome = asyncio.run(service.ask(wanted))
    assert sent == 300 and outcome.wrong == []
    assert outcome.done == Counter(ask.kind for ask in wanted)
    assert Counter(service.ranks) == Counter(None if ask.pin is None else str(ask.pin % 2) for ask in wanted)
    alone = Service()
    asyncio.run(alone.ask(wanted, ranks=1))
    assert set(alone.ranks) == {None}


@pytest.mark.parametrize("kind", ["refused", "whole", "stream"])
def test_wrong_answers_are_told(kind: str) -> None:
    wanted = asks(300, "m", MAX_LEN)
    _, outcome = asyncio.run(Service(wrong=kind).ask(wanted))
    told = {text.split(":")[0] for text in outcome.wrong}
    assert kind in told and told <= {kind, "abort"}
    assert outcome.done[kind] == 0


def test_a_server_that_is_gone_and_a_limit() -> None:
    outcome = Outcome()
    assert asyncio.run(send("http://127.0.0.1:9", asks(5, "m", MAX_LEN), 2, 2, 30, outcome)) == 5
    assert len(outcome.wrong) == 5
    sent, _ = asyncio.run(Service().ask(asks(5, "m", MAX_LEN), limit_s=-1))
    assert sent == 0


def test_processes_are_named_and_measured() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()", "VLLM::EngineCore_DP1"], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 10
        while not psutil.Process(child.pid).cmdline() and time.monotonic() < deadline:
            time.sleep(0.01)  # under load it has none yet
        names = names_of([psutil.Process(), psutil.Process(child.pid)])
        assert names == {"front end": os.getpid(), "engine 1": child.pid}
        found = measure(child.pid)
        assert set(found) == set(COLUMNS) and found["threads"] == 1 and 3 <= found["descriptors"] < 20
        assert 0 < found["private"] <= found["rss"] and 0 < found["pss"] <= found["rss"]
    finally:
        child.communicate()
    assert [role(name) for name in ("engine 1", "worker 0'", "front end")] == ["engine", "worker", "front end"]


def samples(**grown: float) -> list[Sample]:
    """Of one process, before, after 1,000 and after 3,000 requests."""
    base = dict.fromkeys(COLUMNS, 100.0)
    more = {column: 100.0 + grown.get(column, 0) for column in COLUMNS}
    return [
        Sample(n, {"worker 0": each}, 1, 2, {"GPU": each["rss"]}) for n, each in ((0, base), (1000, base), (3000, more))
    ]


@pytest.mark.parametrize(
    ("grown", "told"),
    [
        ({}, None),
        ({"private": 3.9}, None),  # of two parts of 1,000
        ({"private": 4.2}, "private grew by 2.1, more than 2.0"),
        ({"descriptors": 1}, "descriptors grew by 1.0, more than 0.0"),
        ({"threads": 2}, "threads grew by 2.0, more than 0.0"),
        ({"pss": 50}, None),  # goes up when another process ends
    ],
)
def test_growth_is_told(grown: dict[str, float], told: str | None) -> None:
    lines = soak_results.too_much(soak_results.growth(samples(**grown)), {})
    assert lines == ([] if told is None else [f"worker 0: {told}"])


def test_what_plain_vllm_grows_by_is_allowed_for() -> None:
    plain = {"worker 0": {"private": 3.0, "descriptors": 1.0, "threads": 0.0}}
    mine = {f"worker {rank}": {"private": 4.9, "descriptors": 1.0, "threads": 0.0} for rank in range(2)}
    assert soak_results.too_much(mine, plain) == []
    mine["worker 1"] = {"private": 5.1, "descriptors": 2.0, "threads": 0.0}
    assert [line.split(" grew")[0] for line in soak_results.too_much(mine, plain)] == [
        "worker 1: private",
        "worker 1: descriptors",
    ]
    assert len(soak_results.too_much({"coordinator": plain["worker 0"]}, plain)) == 2


def test_a_gpu_that_fills_is_told() -> None:
    assert soak_results.more_on_devices(samples(rss=15)) == []
    assert soak_results.more_on_devices(samples(rss=17)) == ["GPU: grew by 17.0 MiB, more than 16.0"]


@pytest.mark.parametrize(
    ("within", "took", "since", "left"),
    [
        (None, 100, 999, 300),
        (450, 0, 130, 275),
        (450, 100, 300, 105),
        (900, 390, 400, 10),
        (450, 100, 410, 0),
        (60, 0, 130, 1),
    ],
)
def test_a_soak_ends_in_time_however_long_start_and_samples_took(
    within: float | None, took: float, since: float, left: float
) -> None:
    args = argparse.Namespace(limit_s=400.0, within_s=within)
    assert soak.left_s(args, took, since) == left


class _Served:
    """In place of soak.Server: it takes 100 s to start, and every sample 20 s."""

    def __init__(self) -> None:
        self.now, self.url, self.process = 0.0, "", argparse.Namespace(poll=lambda: None)

    def wait_for_health(self) -> None:
        self.now += 100

    def states(self, digests: bool = False) -> dict[int, dict[str, str]]:
        return {0: {"digest": "a"}}

    def sample(self, requests: int) -> Sample:
        self.now += 20
        return samples()[0]._replace(requests=requests)


def test_a_soak_sends_for_as_long_as_lets_it_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The time that samples take between parts counts; what was found before is on disk meanwhile."""
    server, sent, file = _Served(), list[float](), tmp_path / "soak.json"

    async def send(url: str, part: object, ranks: int, concurrency: int, limit_s: float, outcome: Outcome) -> int:
        assert not sent or json.loads(file.read_text())["unfinished"]
        sent.append(limit_s)
        server.now += min(50.0, limit_s)
        return 7

    monkeypatch.setattr(soak, "send", send)
    monkeypatch.setattr(soak, "time", argparse.Namespace(monotonic=lambda: server.now))
    args = argparse.Namespace(plain=False, ranks=2, part=10, long=0, concurrency=2, requests=10, seconds=300.0)
    vars(args).update(limit_s=400.0, within_s=350.0, json=file, quiet=True)
    found, took, digests = soak.run(server, args, Outcome())  # type: ignore[arg-type]
    assert sent == [185.0, 115.0, 45.0] and took == 145 and digests == ["a", "a"]
    assert server.now <= 350 - soak.END_S + 20 and found[-1].requests == 21


def test_what_was_found_so_far_is_on_disk(tmp_path: Path) -> None:
    outcome = Outcome()
    outcome.wrong.append("x")
    soak_results.write(tmp_path / "soak.json", samples(threads=1), 2.0, ["a"], outcome, unfinished=True)
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["unfinished"] and found["growth"]["worker 0"]["threads"] == 1 and found["wrong"] == ["x"]
    assert len(found["samples"]) == 3 and [path.name for path in tmp_path.iterdir()] == ["soak.json"]


def test_the_table() -> None:
    lines = soak_results.table(samples(private=8, threads=1)).splitlines()
    rows = {tuple(line.split()[:-4]): line.split()[-4:] for line in lines[1:]}
    assert rows["worker", "0", "private", "MiB"] == ["100.0", "100.0", "108.0", "8.0"]
    assert rows["worker", "0", "threads"] == ["100", "100", "101", "1"]
    assert rows["GPU", "MiB"] == ["100.0", "100.0", "100.0", "0.0"]
    assert rows["segments",] == ["1", "1", "1", "0"]
