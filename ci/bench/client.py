"""The client of loads.py, one for all systems: a steady load over HTTP, and what a window of it did.

Requests are streamed, so that every token counts when it arrives. Where a load has no times of its own, all clients send
their next request as soon as the last one ended. The first request of each is then shorter, one more than the other, so that
requests end evenly spread from the start, as they do later.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import aiohttp

from ci.bench.load import Load, Request, place
from ci.bench.servers import Target

_COUNT: Final = re.compile(rb'"completion_tokens":\s*(\d+)')
_TEXT: Final = b'"text":'
#: Tokens of output after which the probe looks whether requests still differ.
PROBE_TOKENS: Final = 16


class Event(NamedTuple):
    """Tokens that arrived at `at` seconds: a prompt's with its first token of output."""

    at: float
    input: int
    output: int


class Window(NamedTuple):
    """A measured part of a turn. tokens_per_s: input and output. ttft_s: of requests whose first token came in it;
    ttft_by: of an uneven load the same by Place; itl_s: mean seconds between tokens, of requests that ended in it."""

    seconds: float
    tokens_per_s: float
    output_per_s: float
    requests: int
    ttft_s: list[float]
    itl_s: list[float]
    ttft_by: dict[str, list[float]]


class LoadFailed(Exception):
    """A request was not answered as it should be."""


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


class First(NamedTuple):
    """A request's first token. where: the name of its Place, empty but in uneven loads."""

    at: float
    seconds: float
    where: str


@dataclass
class _Turn:
    """What happens in a turn, as it happens."""

    events: list[Event] = field(default_factory=list)
    firsts: list[First] = field(default_factory=list)
    itl: list[tuple[float, float]] = field(default_factory=list)  # (when, seconds)
    waiting: set[int] = field(default_factory=set)  # clients that have had no token yet
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class _Client(NamedTuple):
    """Asks `target`; `where` as in First."""

    http: aiohttp.ClientSession
    target: Target
    number: int
    where: str
    order: Iterator[Request]
    state: _Turn

    async def in_turn(self, clients: int) -> None:
        """Requests one after the other until it is cancelled."""
        request = next(self.order)
        await self.ask(request, first_output(self.number, clients, request.output))
        for request in self.order:
            await self.ask(request, request.output)

    async def on_time(self, load: Load) -> None:
        """A request every `load.every` seconds until it is cancelled, whether the last one has its answer or not."""
        at = time.perf_counter() + load.begins(self.number)
        while True:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            request = next(self.order)
            self.state.tasks.append(asyncio.create_task(self.ask(request, request.output)))
            at += load.every

    async def ask(self, request: Request, output: int) -> None:
        """One request; raises LoadFailed where it is not answered as it should be."""
        body = b'%s, "max_tokens": %d}' % (request.body, output)
        sent, got, first_at, last_at = time.perf_counter(), 0, 0.0, 0.0
        headers = {"Content-Type": "application/json", **self.target.headers}
        async with self.http.post(f"{self.target.url}/v1/completions", data=body, headers=headers) as answer:
            if answer.status != 200:
                raise LoadFailed(f"status {answer.status}: {(await answer.text())[:300]}")
            rest, pieces = b"", 0
            async for piece in answer.content.iter_any():
                whole, _, rest = (rest + piece).rpartition(b"\n\n")
                # A router may leave the counts to the end; a piece of text is one token, or a few where the reader is late.
                pieces += whole.count(_TEXT)
                told = max(map(int, _COUNT.findall(whole)), default=min(pieces, output))
                if told <= got:
                    continue
                last_at = time.perf_counter()
                self.state.events.append(Event(last_at, 0 if got else request.input, told - got))
                if not got:
                    first_at = last_at
                    self.state.firsts.append(First(first_at, first_at - sent, self.where))
                    self.state.waiting.discard(self.number)
                got = told
        if got != output:
            raise LoadFailed(f"{got} of {output} tokens")
        if output > 1:
            self.state.itl.append((last_at, (last_at - first_at) / (output - 1)))


