"""A requester and its owners in one process: what travels, what comes back, and what is read directly where nothing does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from vllm_dwdp.kernels.bench.shapes import BLOCK, TINY_MODELS, Problem
from vllm_dwdp.kernels.configs import layer_shape
from vllm_dwdp.kernels.direct_tiles import direct_tiles_for
from vllm_dwdp.kernels.mail import MailLayout
from vllm_dwdp.kernels.requester import Requester
from vllm_dwdp.kernels.served import Layers
from vllm_dwdp.kernels.split_moe import Workspace, split_experts
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
    answer_kernel,
)

CPU = torch.device("cpu")
LAYERS = 2
BUCKETS = (2, 4)
#: The last number before requests' numbers wrap.
LAST = (1 << 31) - 1


@dataclass
class Group:
    """A requester (rank 0) and owners (from 1 on), each of as many experts."""

    model: Any
    others: int = 1

    def __post_init__(self) -> None:
        self.problems = [Problem(self.model, CPU, torch.float16, seed=layer) for layer in range(LAYERS)]
        first = self.problems[0]
        self.tables = [(problem.tables[0], problem.tables[1]) for problem in self.problems]
        experts, top_k, hidden = self.model.experts, self.model.top_k, self.model.hidden
        quantized = self.model.quant == "block"
        groups, stored = (-(-hidden // BLOCK), torch.float8_e4m3fn) if quantized else (0, torch.float16)
        self.layout = MailLayout(max(BUCKETS), top_k, hidden, groups, stored, torch.float16)
        self.ranks = ranks = self.others + 1
        # As in a real mailbox, from the second request on, there is something else of before.
        self.mails = [torch.full((self.layout.mail_bytes,), 0x5A, dtype=torch.uint8) for _ in range(ranks)]
        for mail in self.mails:
            mail[:8] = 0
        self.rows = [torch.full((max(BUCKETS) * top_k, hidden), 7.0, dtype=torch.float16) for _ in range(ranks)]
        self.bells = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
        self.owners = (torch.arange(experts) * ranks // experts).to(torch.int32)

        def at(tensors: list[torch.Tensor]) -> torch.Tensor:
            return torch.tensor([0, *(tensor.data_ptr() for tensor in tensors[1:])], dtype=torch.int64)

        self.state = Requester.new_state(ranks, CPU)
        self.flags = torch.zeros(ranks, dtype=torch.int32)
        self.requester = Requester(
            0, ranks, self.layout, BUCKETS, self.state, self.flags, at(self.mails), at(self.bells), at(self.rows),
            torch.full((len(BUCKETS),), 1000, dtype=torch.int64),
        )  # fmt: skip
        self.served = Layers.of(self.tables)
        self.ops = first.ops()
        self.expected = cache(self._expected)

    def tiles(self, tokens: int) -> Any:
        shape = layer_shape(*self.tables[0], self.model.top_k)
        block = (BLOCK, BLOCK) if self.model.quant == "block" else None
        return direct_tiles_for(shape, BUCKETS[self.requester.bucket(tokens)], CPU, block)

    def serve(self, owner: int = 1) -> bool:
        """The owner's side; False where its bell has not rung."""
        number, bucket = divmod(int(self.bells[owner]), 256)
        if number == int(self.flags[owner]):
            return False
        room = BUCKETS[bucket]
        rows = self.rows[owner][: room * self.model.top_k]
        self.served.serve(
            self.mails[owner], self.layout, room, rows, self.flags[owner:], self.ops, self.tiles(room)
        )  # fmt: skip
        return True

    def _expected(self, tokens: int, layer: int, seed: int) -> torch.Tensor:
        batch = self.problems[layer].batch(tokens, seed)
        return split_experts(
            batch.hidden, *self.tables[layer], batch.weights, batch.ids, ops=self.ops, tiles=self.tiles(tokens)
        )

    def forward(
        self, tokens: int, layer: int = 0, seed: int = 0, between: Callable[[], Any] | None = None, padded: int = 0
    ) -> bool:
        """Whether the result is that of direct reads, bit for bit; `between`: called after asking and before waiting.

        padded: so many tokens at the end are none of a request: vLLM's routes of them are -1.
        """
        batch, tables, tiles = self.problems[layer].batch(tokens, seed), self.tables[layer], self.tiles(tokens)
        like, routes = batch.hidden, tokens * self.model.top_k
        expected, kept = self.expected(tokens, layer, seed), tokens - padded
        batch.ids[kept:] = -1
        room = Workspace.allocate(2 * routes, self.ops.width(tables[0].rows), *tables, like)
        room.gemm.fill_(float("nan"))
        hidden, scale = self.ops.quantize(batch.hidden, None)
        found = self.requester.experts(
            hidden, tables, batch.weights, batch.ids, layer=layer, owners=self.owners, a1_scale=scale,
            ops=_Between(self.ops, between or (lambda: None)), tiles=tiles, workspace=room, out=torch.empty_like(like),
        )  # fmt: skip
        # A row of padding counts where a scale is of all tokens.
        return torch.equal(found[:kept], expected[:kept]) and not found[kept:].any()

    def only_ask(self, tokens: int, layer: int = 0) -> None:
        batch = self.problems[layer].batch(tokens, 0)
        index = self.requester.bucket(tokens)
        own = torch.empty(BUCKETS[index], self.model.top_k, dtype=torch.int32)
        self.requester.ask(batch.hidden, batch.weights, batch.ids, own, self.owners, layer, BUCKETS[index], index)

    def only_wait(self, tokens: int) -> torch.Tensor:
        """The routes that nobody computes."""
        ids = self.problems[0].batch(tokens, 0).ids
        late = torch.empty_like(ids)
        self.requester.wait(ids, late, self.owners, self.requester.bucket(tokens))
        return late

    def only_answer(self, owner: int = 1) -> None:
        """Without the work."""
        answer_kernel[(1,)](self.mails[owner].view(torch.int32), self.flags[owner:])

    def of(self, row: Any, owner: int = 1) -> int:
        return int(self.state[row.value, owner])

    def reset(self, number: int = 0) -> None:
        """As after a start, or as after so many requests; owners are asked from the second forward on."""
        self.state.copy_(Requester.new_state(self.ranks, CPU))
        self.state[SENT.value] = number
        self.flags.fill_(number)
        for mail, bell in zip(self.mails, self.bells, strict=True):
            mail[:4] = torch.tensor([number], dtype=torch.int32).view(torch.uint8)
            bell.fill_(number * 256)
        self.state[ENABLED.value, 0] = 1


class _Between:
    """Calls something once, while the requester's own experts are computed."""

    def __init__(self, ops: Any, call: Callable[[], None]) -> None:
        self._ops, self._call = ops, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def activate_quantize(self, *args: Any) -> Any:
        call, self._call = self._call, lambda: None
        call()
        return self._ops.activate_quantize(*args)


@cache
def group(model: int = 0, others: int = 1) -> Group:
    return Group(TINY_MODELS[model], others)


def asking(model: int = 0, others: int = 1, number: int = 0) -> Group:
    """All owners are asked in the next forward."""
    made = group(model, others)
    made.reset(number)
    made.only_wait(1)
    assert all(made.of(OPEN, owner) == 1 for owner in range(1, made.ranks))
    return made


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
