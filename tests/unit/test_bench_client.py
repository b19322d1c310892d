"""ci/bench/client.py: what a turn sends, and what a window of it counts."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from ci.bench import client as bench_client
from ci.bench.client import Event, First
from ci.bench.load import Load, Request, requests
from ci.bench.servers import Target

pytestmark = pytest.mark.alone


def test_first_requests_end_evenly_spread() -> None:
    assert [bench_client.first_output(i, 4, 100) for i in range(4)] == [25, 50, 75, 100]
    assert bench_client.first_output(0, 16, 1) == 1


def steady(clients: int, seconds: float, tokens: int, until: float) -> tuple[list[Event], list[First]]:
    """Requests of `seconds` each in a closed loop, with ten tokens of input."""
    events: list[Event] = []
    for client in range(clients):
        at = seconds * client / clients - seconds
        while at < until:
            events += [Event(at + seconds * (i + 1) / tokens, 0 if i else 10, 1) for i in range(tokens)]
            at += seconds
    events = sorted(event for event in events if 0 <= event.at <= until)
    return events, [First(event.at, 0.1, "") for event in events if event.input]


@pytest.mark.parametrize(("clients", "seconds"), [(1, 0.9), (1, 4.3), (16, 1.1), (16, 7.7)])
def test_a_window_counts_whole_requests_however_long_they_are(clients: int, seconds: float) -> None:
    tokens = 8
    for begin in (random.Random(0).uniform(2, 8) for _ in range(20)):
        events, ttft = steady(clients, seconds, tokens, begin + 12)
        found = bench_client.window(events, ttft, [], begin, 5.0)
        assert found.tokens_per_s == pytest.approx(clients * (10 + tokens) / seconds, rel=0.01)
        assert found.output_per_s == pytest.approx(clients * tokens / seconds, rel=0.01)
        assert found.seconds >= 5 and found.requests == len(found.ttft_s) > 0


def test_a_window_without_tokens_fails() -> None:
    with pytest.raises(bench_client.LoadFailed):
        bench_client.window([], [], [], 1.0, 5.0)


class Service:
    """An HTTP server that streams as vLLM's does; `wrong` adds to the tokens of every request, `ended` counts."""

    def __init__(self, wrong: int = 0, counts: bool = True) -> None:
        """counts: whether every piece tells the tokens so far, or the last one only, as behind a router."""
        self.wrong, self.counts = wrong, counts
        self.inside, self.most = 0, 0
        self.seen: list[tuple[float, str, int]] = []  # when, rank, tokens of the prompt

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append((time.monotonic(), request.headers.get("X-data-parallel-rank", ""), len(body["prompt"])))
        self.inside += 1
        self.most = max(self.most, self.inside)
        stream = web.StreamResponse()
        await stream.prepare(request)
        try:
            whole = body["max_tokens"] + self.wrong
            for i in range(0, whole, 2):  # two tokens in a piece
                told = min(i + 2, whole)
                text = b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n' % told
                if not self.counts and told < whole:
                    text = b'data: {"choices": [{"text": "a \\"text\\": b"}]}\n\n'
                await stream.write(text[:20])
                await asyncio.sleep(0.005)
                await stream.write(text[20:])
            await stream.write(b"data: [DONE]\n\n")
        finally:
            self.inside -= 1
        return stream


@asynccontextmanager
async def reached(service: Service) -> AsyncIterator[str]:
    """The URL at which it answers."""
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/completions", service.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def play(service: Service, load: Load, ranks: int = 0) -> bench_client.Window:
    """A short turn on `service`, or on so many ranks of it."""

    async def go() -> bench_client.Window:
        async with reached(service) as url:
            targets = [Target(url, {"X-data-parallel-rank": str(rank)}) for rank in range(ranks)] or [Target(url, {})]
            return await bench_client.turn(targets, load, requests(load, 512, 0.0), 3, 0.1, 0.5, 10)

    return asyncio.run(go())


def test_a_turn_keeps_as_many_requests_in_flight_as_asked_and_counts_every_token() -> None:
    service = Service()
    found = play(service, Load("small", 50, 20, 4))
    assert service.most == 4
    # Every request makes 20 and takes 50 on the average; both ends of the window are first tokens.
    assert found.tokens_per_s / found.output_per_s == pytest.approx(70 / 20, rel=0.25)
    assert found.seconds >= 0.5 and found.ttft_s and found.itl_s


def test_a_first_token_is_seen_when_it_comes_though_counts_come_at_the_end() -> None:
    found = play(Service(counts=False), Load("small", 50, 20, 4))
    # The second piece of ten comes 5 ms after the first.
    assert statistics.median(found.ttft_s) < 19 * statistics.median(found.itl_s)
    assert found.tokens_per_s / found.output_per_s == pytest.approx(70 / 20, rel=0.25)