@asynccontextmanager
async def steady(
    targets: list[Target], load: Load, pool: list[Request], first: int, limit_s: float
) -> AsyncIterator[_Turn]:
    """A load on a system, from when every client has had a token; its requests are given up at the end, which
    raises where one has failed by then.

    targets: an uneven load takes them by rank, any other one after the other. first: of `pool`, the first request.
    limit_s: of waiting for tokens. Raises LoadFailed.
    """
    state = _Turn(waiting=set(range(load.concurrency)))
    timeout = aiohttp.ClientTimeout(total=None, sock_read=limit_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 20) as http:
        kinds = 2 if load.uneven else 1
        orders = [_cycle(pool[kind::kinds], first) for kind in range(kinds)]
        for number in range(load.concurrency):
            at = place(number, len(targets)) if load.uneven else None
            target = targets[at.rank if at else number % len(targets)]
            client = _Client(http, target, number, at.name if at else "", orders[number % kinds], state)
            asks = client.on_time(load) if load.every else client.in_turn(load.concurrency)
            state.tasks.append(asyncio.create_task(asks))
        try:
            deadline = time.perf_counter() + limit_s
            while state.waiting:
                _check(state.tasks, time.perf_counter() > deadline, load)
                await asyncio.sleep(0.02)
            yield state
            _check(state.tasks, False, load)
        finally:
            for task in state.tasks:
                task.cancel()
            await asyncio.gather(*state.tasks, return_exceptions=True)


async def turn(
    targets: list[Target], load: Load, pool: list[Request], first: int, ramp_s: float, length_s: float, limit_s: float
) -> Window:
    """`steady`, measured after `ramp_s` more. Raises LoadFailed."""
    length_s = load.window(length_s)
    async with steady(targets, load, pool, first, limit_s) as state:
        begin = time.perf_counter() + ramp_s
        # A window ends with a first token; where requests are longer than it, at twice its length.
        while time.perf_counter() < begin + 2 * length_s:
            _check(state.tasks, False, load)
            await asyncio.sleep(0.02)
            if measured([each.at for each in state.firsts], begin, length_s)[1] is not None:
                break
    return window(state.events, state.firsts, state.itl, begin, length_s)


def window(
    events: list[Event], firsts: list[First], itl: list[tuple[float, float]], begin: float, length: float
) -> Window:
    """The figures of `measured`'s window. itl: (when, seconds). Raises LoadFailed where nothing came in it."""
    start, found = measured([each.at for each in firsts], begin, length)
    end = events[-1].at if found is None and events else found or start
    inside = [event for event in events if start < event.at <= end]
    if not inside:
        raise LoadFailed("no token came while it was measured")
    seconds, output = end - start, sum(event.output for event in inside)
    first = [each for each in firsts if start < each.at <= end]
    by: dict[str, list[float]] = {}
    for each in first:
        if each.where:
            by.setdefault(each.where, []).append(round(each.seconds, 5))
    return Window(
        seconds,
        (output + sum(event.input for event in inside)) / seconds,
        output / seconds,
        sum(event.input > 0 for event in inside),
        [round(each.seconds, 5) for each in first],
        [round(value, 6) for at, value in itl if start < at <= end],
        by,
    )


def _check(tasks: list[asyncio.Task[None]], late: bool, load: Load) -> None:
    for task in tasks:
        if task.done() and (error := task.exception()):
            raise LoadFailed(f"{load.name}: {type(error).__name__}: {error}"[:500])
    if late:
        raise LoadFailed(f"{load.name}: no token in time")


def _cycle(pool: list[Request], first: int) -> Iterator[Request]:
    while True:
        yield pool[first % len(pool)]
        first += 1


async def different(targets: list[Target], load: Load, pool: list[Request], limit_s: float) -> float:
    """How many different tokens the load's requests have after PROBE_TOKENS, by request: 1.0 where all differ.

    Requests that fall into the same tokens are sent to the same experts, which no real load does.
    """

    async def last(http: aiohttp.ClientSession, number: int) -> int:
        body: dict[str, Any] = json.loads(pool[number].body + b"}")
        del body["stream_options"]
        body.update(stream=False, max_tokens=PROBE_TOKENS, return_token_ids=True)
        async with http.post(f"{targets[number % len(targets)].url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise LoadFailed(f"status {answer.status}: {(await answer.text())[:300]}")
            return int((await answer.json())["choices"][0]["token_ids"][-1])

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=limit_s)) as http:
        found = await asyncio.gather(*(last(http, number) for number in range(load.concurrency)))
    return len(set(found)) / len(found)
