"""Placement: who holds and who serves which expert."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.placement import Placement, boundary_shift, place

ranks = st.integers(2, 16)


@st.composite
def overlapping(draw: st.DrawFn) -> Placement:
    num_ranks = draw(ranks)
    num_experts = draw(st.integers(num_ranks, 96).filter(lambda n: n > 2))
    share = draw(st.integers(-(-num_experts // num_ranks), num_experts - 1))
    return place(num_experts, num_ranks, share)


def check_covered(placement: Placement) -> None:
    """Every reader takes every expert from a rank that holds it, itself where it can."""
    for reader, owners in enumerate(placement.owners):
        assert len(owners) == placement.num_experts
        for expert, owner in enumerate(owners):
            assert placement.shares[owner][placement.local(owner, expert)] == expert
            assert (owner == reader) == (expert in placement.shares[reader])
        assert list(placement.missing(reader)) == [e for e, owner in enumerate(owners) if owner != reader]
        runs = placement.runs(reader)
        assert sum(run.length for run in runs) == placement.num_experts
        for run in runs:
            for step in range(run.length):
                assert owners[run.first + step] == run.owner
                assert placement.local(run.owner, run.first + step) == run.local + step
    for share in placement.shares:
        assert list(share) == sorted(set(share))


def sources(placement: Placement, reader: int) -> list[int]:
    return [load for rank, load in enumerate(placement.loads(reader)) if rank != reader]


@given(ranks, st.integers(2, 96))
def test_partition_is_balanced(num_ranks: int, num_experts: int) -> None:
    if num_experts < num_ranks:
        with pytest.raises(DwdpError, match=f"{num_ranks} ranks cannot share {num_experts} experts"):
            place(num_experts, num_ranks)
        return
    placement = place(num_experts, num_ranks)
    check_covered(placement)
    assert [share[0] for share in placement.shares] == [r * num_experts // num_ranks for r in range(num_ranks)]
    assert sorted(e for share in placement.shares for e in share) == list(range(num_experts))
    assert {len(share) for share in placement.shares} <= {num_experts // num_ranks, -(-num_experts // num_ranks)}
    for reader in range(num_ranks):
        assert max(sources(placement, reader)) - min(sources(placement, reader)) <= 1


@given(overlapping())
def test_overlap_reads_all_sources_equally(placement: Placement) -> None:
    check_covered(placement)
    num_ranks, num_experts, share = placement.num_ranks, placement.num_experts, len(placement.shares[0])
    for rank, held in enumerate(placement.shares):
        start = rank * num_experts // num_ranks
        assert set(held) == {(start + step) % num_experts for step in range(share)}
    for reader in range(num_ranks):
        loads = sources(placement, reader)
        assert max(loads) - min(loads) <= 1
        # One run per source on the ring of experts, so at most one more where the ring is cut at E.
        remote = [run for run in placement.runs(reader) if run.owner != reader]
        assert len(remote) <= num_ranks
    totals = [sum(placement.loads(reader)[rank] for reader in range(num_ranks)) for rank in range(num_ranks)]
    assert max(totals) - min(totals) <= num_ranks - 1
    if share > -(-num_experts // num_ranks) or share * num_ranks == num_experts:
        assert set(totals) == {num_experts - share}


def test_every_small_case_is_equal_to_within_one_expert() -> None:
    for num_ranks in range(2, 9):
        for num_experts in range(num_ranks, 33):
            for share in range(-(-num_experts // num_ranks), num_experts):
                placement = place.__wrapped__(num_experts, num_ranks, share)
                for reader in range(num_ranks):
                    loads = sources(placement, reader)
                    assert max(loads) - min(loads) <= 1, (num_ranks, num_experts, share, reader)


@pytest.mark.parametrize(("num_ranks", "share"), [(4, 64), (3, 86), (5, 52), (7, 40)])
def test_deepseek_sizes_of_tensorrt_llm(num_ranks: int, share: int) -> None:
    check_covered(place(256, num_ranks, share))


def test_an_expert_of_several_holders_has_several_owners() -> None:
    # Known mistake of others: an overlapped expert always comes from its lowest owner.
    placement = place(256, 8, 64)
    several = 0
    for expert in range(256):
        remote = {owners[expert] for reader, owners in enumerate(placement.owners) if owners[expert] != reader}
        several += len(remote) > 1
    assert several > 128
    totals = [sum(placement.loads(reader)[rank] for reader in range(8)) for rank in range(8)]
    assert totals == [256 - 64] * 8


def test_explicit_equal_share_is_the_partition() -> None:
    assert place(64, 4, 16) == place(64, 4)


@settings(max_examples=200)
@given(ranks, st.integers(2, 96), st.integers(2, 9), st.none() | st.integers(1, 95))
def test_granularity(num_ranks: int, num_experts: int, granularity: int, share: int | None) -> None:
    try:
        placement = place(num_experts, num_ranks, share, granularity)
    except DwdpError as error:
        assert "\n" not in str(error)
        return
    check_covered(placement)
    assert all(placement.shares)
    for reader in range(num_ranks):
        for run in placement.runs(reader):
            end = run.first + run.length
            assert run.first % granularity == 0 and run.local % granularity == 0
            assert end % granularity == 0 or end == num_experts
    if share is None:
        assert boundary_shift(num_experts, num_ranks, granularity) < granularity


def test_boundary_shift() -> None:
    assert boundary_shift(64, 4, 16) == 0
    assert boundary_shift(63, 2, 2) == 1
    assert place(63, 2, granularity=2).shares[1][0] == 32
    assert boundary_shift(63, 2, 1) == 0
    assert boundary_shift(64, 2, 24) == 8
    assert [len(share) for share in place(7, 4, granularity=2).shares] == [2, 2, 2, 1]
    with pytest.raises(DwdpError, match="64 experts in blocks of 64 make 1 blocks for 2 ranks"):
        boundary_shift(64, 2, 64)
    with pytest.raises(DwdpError, match="granularity is 0"):
        place(64, 2, granularity=0)


def test_refusals() -> None:
    for num_experts, num_ranks, share, words in [
        (8, 1, None, "at least 2"),
        (8, 2, 3, "at least 4 each"),
        (8, 2, 8, "nothing is left to fetch"),
    ]:
        with pytest.raises(DwdpError, match=words):
            place(num_experts, num_ranks, share)
    with pytest.raises(DwdpError, match="in blocks of 4 all 8 experts"):
        place(8, 2, 5, granularity=4)


@pytest.mark.alone
def test_large_groups_take_less_than_a_second() -> None:
    begin = time.perf_counter()
    place.__wrapped__(512, 72, None)
    place.__wrapped__(512, 72, 100)
    assert time.perf_counter() - begin < 1
