"""The load of the chaos check: what its clients ask, and whether the answers are plain vLLM's."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import ci.checks.chaos_positions  # noqa: F401 - where examples are found

from steady_load import STREAMED, TOKENS, Asked, Question, post  # isort: skip

#: How much less likely than plain vLLM's choice a token may be, in FP32: batches are others, and so are roundings.
TOLERANCE = 1e-3
_WORDS = ("no", "rank", "waits", "while", "experts", "travel", "from", "peer", "to", "peer", "and", "back")


class Truth(NamedTuple):
    """What plain vLLM answers: the token ids of a prompt, and those that follow it."""

    prompt: list[int]
    tokens: list[int]


def prompts(count: int, seed: int) -> list[str]:
    """Different ones, of 1 to 24 words."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(_WORDS, k=rng.randint(1, 24))) for i in range(count)]


def truth(url: str, prompt: str) -> Truth:
    """What plain vLLM at `url` says."""
    with post(url, {"prompt": prompt, "max_tokens": TOKENS}) as reply:
        choice = json.load(reply)["choices"][0]
    return Truth(choice["prompt_token_ids"], choice["token_ids"])


@dataclass(frozen=True)
class Drawn:
    """What a client asks, from a seed: one of the prompts, for 1 to TOKENS tokens."""

    asked: Sequence[str]
    seed: int

    def __call__(self, client: int) -> Iterator[Question]:
        rng = random.Random(f"{self.seed}-{client}")
        while True:
            count, streamed = rng.randint(1, TOKENS), not rng.randrange(STREAMED)
            yield Question(rng.choice(self.asked), streamed, count)


def differing(answers: Sequence[Asked], truths: dict[str, Truth]) -> list[Asked]:
    """Answers with tokens other than plain vLLM's, each once; of one that was cut off, those that came."""
    found = {}
    for answer in answers:
        if list(answer.tokens) != truths[answer.prompt].tokens[: len(answer.tokens)]:
            found[answer.prompt, answer.tokens] = answer
    return list(found.values())


def lag(url: str, answer: Asked, truths: dict[str, Truth]) -> float:
    """By how much, in logprob, a token is behind what plain vLLM at `url` would choose after those before it; the most."""
    prompt = truths[answer.prompt].prompt
    with post(url, {"prompt": [*prompt, *answer.tokens], "max_tokens": 1, "prompt_logprobs": 1}) as reply:
        entries = json.load(reply)["choices"][0]["prompt_logprobs"][len(prompt) :]
    behind = 0.0
    for token, entry in zip(answer.tokens, entries, strict=True):
        behind = max(behind, max(found["logprob"] for found in entry.values()) - entry[str(token)]["logprob"])
    return behind
