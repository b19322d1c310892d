"""Steady load on one server or rank that may die: every answer and failure with its time, and what parts of it came to.

All times are those of time.monotonic(), in seconds.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from ci.bench.load import Request
from ci.bench.servers import Target

#: The rank that dies, of however many.
KILLED: Final = 1
#: After a failure, before the client asks again.
PAUSE_S: Final = 0.2


class Asked(NamedTuple):
    """A request. tokens: of input and output, where it was answered whole; trouble: why it was not, else ''."""

    began: float
    ended: float
    tokens: int
    trouble: str = ""


class Part(NamedTuple):
    """What ended in a part of a load. gap_s: the longest time without an answer that ended, or was still on, in it."""

    seconds: float
    answers: int
    tokens_per_s: float
    failed: int
    slowest_s: float
    gap_s: float


def part(asked: Sequence[Asked], begin: float, end: float) -> Part:
    """Figures of what ended after `begin` and up to `end`. A gap counts, whole, to the part in which it ends."""
    within = [each for each in asked if begin < each.ended <= end]
    whole = [each for each in within if not each.trouble]
    return Part(
        seconds=round(end - begin, 2),
        answers=len(whole),
        tokens_per_s=round(sum(each.tokens for each in whole) / (end - begin), 1),
        failed=len(within) - len(whole),
        slowest_s=round(max((each.ended - each.began for each in whole), default=0.0), 3),
        gap_s=round(longest_gap(asked, begin, end), 3),
    )


def longest_gap(asked: Sequence[Asked], begin: float, end: float) -> float:
    """See Part; an answer that comes after `end` ends a gap of a later part."""
    ends = sorted(each.ended for each in asked if not each.trouble and each.ended <= end)
    # Before the first answer of all nothing was there that could have stopped.
    first = min((each.began for each in asked), default=begin)
    pairs = itertools.pairwise([first, *ends, end])
    return max((late - early for early, late in pairs if late > begin), default=0.0)


def per_second(asked: Sequence[Asked], begin: float, end: float) -> list[int]:
    """Tokens of answers by whole second after `begin`."""
    found = [0] * int(end - begin)
    for each in asked:
        if not each.trouble and begin <= each.ended < begin + len(found):
            found[int(each.ended - begin)] += each.tokens
    return found


@dataclass
class Steady:
    """`clients` threads that each ask `target`, wait for the answer and ask again, while it is entered; `asked` grows.

    limit_s: for which a client waits for a byte of its answer.
    """

    target: Target
    pool: Sequence[Request]
    clients: int
    limit_s: float
    asked: list[Asked] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Steady:
        # Daemons: a signal waits for no answer.
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if kind is None:
            deadline = time.monotonic() + self.limit_s
            for thread in self._threads:
                thread.join(max(0.1, deadline - time.monotonic()))

    def troubles(self, begin: float = 0.0, end: float = float("inf")) -> list[str]:
        """What went wrong with requests that ended after `begin` and up to `end`, each once."""
        return sorted({each.trouble for each in self.asked if each.trouble and begin < each.ended <= end})

    def _run(self, client: int) -> None:
        place = urlsplit(self.target.url)
        with contextlib.closing(http.client.HTTPConnection(place.netloc, timeout=self.limit_s)) as connection:
            for number in itertools.count(client, self.clients):
                if self._over.is_set():
                    return
                request = self.pool[number % len(self.pool)]
                began, trouble = time.monotonic(), ""
                try:
                    self._ask(connection, request)
                except (OSError, http.client.HTTPException) as error:
                    trouble = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                tokens = 0 if trouble else request.input + request.output
                self.asked.append(Asked(began, time.monotonic(), tokens, trouble))
                if trouble:
                    connection.close()
                    self._over.wait(PAUSE_S)

    def _ask(self, connection: http.client.HTTPConnection, request: Request) -> None:
        """Raises OSError or HTTPException where it is not answered as it should be."""
        body = b'%s, "max_tokens": %d}' % (request.body, request.output)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json", **self.target.headers})
        reply = connection.getresponse()
        said = reply.read()
        if reply.status != 200:
            raise OSError(f"status {reply.status}: {said[:200].decode(errors='replace')}")
        # What comes is a stream of events, in which an error may be told too.
        whole = re.search(rb'"completion_tokens":\s*%d\b' % request.output, said)
        if whole is None or b"data: [DONE]" not in said:
            raise OSError(f"an answer that is not whole: {said[-200:].decode(errors='replace')}")