def test_a_load_that_fails_once_it_is_steady_is_told_at_its_end() -> None:
    load, service = Load("small", 10, 4, 2), Service()

    async def go() -> None:
        async with (
            reached(service) as url,
            bench_client.steady([Target(url, {})], load, requests(load, 512, 0.0), 0, 10) as state,
        ):
            service.wrong = 1
            await asyncio.wait(state.tasks, timeout=10)

    with pytest.raises(bench_client.LoadFailed, match=r"small: LoadFailed: \d of \d tokens"):
        asyncio.run(go())


def test_pieces_of_text_are_counted_as_they_come() -> None:
    """A piece may be cut anywhere, may have the word in its text, and the last one may be empty."""
    parts = [
        b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [{"te',
        b'xt": "b"}]}\n\n',
        b'data: {"choices": [{"text": " \\"text\\": text"}]}\n\n',
        b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n',
        b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\ndata: [DONE]\n\n',
    ]

    async def iter_any() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    @asynccontextmanager
    async def post(*_: Any, **__: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(status=200, content=SimpleNamespace(iter_any=iter_any))

    http: Any = SimpleNamespace(post=post)
    state = bench_client._Turn(waiting={0})
    client = bench_client._Client(http, Target("", {}), 0, "", iter(()), state)
    asyncio.run(client.ask(Request(b"{", 5, 3), 3))
    assert [(event.input, event.output) for event in state.events] == [(5, 1), (0, 1), (0, 1)]


def test_a_request_with_other_tokens_than_asked_fails_the_turn() -> None:
    with pytest.raises(bench_client.LoadFailed, match="tokens"):
        play(Service(wrong=1), Load("small", 10, 4, 2))


class Recorder(bench_client._Client):
    """Writes down when it asks, by the clock that `target` is here."""

    def ask(self, request: Request, output: int) -> Any:
        self.state.append(self.target[0])
        return asyncio.Event().wait()  # never answered


@pytest.mark.parametrize("burst", [False, True])
def test_requests_at_fixed_times_are_sent_whether_or_not_there_are_answers(
    burst: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only sleeping moves, since a busy machine sends late."""
    load, clock = Load("timed", 10, 20, 4, every=0.04, burst=burst), [0.0]
    really = asyncio.sleep

    async def sleep(seconds: float) -> None:
        clock[0] += seconds
        await really(0)

    async def times(number: int) -> list[float]:
        clock[0], asked = 0.0, []
        state: Any = SimpleNamespace(tasks=[], append=asked.append)
        client = Recorder(None, clock, number, "", itertools.repeat(Request(b"", 1, 1)), state)  # type: ignore[arg-type]
        sending = asyncio.create_task(client.on_time(load))
        while len(asked) < 3:
            await really(0)
        for task in (sending, *state.tasks):
            task.cancel()
        return [round(at, 9) for at in asked]

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(bench_client, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = [asyncio.run(times(number)) for number in range(4)]
    firsts = [0.0] * 4 if burst else [0.0, 0.01, 0.02, 0.03]
    assert found == [[round(first + 0.04 * turn, 9) for turn in range(3)] for first in firsts]


def test_the_rate_of_requests_at_fixed_times_is_theirs() -> None:
    service = Service()
    # An answer takes 50 ms, and a round 40: in turn there would never be more than four inside.
    found = play(service, Load("timed", 10, 20, 4, every=0.04))
    assert service.most > 4
    assert found.requests / found.seconds == pytest.approx(4 / 0.04, rel=0.3)


def test_a_burst_is_sent_at_once() -> None:
    service = Service()
    play(service, Load("burst", 10, 2, 8, every=0.25, burst=True))
    times = [at for at, _, _ in service.seen]
    assert len(times) >= 16 and all(max(times[i : i + 8]) - min(times[i : i + 8]) < 0.1 for i in (0, 8))
    assert times[8] - times[7] > 0.1


def test_an_uneven_load_sends_three_of_four_long_prompts_to_one_rank() -> None:
    service = Service()
    found = play(service, Load("uneven", 160, 2, 8, every=0.1, uneven=True), ranks=2)
    whole = service.seen[: len(service.seen) // 8 * 8]
    long = Counter(rank for _, rank, tokens in whole if tokens > 100)
    short = Counter(rank for _, rank, tokens in whole if tokens < 20)
    assert long["0"] == 3 * long["1"] > 0 and short["0"] == short["1"] == (long["0"] + long["1"]) / 2
    assert set(found.ttft_by) == {f"{size}, {rank}" for size in ("long", "short") for rank in ("rank 0", "other ranks")}
    assert sorted(itertools.chain(*found.ttft_by.values())) == sorted(found.ttft_s)
