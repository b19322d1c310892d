"""Steady load by plain HTTP: clients that each ask, wait for the answer and ask again; what came of every request."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

MODEL = "demo"
TOKENS = 16
#: One request in so many streams.
STREAMED = 4
#: Of a request, with all that a router does for it.
LIMIT_S = 180
PAUSE_S = 0.05


class Asked(NamedTuple):
    """A request: seconds of time.monotonic(), whether it streamed, ids of tokens that came, what went wrong or nothing."""

    began: float
    ended: float
    streamed: bool
    tokens: tuple[int, ...]
    trouble: str = ""
    prompt: str = ""

    @property
    def failed(self) -> bool:
        """It got no whole answer, and is no stream that began."""
        return bool(self.trouble) and not self.cut

    @property
    def cut(self) -> bool:
        """A stream that began and did not end."""
        return self.streamed and bool(self.trouble) and bool(self.tokens)


class Question(NamedTuple):
    """A request to come, for `count` tokens."""

    prompt: str
    streamed: bool
    count: int = TOKENS


class Span(NamedTuple):
    """Requests that ended within some time; answers are whole."""

    answers: int
    failed: int
    failed_streams: int
    cut: int
    slowest_s: float


def over(asked: Sequence[Asked], begin: float, end: float) -> Span:
    """What ended from `begin` on and before `end`."""
    within = [each for each in asked if begin <= each.ended < end]
    failed = [each.streamed for each in within if each.failed]
    return Span(
        answers=sum(not each.trouble for each in within),
        failed=failed.count(False),
        failed_streams=failed.count(True),
        cut=sum(each.cut for each in within),
        slowest_s=max((each.ended - each.began for each in within), default=0.0),
    )


def rates(asked: Sequence[Asked], begin: float, end: float, width_s: float = 5.0) -> list[tuple[float, float]]:
    """Answers per second around each whole second after `begin`, in windows of `width_s`; where a window is whole."""
    ends = [each.ended - begin for each in asked if not each.trouble]
    half, found = width_s / 2, []
    for second in range(int(end - begin) + 1):
        if half <= second <= end - begin - half:
            found.append((float(second), sum(second - half <= at < second + half for at in ends) / width_s))
    return found


def post(url: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    """The reply to a greedy completion, open."""
    words = {"model": MODEL, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **body}
    request = Request(f"{url}/v1/completions", json.dumps(words).encode(), {"Content-Type": "application/json"})
    return cast("http.client.HTTPResponse", urlopen(request, timeout=LIMIT_S))


def complete(url: str, prompt: str, streamed: bool = False, count: int = TOKENS) -> Asked:
    """One greedy completion of `count` tokens; never raises."""
    began, tokens, trouble = time.monotonic(), list[int](), ""
    try:
        with post(url, {"prompt": prompt, "max_tokens": count, "stream": streamed}) as reply:
            for part in _parts(reply) if streamed else [json.load(reply)]:
                if "choices" not in part:
                    trouble = str(part.get("error", part))
                    break
                tokens += part["choices"][0].get("token_ids") or ()
    except HTTPError as error:
        with error:
            trouble = f"{error}: {error.read(200).decode(errors='replace')}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        trouble = f"{type(error).__name__}: {error}"
    if len(tokens) != count and not trouble:
        trouble = f"ended after {len(tokens)} of {count} tokens"
    return Asked(began, time.monotonic(), streamed, tuple(tokens), " ".join(trouble.split()), prompt)


def _parts(reply: http.client.HTTPResponse) -> Iterator[dict]:
    """The events of a stream."""
    for line in reply:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def different(client: int) -> Iterator[Question]:
    """No two alike."""
    for number in itertools.count(client + 1):
        yield Question(f"{client} asks for the {number}th time", number % STREAMED == 0)


@dataclass
class Load:
    """`clients` threads that ask `url` while it is entered; `asked` grows. questions: what each asks, without end."""

    url: str
    clients: int = 6
    questions: Callable[[int], Iterator[Question]] = different
    asked: list[Asked] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        # Daemons: Ctrl-C waits for no answer.
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if kind is None:
            for thread in self._threads:
                thread.join(LIMIT_S + 5)

    def _ask(self, client: int) -> None:
        questions = self.questions(client)
        while not self._over.wait(PAUSE_S):
            self.asked.append(complete(self.url, *next(questions)))

    def troubles(self, streamed: bool) -> list[str]:
        """What went wrong, each once."""
        return sorted({each.trouble for each in self.asked if each.trouble and each.streamed == streamed})
