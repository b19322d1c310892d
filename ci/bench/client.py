"""The client of loads.py, one for all systems: a steady load over HTTP, and what a window of it did.

Requests are streamed, so that every token counts when it arrives. All clients send their next request as soon as the last
one ended. The first request of each is shorter, one more than the other, so that requests end evenly spread from the
start, as they do later.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import aiohttp

from ci.bench.servers import SERVED

_COUNT: Final = re.compile(rb'"completion_tokens":\s*(\d+)')
#: Tokens of output after which the probe looks whether requests still differ.
PROBE_TOKENS: Final = 16


class Load(NamedTuple):
    """Requests of about `input` and `output` tokens, `concurrency` at a time."""

    name: str
    input: int
    output: int
    concurrency: int


class Event(NamedTuple):
    """Tokens that arrived at `at` seconds: a prompt's with its first token of output."""

    at: float
    input: int
    output: int


class Request(NamedTuple):
    """body: JSON without its end and max_tokens."""

    body: bytes
    input: int
    output: int


class Window(NamedTuple):
    """A measured part of a turn. tokens_per_s: input and output. ttft_s: of requests whose first token came in it;
    itl_s: mean seconds between tokens, of requests that ended in it."""

    seconds: float
    tokens_per_s: float
    output_per_s: float
    requests: int
    ttft_s: list[float]
    itl_s: list[float]


class LoadFailed(Exception):
    """A request was not answered as it should be."""


def parse_load(text: str) -> Load:
    """'NAME=INPUT/OUTPUT/CONCURRENCY'; raises ValueError in one line."""
    found = re.fullmatch(r"([\w.-]+)=(\d+)/(\d+)/(\d+)", text)
    if not found or not all(int(number) for number in found.groups()[1:]):
        raise ValueError(f"load {text!r}: write NAME=INPUT/OUTPUT/CONCURRENCY, such as decode8=512/128/8")
    return Load(found[1], *map(int, found.groups()[1:]))


def longest(load: Load, spread: float) -> int:
    """Tokens of the longest request that `requests` can make."""
    return round(load.input * (1 + spread)) + round(load.output * (1 + spread))


def requests(load: Load, vocab: int, spread: float, temperature: float) -> list[Request]:
    """The same for every system: random tokens, lengths evenly spread around the load's by the part `spread`."""
    rng = random.Random(load.name)

    def length(mean: int) -> int:
        return max(1, round(mean * rng.uniform(1 - spread, 1 + spread)))

    made = []
    for _ in range(max(64, 3 * load.concurrency)):
        prompt = rng.choices(range(8, vocab), k=length(load.input))
        body = {
            "model": SERVED,
            "prompt": prompt,
            "temperature": temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        made.append(Request(json.dumps(body)[:-1].encode(), len(prompt), length(load.output)))
    return made


def first_output(client: int, clients: int, output: int) -> int:
    """Tokens that a client's first request makes: evenly spread parts of `output`, as if it had begun before."""
    return max(1, round(output * (client + 1) / clients))


def measured(firsts: list[float], begin: float, length: float) -> tuple[float, float | None]:
    """(from, to): a window of at least `length` seconds that begins and ends with a prompt's first token.

    Tokens after `from` up to and with `to` count: whole prompts then make whole requests, however few there are. Where no
    first token is there in time, the window begins at `begin`, or has no end (None). firsts: when they were, in order.
    """
    start = next((at for at in firsts if begin <= at <= begin + length), begin)
    return start, next((at for at in firsts if at >= start + length), None)


@dataclass
class _Turn:
    """What happens in a turn, as it happens."""

    events: list[Event] = field(default_factory=list)
    ttft: list[tuple[float, float]] = field(default_factory=list)  # (when, seconds)
    itl: list[tuple[float, float]] = field(default_factory=list)
    waiting: int = 0  # clients that have had no token yet


async def turn(
    urls: list[str], load: Load, pool: list[Request], first: int, ramp_s: float, length_s: float, limit_s: float
) -> Window:
    """A steady load on a system, measured after every client has had a token and `ramp_s` more.

    first: of `pool`, the first request. limit_s: of waiting for tokens. Raises LoadFailed.
    """
    state = _Turn(waiting=load.concurrency)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=limit_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 20) as http:
        order = _cycle(pool, first)
        clients = [
            asyncio.create_task(_client(http, urls[i % len(urls)], i, load.concurrency, order, state))
            for i in range(load.concurrency)
        ]
        try:
            deadline = time.perf_counter() + limit_s
            while state.waiting:
                _check(clients, time.perf_counter() > deadline, load)
                await asyncio.sleep(0.02)
            begin = time.perf_counter() + ramp_s
            # A window ends with a first token; where requests are longer than it, at twice its length.
            while time.perf_counter() < begin + 2 * length_s:
                _check(clients, False, load)
                await asyncio.sleep(0.02)
                if measured([at for at, _ in state.ttft], begin, length_s)[1] is not None:
                    break
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    return window(state.events, state.ttft, state.itl, begin, length_s)


