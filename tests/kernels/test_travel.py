"""A requester and its owners in one process: what travels, what comes back, and what is read directly where nothing does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from tests.kernels.travelling import LAST, LAYERS, asking
from vllm_dwdp.kernels.travel import (
    ANSWERED,
    ASKED,
    BACK_OFF,
    ENABLED,
    FIRST_SKIP,
    LATE,
    MOST_SKIP,
    OPEN,
    SENT,
    SKIP,
)


@pytest.mark.parametrize(
    ("model", "tokens", "layer"),
    [(0, 1, 1), (0, 3, 0), (0, 4, 1), (1, 3, 1), (1, 4, 0), (2, 3, 1)],
    ids=["one", "fewer-than-room", "full", "fp8", "fp8-full", "bias"],
)
def test_an_answer_in_time_is_what_direct_reads_give(model: int, tokens: int, layer: int) -> None:
    both = asking(model)
    assert both.forward(tokens, layer, between=both.serve)
    assert (both.of(SENT), both.of(ANSWERED), both.of(ASKED), both.of(LATE)) == (1, 1, 1, 0)


def test_rows_of_the_answer_are_used() -> None:
    both = asking()

    def wrong() -> None:
        both.serve()
        both.rows[1].fill_(3.0)

    assert not both.forward(4, between=wrong)


def test_tokens_that_pad_a_graph_go_nowhere() -> None:
    """vLLM routes them to -1; what lies in front of the table of owners may be anything."""
    both = asking()
    bounded = torch.ones(both.model.experts + 1, dtype=torch.int32)
    bounded[1:] = both.owners
    kept, both.owners = both.owners, bounded[1:]
    try:
        assert both.forward(4, between=both.serve, padded=2)
        ids = both.layout.part(both.mails[1], both.layout.ids_at, torch.int32, 4, both.model.top_k)
        assert both.of(ANSWERED) == 1 and (ids[2:] == both.model.experts).all()
        assert both.forward(4, seed=1, padded=2), "and without an answer"
    finally:
        both.owners = kept


def test_without_an_answer_experts_are_read_directly() -> None:
    both = asking()
    assert both.forward(3)
    assert (both.of(ANSWERED), both.of(ASKED), both.of(LATE), both.of(OPEN)) == (0, 1, 1, 0)


def test_nobody_is_asked_until_enabled() -> None:
    both = asking()
    both.state[ENABLED.value, 0] = 0
    both.only_ask(1)
    both.only_answer()
    both.only_wait(1)
    assert (both.of(SENT), both.of(ANSWERED), both.of(OPEN)) == (1, 1, 0), "what was on its way still counts"
    for _ in range(3):
        both.only_ask(1)
        both.only_wait(1)
    assert both.of(SENT) == 1


#: When an owner answers a forward's request, if it was asked.
IN_TIME, AFTER, NEVER, TWICE = range(4)


# A sequence is not simpler than another: nothing to shrink.
@settings(max_examples=5, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, LAYERS - 1), st.integers(0, 1), st.sampled_from(range(4))),
        min_size=3,
        max_size=5,
    )
)
def test_every_turn_of_answers_gives_what_direct_reads_give(turns: list[tuple[int, int, int, int]]) -> None:
    both = asking()
    both.state[BACK_OFF.value] = 1  # so that it is asked again within these few
    for tokens, layer, seed, when in turns:
        answers = {IN_TIME: 1, TWICE: 2}.get(when, 0)

        def between(answers: int = answers) -> None:
            # Only a bell that has rung since is served: the second time, and where nobody was asked, nothing is done.
            served = [both.serve() for _ in range(answers)]
            assert not any(served[1:])

        assert both.forward(tokens, layer, seed, between)
        if when == AFTER:
            both.serve()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from((IN_TIME, AFTER, NEVER))), min_size=2, max_size=12),
    st.sampled_from((0, LAST - 1)),
)
@example([(1, NEVER)] * 4, 0)
def test_a_request_is_followed_by_another_only_once_it_is_answered(turns: list[tuple[int, int]], number: int) -> None:
    """Also where numbers wrap. A mailbox, and memory of an answer, that is in use is left alone."""
    both = asking(number=number)
    both.state[BACK_OFF.value] = 1  # or being left alone would hide it
    asked = answered = 0
    for tokens, when in turns:
        open_before, mail, bell = asked > answered, both.mails[1].clone(), int(both.bells[1])
        assert not (open_before and both.of(OPEN))
        both.only_ask(tokens)
        if rung := int(both.bells[1]) != bell:
            assert not open_before, "asked again, without an answer"
            asked += 1
            now = (number + asked + (1 << 31)) % (1 << 32) - (1 << 31)
            assert divmod(int(both.bells[1]), 256) == (now, both.requester.bucket(tokens))
            assert both.mails[1].view(torch.int32)[:2].tolist() == [now, 0] and both.of(SENT) == now
        else:
            assert torch.equal(both.mails[1], mail)
        if when == IN_TIME:
            both.only_answer()
            answered = asked
        late = both.only_wait(tokens)
        assert both.of(ANSWERED) == (rung and when == IN_TIME)
        ids = both.problems[0].batch(tokens, 0).ids
        far = torch.where(both.owners[ids.long()] == 1, ids, both.model.experts)
        nothing = torch.full_like(ids, both.model.experts)
        assert torch.equal(late, nothing if both.of(ANSWERED) else far)
        if when == AFTER:
            both.only_answer()
            answered = asked
    assert (both.of(ASKED), both.of(LATE)) == (asked, both.of(LATE)) and both.of(LATE) <= asked
    # It answers again: so it is asked again, for as long as it does.
    both.only_answer()
    for _ in range(both.of(SKIP) + 1):
        both.only_wait(1)
    assert both.of(OPEN) == 1


def test_an_owner_that_was_late_is_left_alone_for_longer_each_time() -> None:
    both = asking()
    skipped = []
    for turn in range(5):
        if turn == 3:
            both.state[BACK_OFF.value] = MOST_SKIP // 2
        both.only_ask(1)
        both.only_wait(1)
        both.only_answer()
        left = 0
        while not both.of(OPEN):
            both.only_wait(1)
            left += 1
        skipped.append(left)
    assert skipped == [FIRST_SKIP, 2 * FIRST_SKIP, 4 * FIRST_SKIP, MOST_SKIP // 2, MOST_SKIP]
    assert both.of(BACK_OFF) == MOST_SKIP
    both.only_ask(1)
    both.only_answer()
    both.only_wait(1)
    assert (both.of(ANSWERED), both.of(BACK_OFF), both.of(OPEN)) == (1, FIRST_SKIP, 1)


def test_of_two_owners_the_one_that_answers_is_used() -> None:
    """And the experts of the other are read directly; then it alone is asked."""
    three = asking(others=2)
    assert three.owners.unique().tolist() == [0, 1, 2]
    assert three.forward(4, 1, between=lambda: three.serve(2))
    assert [three.of(ANSWERED, owner) for owner in (1, 2)] == [0, 1]
    assert [three.of(OPEN, owner) for owner in (1, 2)] == [0, 1]
    mails = [mail.clone() for mail in three.mails]

    def wrong() -> None:
        three.serve(2)
        three.rows[2].fill_(3.0)

    assert not three.forward(4, 1, seed=1, between=wrong), "rows of the one that answered were not used"
    assert [torch.equal(*pair) for pair in zip(three.mails, mails, strict=True)] == [True, True, False]
    three.rows[1].fill_(3.0)
    assert three.forward(4, seed=1, between=lambda: three.serve(2)), "rows of the silent one were used"


def test_nobody_is_told_of_routes_to_others() -> None:
    three = asking(others=2)
    three.only_ask(4)
    ids, top_k = three.problems[0].batch(4, 0).ids, three.model.top_k
    for owner in (1, 2):
        told = three.layout.part(three.mails[owner], three.layout.ids_at, torch.int32, 4, top_k)
        assert torch.equal(told, torch.where(three.owners[ids.long()] == owner, ids, three.model.experts))
