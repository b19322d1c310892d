"""What a load of loads.py asks for: its requests, when they are sent, and to which rank."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from ci.bench.servers import SERVED

_SHAPE: Final = re.compile(r"([\w.-]+)=(\d+)/(\d+)/(\d+)((?:,[^,]+)*)")
#: How a load is written; docs/testing.md says what its options do.
SHAPE: Final = "NAME=INPUT/OUTPUT/AT_A_TIME[,spread=PART][,every=SECONDS[,burst]][,uneven]"
_HELP: Final = f"write {SHAPE}, such as decode8=512/128/8"
#: A long prompt of an uneven load has so many times the tokens of a short one.
_SHORTER: Final = 16


class Load(NamedTuple):
    """Requests of about `input` and `output` tokens, `concurrency` at a time.

    spread: lengths differ by this part of their mean. every: 0, where a client sends its next request when it has its
    answer; else all `concurrency` requests are sent once in so many seconds, whether answers came or not, evenly over that
    time or, `burst`, all at once. uneven: every other prompt is a sixteenth as long, and of the long ones rank 0 gets
    three of four.
    """

    name: str
    input: int
    output: int
    concurrency: int
    spread: float = 0.2
    every: float = 0.0
    burst: bool = False
    uneven: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest request that `requests` can make."""
        return round(self.input * (1 + self.spread)) + round(self.output * (1 + self.spread))

    def begins(self, client: int) -> float:
        """Seconds after the start at which a client sends its first request, where there is a time for each."""
        return 0.0 if self.burst else self.every * client / self.concurrency

    def window(self, seconds: float) -> float:
        """At least so long, and a whole number of rounds."""
        return math.ceil(seconds / self.every) * self.every if self.every else seconds

    def describe(self) -> str:
        """In few words, for pictures."""
        words = [f"{self.input} / {self.output}"]
        words.append(f"{self.concurrency} {f'every {self.every:g} s' if self.every else 'at a time'}")
        if self.spread > 0.5:
            words.append(f"±{self.spread:.0%}")
        return ", ".join(words + ["at once"] * self.burst + ["uneven"] * self.uneven)


class Request(NamedTuple):
    """body: JSON without its end and max_tokens. place: of an uneven load, where it goes."""

    body: bytes
    input: int
    output: int


class Place(NamedTuple):
    """Of a client of an uneven load: whether its prompts are long, and the rank that gets them."""

    long: bool
    rank: int

    @property
    def name(self) -> str:
        """As results and pictures call it."""
        return f"{'long' if self.long else 'short'}, {'rank 0' if self.rank == 0 else 'other ranks'}"


def parse_load(text: str, spread: float = 0.2) -> Load:
    """Reads what `_HELP` says; `spread` where the text names none. Raises ValueError in one line."""
    found = _SHAPE.fullmatch(text)
    if not found or not all(int(number) for number in found.groups()[1:4]):
        raise ValueError(f"load {text!r}: {_HELP}")
    load = Load(found[1], *map(int, found.groups()[1:4]), spread=spread)
    for option in filter(None, found[5].split(",")):
        name, _, value = option.partition("=")
        try:
            if name in ("burst", "uneven") and not value:
                load = load._replace(**{name: True})
            elif name in ("spread", "every") and 0 < float(value) < (1 if name == "spread" else math.inf):
                load = load._replace(**{name: float(value)})
            else:
                raise ValueError
        except ValueError:
            raise ValueError(f"load {text!r}, option {option!r}: {_HELP}") from None
    if load.burst and not load.every:
        raise ValueError(f"load {text!r}: a burst needs every=SECONDS")
    if load.uneven and load.concurrency % 8:
        raise ValueError(f"load {text!r}: an uneven load has a multiple of 8 requests at a time")
    return load


def parse_loads(texts: Iterable[str], spread: float) -> list[Load]:
    """With different names, as results go by them. Raises ValueError in one line."""
    loads = [parse_load(text, spread) for text in texts]
    names = [load.name for load in loads]
    if len(set(names)) < len(names):
        raise ValueError(f"loads {', '.join(names)}: give each its own name")
    return loads


def place(client: int, ranks: int) -> Place:
    """Of a client of an uneven load: every other one is long, three of four of these go to rank 0, short ones to all."""
    number = client // 2
    if client % 2:
        return Place(False, number % ranks)
    return Place(True, 0 if number % 4 < 3 or ranks == 1 else 1 + number // 4 % (ranks - 1))


def requests(load: Load, vocab: int, temperature: float) -> list[Request]:
    """The same for every system: random tokens, lengths evenly spread. Of an uneven load every other one is short."""
    rng = random.Random(load.name)

    def length(mean: int) -> int:
        return max(1, round(mean * rng.uniform(1 - load.spread, 1 + load.spread)))

    made = []
    for number in range(max(64, 3 * load.concurrency)):
        mean = load.input // _SHORTER if load.uneven and number % 2 else load.input
        prompt = rng.choices(range(8, vocab), k=length(mean))
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
