"""The requests of a soak: short completions of every kind that a service sees, from a seed, and their client."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import aiohttp

Kind = Literal["whole", "stream", "abort", "refused"]

#: Of 100 requests.
_ABORTED, _REFUSED, _STREAMED, _PINNED, _LONG = 3, 2, 25, 10, 20
_WORDS = ("no", "rank", "waits", "while", "experts", "travel", "from", "peer", "to", "peer", "and", "back")


class Ask(NamedTuple):
    """One request. pin: a number that chooses a rank, None for the load balancer's choice."""

    kind: Kind
    body: dict[str, Any]
    pin: int | None


@dataclass
class Outcome:
    """How many requests of each kind went as they should, and the first words of those that did not."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def asks(count: int, model: str, max_model_len: int, seed: int = 0, long: int = 0) -> list[Ask]:
    """The same requests for every server. long: a fifth of the prompts has up to so many words."""
    rng = random.Random(seed)
    bad: list[dict[str, Any]] = [
        {"max_tokens": -1},
        {"prompt": [7] * (max_model_len + 1)},
        {"temperature": "warm"},
        {"n": 0},
    ]
    made = []
    for _ in range(count):
        draw = rng.randrange(100)
        most = long if long and rng.randrange(100) < _LONG else 24
        words = " ".join(rng.choices(_WORDS, k=rng.randint(1, most)))
        body: dict[str, Any] = {"model": model, "prompt": words, "max_tokens": rng.randint(1, 8), "ignore_eos": True}
        body["temperature"] = rng.choice([0, 0, 0.8])
        kind: Kind = "whole"
        if draw < _ABORTED:
            kind, body = "abort", {**body, "max_tokens": max_model_len // 2, "stream": True}
        elif draw < _ABORTED + _REFUSED:
            kind, body = "refused", {**body, **rng.choice(bad)}
        elif draw < _ABORTED + _REFUSED + _STREAMED:
            kind, body = "stream", {**body, "stream": True}
        made.append(Ask(kind, body, rng.randrange(64) if rng.randrange(100) < _PINNED else None))
    return made


async def send(url: str, wanted: list[Ask], ranks: int, concurrency: int, limit_s: float, outcome: Outcome) -> int:
    """Send `wanted`, `concurrency` at a time, over connections of their own; returns how many were sent in time.

    ranks: of the server, for pins; 1 sends none. A request that takes a minute counts as wrong.
    """
    clock = asyncio.get_running_loop().time
    end = clock() + limit_s
    waiting = iter(wanted)
    sent = 0
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:

        async def client() -> None:
            nonlocal sent
            for ask in waiting:
                if clock() > end:
                    return
                sent += 1
                try:
                    trouble = await _one(session, url, ask, ranks)
                except (aiohttp.ClientError, TimeoutError) as error:
                    trouble = f"{type(error).__name__}: {error}"
                if trouble is None:
                    outcome.done[ask.kind] += 1
                else:
                    outcome.wrong.append(f"{ask.kind}: {trouble[:200]}")

        await asyncio.gather(*(client() for _ in range(concurrency)))
    return sent


async def _one(session: aiohttp.ClientSession, url: str, ask: Ask, ranks: int) -> str | None:
    """What went wrong with one request; None where it went as it should."""
    headers = {} if ask.pin is None or ranks == 1 else {"X-data-parallel-rank": str(ask.pin % ranks)}
    async with session.post(f"{url}/v1/completions", json=ask.body, headers=headers) as answer:
        if ask.kind == "abort":
            # The first piece, then the connection is closed: the server has to notice, and to stop computing.
            first = await answer.content.readline()
            answer.close()
            return None if first.startswith(b"data:") else f"status {answer.status}, {first!r}"
        if ask.kind == "refused":
            text = await answer.text()
            return None if answer.status == 400 else f"status {answer.status} for what should be refused: {text}"
        if answer.status != 200:
            return f"status {answer.status}: {await answer.text()}"
        if ask.kind == "stream":
            text = await answer.text()
            return None if text.rstrip().endswith("data: [DONE]") else f"a stream that ends with {text[-80:]!r}"
        made = (await answer.json())["usage"]["completion_tokens"]
        return None if made == ask.body["max_tokens"] else f"{made} of {ask.body['max_tokens']} tokens"
