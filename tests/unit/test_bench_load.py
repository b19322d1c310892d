"""ci/bench/load.py: what a load is, and the requests that it asks for."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from ci.bench.load import Load, parse_load, place, requests


def test_a_load_is_read() -> None:
    assert parse_load("mixed=8192/128/16", 0.3) == Load("mixed", 8192, 128, 16, 0.3)
    assert parse_load("b=8192/1/16,spread=0.8,every=2.5,burst") == Load("b", 8192, 1, 16, 0.8, 2.5, True)
    assert parse_load("u=8192/1/16,every=2,uneven") == Load("u", 8192, 1, 16, 0.2, 2.0, False, True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        *(
            (text, "NAME=INPUT/OUTPUT/AT_A_TIME")
            for text in ("8192/128/16", "a=8192/128", "a=8192/0/16", "a=b/c/d", "")
        ),
        ("a=1/1/1,spread=1", "option 'spread=1'"),
        ("a=1/1/1,every=x", "option 'every=x'"),
        ("a=1/1/1,every=inf", "option 'every=inf'"),
        ("a=1/1/1,burst=1", "option 'burst=1'"),
        ("a=1/1/1,fast", "option 'fast'"),
        ("a=1/1/1,burst", "needs every"),
        ("a=1/1/12,uneven", "multiple of 8"),
    ],
)
def test_what_is_no_load_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        parse_load(text)
    assert "\n" not in str(caught.value)


def test_lengths_and_prompts_are_the_same_for_all_and_spread_as_asked() -> None:
    load = Load("decode", 100, 20, 4)
    made = requests(load, 512, 0.0)
    assert made == requests(load, 512, 0.0) and len(made) == 64
    assert {request.input for request in made} != {100} and all(80 <= request.input <= 120 for request in made)
    assert all(16 <= request.output <= 24 for request in made)
    assert all(request.input + request.output <= load.longest for request in made)
    body = json.loads(made[0].body + b"}")
    assert len(body["prompt"]) == made[0].input and max(body["prompt"]) < 512 and body["stream"]
    assert {request.input for request in requests(load._replace(spread=0.0), 512, 0.0)} == {100}
    wide = [request.input for request in requests(load._replace(spread=0.8), 512, 0.0)]
    assert min(wide) < 40 and max(wide) > 160


def test_of_an_uneven_load_every_other_prompt_is_short() -> None:
    made = requests(Load("uneven", 160, 1, 8, spread=0.0, uneven=True), 512, 0.0)
    assert [request.input for request in made] == [160, 10] * 32


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_one_rank_gets_three_of_four_long_prompts(ranks: int) -> None:
    places = [place(client, ranks) for client in range(48)]
    long, short = (Counter(at.rank for at in places if at.long == kind) for kind in (True, False))
    assert sum(long.values()) == 24 and long[0] == (24 if ranks == 1 else 18)
    assert max(short.values()) == min(short.values()) == 24 // ranks
    assert ranks == 1 or set(long) == set(range(ranks)), "the others share the rest"


def test_rounds_are_measured_whole() -> None:
    load = Load("timed", 10, 1, 4, every=2.0)
    assert [load.begins(client) for client in range(4)] == [0.0, 0.5, 1.0, 1.5]
    assert [load._replace(burst=True).begins(client) for client in range(4)] == [0.0] * 4
    assert (load.window(5.0), load.window(4.0), load._replace(every=0.0).window(5.0)) == (6.0, 4.0, 5.0)
