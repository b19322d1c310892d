"""Placement by popularity: who holds which expert, and that no reader's sources become unequal."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.checkpoints import CheckpointSpec, hot_experts
from tests.unit.test_placement import check_covered, sources
from vllm_dwdp.copy_plan import LayerLayout, TensorSpec, build_plan
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hot_placement import missing_hits, place_hot
from vllm_dwdp.placement import Placement, place


class Case(NamedTuple):
    """A group, a share and the hits of a layer."""

    experts: int
    ranks: int
    share: int
    hits: list[int]

    def placed(self) -> Placement:
        return place_hot(self.experts, self.ranks, self.share, self.hits)


@st.composite
def cases(draw: st.DrawFn, most_ranks: int = 9) -> Case:
    ranks = draw(st.integers(2, most_ranks))
    experts = draw(st.integers(max(3, ranks), 64))
    share = draw(st.integers(-(-experts // ranks), experts - 1))
    return Case(experts, ranks, share, draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)))


def missing(placement: Placement, hits: list[int]) -> int:
    return sum(missing_hits(placement, reader, hits) for reader in range(placement.num_ranks))


@settings(max_examples=300)
@given(cases())
def test_shares_are_exact_sources_equal_and_nothing_is_lost(case: Case) -> None:
    placed = case.placed()
    check_covered(placed)
    for rank, base in enumerate(place(case.experts, case.ranks).shares):
        assert set(base) <= set(placed.shares[rank])
        assert len(placed.shares[rank]) == case.share
        assert max(sources(placed, rank)) - min(sources(placed, rank)) <= 1


@settings(max_examples=300)
@given(cases())
def test_never_more_hits_are_missing_than_without(case: Case) -> None:
    assert missing(case.placed(), case.hits) <= missing(place(case.experts, case.ranks, case.share), case.hits)


@given(cases(most_ranks=2))
def test_two_ranks_lack_the_least_hit_experts_of_each_other(case: Case) -> None:
    placed = case.placed()
    for rank, base in enumerate(place(case.experts, 2).shares):
        others = sorted(case.hits[expert] for expert in range(case.experts) if expert not in base)
        assert missing_hits(placed, rank, case.hits) == sum(others[: case.experts - case.share])


def test_small_cases_miss_the_least_that_equal_sources_allow() -> None:
    """Against all ways to choose what a reader lacks."""
    for experts, ranks, share in ((7, 3, 4), (8, 4, 3), (9, 4, 4), (5, 3, 2)):
        hits = [(7 * expert * expert + 3) % 11 for expert in range(experts)]
        owner = place(experts, ranks).owners[0]
        placed = place_hot(experts, ranks, share, hits)
        best = 0
        for reader in range(ranks):
            others = [expert for expert in range(experts) if owner[expert] != reader]
            best += min(
                sum(hits[expert] for expert in lacking)
                for lacking in itertools.combinations(others, experts - share)
                if _equal([owner[expert] for expert in lacking], ranks, reader)
            )
        assert missing(placed, hits) <= best


def _equal(owners: list[int], ranks: int, reader: int) -> bool:
    counts = [owners.count(rank) for rank in range(ranks) if rank != reader]
    return max(counts) - min(counts) <= 1


def test_a_layer_that_nobody_hit_is_placed_as_without() -> None:
    assert place_hot(16, 2, 12, [0] * 16) == place(16, 2, 12)


def test_shares_that_no_group_can_have_are_refused() -> None:
    for share in (3, 8):
        with pytest.raises(DwdpError, match=f"experts_per_rank is {share}"):
            place_hot(8, 2, share, [1] * 8)


@settings(max_examples=30)
@given(st.integers(2, 4), st.integers(0, 2**16), st.floats(0, 4))
def test_tokens_of_a_skewed_router_read_what_was_predicted(ranks: int, seed: int, skew: float) -> None:
    """Forwards of one token each, which read every expert that they are sent to and lack."""
    experts, top_k, share = 32, 4, 20
    spec = CheckpointSpec(num_experts=experts, top_k=top_k, seed=seed, router_skew=skew)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(experts, 16, generator=generator)
    rows[list(hot_experts(spec, 0))] *= 1 + skew
    tokens = (torch.randn(400, 16, generator=generator) @ rows.T).topk(top_k).indices.tolist()
    hits = [sum(token.count(expert) for token in tokens) for expert in range(experts)]
    read = []
    for placed in (place(experts, ranks, share), place_hot(experts, ranks, share, hits)):
        held = [set(of_rank) for of_rank in placed.shares]
        reads = [sum(len(set(token) - held[rank]) for token in tokens) for rank in range(ranks)]
        assert reads == [missing_hits(placed, rank, hits) for rank in range(ranks)]
        read.append(sum(reads))
    assert read[1] <= read[0]


@pytest.mark.parametrize("split", [False, True])
@settings(max_examples=50)
@given(case=cases(most_ranks=4))
def test_plans_of_scattered_shares_put_every_byte_in_its_place(split: bool, case: Case) -> None:
    """Copies over two tensors of 3 and 2 bytes an expert, in slabs and a slot of real bytes."""
    specs = (TensorSpec("w13", 3), TensorSpec("w2", 2))
    layout = LayerLayout(case.placed(), specs, alignment=1)
    for reader in range(case.ranks):
        plan = build_plan(layout, reader, 4, split=split)
        slabs = [bytearray(slab.nbytes) for slab in layout.slabs]
        for slab, filled in zip(layout.slabs, slabs, strict=True):
            for spec in specs:
                for expert in slab.experts:
                    begin = slab.offset(spec.name, expert)
                    filled[begin : begin + spec.row_bytes] = bytes([expert + 1] * spec.row_bytes)
        slot = bytearray(plan.slot.nbytes)
        for item in (*plan.pulls, *plan.local):
            slot[item.dst_offset : item.dst_offset + item.nbytes] = slabs[item.source][item.src_offset :][: item.nbytes]
        for spec in specs:
            for expert in plan.slot.experts:
                begin = plan.slot.offset(spec.name, expert)
                assert set(slot[begin : begin + spec.row_bytes]) == {expert + 1}