def window(
    events: list[Event], ttft: list[tuple[float, float]], itl: list[tuple[float, float]], begin: float, length: float
) -> Window:
    """The figures of `measured`'s window. ttft, itl: (when, seconds). Raises LoadFailed where nothing came in it."""
    start, found = measured([at for at, _ in ttft], begin, length)
    end = events[-1].at if found is None and events else found or start
    inside = [event for event in events if start < event.at <= end]
    if not inside:
        raise LoadFailed("no token came while it was measured")
    seconds, output = end - start, sum(event.output for event in inside)
    return Window(
        seconds,
        (output + sum(event.input for event in inside)) / seconds,
        output / seconds,
        sum(event.input > 0 for event in inside),
        [round(value, 5) for at, value in ttft if start < at <= end],
        [round(value, 6) for at, value in itl if start < at <= end],
    )


def _check(clients: list[asyncio.Task[None]], late: bool, load: Load) -> None:
    for client in clients:
        if client.done() and (error := client.exception()):
            raise LoadFailed(f"{load.name}: {type(error).__name__}: {error}"[:500])
    if late:
        raise LoadFailed(f"{load.name}: no token in time")


def _cycle(pool: list[Request], first: int) -> Iterator[Request]:
    while True:
        yield pool[first % len(pool)]
        first += 1


async def _client(
    http: aiohttp.ClientSession, url: str, number: int, clients: int, order: Iterator[Request], state: _Turn
) -> None:
    """Requests one after the other until it is cancelled."""
    fresh = True
    for request in order:
        output = first_output(number, clients, request.output) if fresh else request.output
        body = b'%s, "max_tokens": %d}' % (request.body, output)
        sent, got, first_at, last_at = time.perf_counter(), 0, 0.0, 0.0
        headers = {"Content-Type": "application/json"}
        async with http.post(f"{url}/v1/completions", data=body, headers=headers) as answer:
            if answer.status != 200:
                raise LoadFailed(f"status {answer.status}: {(await answer.text())[:300]}")
            rest = b""
            async for piece in answer.content.iter_any():
                whole, _, rest = (rest + piece).rpartition(b"\n\n")
                told = max(map(int, _COUNT.findall(whole)), default=0)
                if told <= got:
                    continue
                last_at = time.perf_counter()
                state.events.append(Event(last_at, 0 if got else request.input, told - got))
                if not got:
                    first_at = last_at
                    state.ttft.append((first_at, first_at - sent))
                    state.waiting -= fresh
                    fresh = False
                got = told
        if got != output:
            raise LoadFailed(f"{got} of {output} tokens")
        if output > 1:
            state.itl.append((last_at, (last_at - first_at) / (output - 1)))


async def different(urls: list[str], load: Load, pool: list[Request], limit_s: float) -> float:
    """How many different tokens the load's requests have after PROBE_TOKENS, by request: 1.0 where all differ.

    Requests that fall into the same tokens are sent to the same experts, which no real load does.
    """

    async def last(http: aiohttp.ClientSession, number: int) -> int:
        body: dict[str, Any] = json.loads(pool[number].body + b"}")
        del body["stream_options"]
        body.update(stream=False, max_tokens=PROBE_TOKENS, return_token_ids=True)
        async with http.post(f"{urls[number % len(urls)]}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise LoadFailed(f"status {answer.status}: {(await answer.text())[:300]}")
            return int((await answer.json())["choices"][0]["token_ids"][-1])

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=limit_s)) as http:
        found = await asyncio.gather(*(last(http, number) for number in range(load.concurrency)))
    return len(set(found)) / len(found)
