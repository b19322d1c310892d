"""The load of the chaos check: clients that ask one after the other, and whether their answers are plain vLLM's."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

MODEL = "chaos"
MOST_TOKENS = 16
#: One request in so many streams.
STREAMED = 4
#: Of a request, with all that the router does for it.
LIMIT_S = 180.0
PAUSE_S = 0.05
#: How much less likely than plain vLLM's choice a token may be, in FP32: batches are others, and so are roundings.
TOLERANCE = 1e-3
_WORDS = ("no", "rank", "waits", "while", "experts", "travel", "from", "peer", "to", "peer", "and", "back")


class Answer(NamedTuple):
    """What came of a request: seconds of time.monotonic(), the tokens that came, and what went wrong or nothing."""

    began: float
    ended: float
    prompt: str
    streamed: bool
    tokens: tuple[int, ...]
    trouble: str = ""

    @property
    def cut(self) -> bool:
        """A stream that began and did not end."""
        return self.streamed and bool(self.trouble) and bool(self.tokens)


class Truth(NamedTuple):
    """What plain vLLM answers: the token ids of a prompt, and those that follow it."""

    prompt: list[int]
    tokens: list[int]


def prompts(count: int, seed: int) -> list[str]:
    """Different ones, of 1 to 24 words."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(_WORDS, k=rng.randint(1, 24))) for i in range(count)]


def post(url: str, body: dict[str, Any], limit_s: float = LIMIT_S) -> Any:
    """The reply, open."""
    words = {"model": MODEL, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **body}
    request = Request(f"{url}/v1/completions", json.dumps(words).encode(), {"Content-Type": "application/json"})
    return urlopen(request, timeout=limit_s)


def truth(url: str, prompt: str) -> Truth:
    """What plain vLLM at `url` says."""
    with post(url, {"prompt": prompt, "max_tokens": MOST_TOKENS}) as reply:
        choice = json.load(reply)["choices"][0]
    return Truth(choice["prompt_token_ids"], choice["token_ids"])


def complete(url: str, prompt: str, count: int, streamed: bool, limit_s: float = LIMIT_S) -> Answer:
    """One greedy completion of `count` tokens; never raises."""
    began, tokens, trouble = time.monotonic(), list[int](), ""
    try:
        with post(url, {"prompt": prompt, "max_tokens": count, "stream": streamed}, limit_s) as reply:
            parts = (json.loads(line[6:]) for line in reply if line.startswith(b"data: {"))
            for part in parts if streamed else [json.load(reply)]:
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
    return Answer(began, time.monotonic(), prompt, streamed, tuple(tokens), " ".join(trouble.split()))


class Load:
    """`clients` threads that ask `url` from a seed while it is entered; `answers` grows."""

    def __init__(self, url: str, asked: Sequence[str], clients: int, seed: int) -> None:
        self.answers: list[Answer] = []
        self._url, self._asked, self._seed = url, asked, seed
        self._over = threading.Event()
        # Daemons: an end that is wanted waits for no answer.
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        for thread in self._threads if kind is None else ():
            thread.join(LIMIT_S + 5)

    def _ask(self, client: int) -> None:
        rng = random.Random(f"{self._seed}-{client}")
        while not self._over.wait(PAUSE_S):
            count, streamed = rng.randint(1, MOST_TOKENS), not rng.randrange(STREAMED)
            self.answers.append(complete(self._url, rng.choice(self._asked), count, streamed))


def differing(answers: Sequence[Answer], truths: dict[str, Truth]) -> list[Answer]:
    """Answers with tokens other than plain vLLM's, each once; of one that was cut off, those that came."""
    found = {}
    for answer in answers:
        if list(answer.tokens) != truths[answer.prompt].tokens[: len(answer.tokens)]:
            found[answer.prompt, answer.tokens] = answer
    return list(found.values())


def lag(url: str, answer: Answer, truths: dict[str, Truth]) -> float:
    """By how much, in logprob, a token is behind what plain vLLM at `url` would choose after those before it; the most."""
    prompt = truths[answer.prompt].prompt
    with post(url, {"prompt": [*prompt, *answer.tokens], "max_tokens": 1, "prompt_logprobs": 1}) as reply:
        entries = json.load(reply)["choices"][0]["prompt_logprobs"][len(prompt) :]
    behind = 0.0
    for token, entry in zip(answer.tokens, entries, strict=True):
        behind = max(behind, max(found["logprob"] for found in entry.values()) - entry[str(token)]["logprob"])
    return behind
