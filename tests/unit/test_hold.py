"""`experts_per_rank: "auto"`: the largest share beside the KV cache that was asked for, and what is said about it."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hold import KV_PART, Held, MemoryFacts, choose
from vllm_dwdp.placement import check_share

#: 8 experts of 10 bytes in each of 5 layers, two slots, 2 bytes of KV cache a token.
FACTS = MemoryFacts(
    experts=8, ranks=2, layers=5, limit=1000, dense=80, peak=20, expert=50, slot_expert=20, slots_hold="missing",
    kv_token=2, kv_request=100,
)  # fmt: skip


@st.composite
def facts(draw: st.DrawFn) -> MemoryFacts:
    """Any that a model and a machine could have."""
    experts, layers = draw(st.integers(2, 300)), draw(st.integers(1, 80))
    one = draw(st.floats(1, 1e3))
    return MemoryFacts(
        experts=experts,
        ranks=draw(st.integers(2, experts)),
        layers=layers,
        limit=draw(st.floats(1, 2.0)) * experts * layers * one,
        dense=draw(st.floats(0, 0.5)) * experts * layers * one,
        peak=draw(st.floats(0, 0.2)) * experts * layers * one,
        expert=one * layers,
        slot_expert=one * min(layers, draw(st.integers(2, 6))),
        slots_hold=draw(st.sampled_from(["missing", "all", "nothing"])),
        kv_token=draw(st.floats(0.001, 10)),
        kv_request=draw(st.floats(0, 100)) * one,
        kv_asked=draw(st.none() | st.floats(0, 1).map(lambda part: part * experts * layers * one)),
    )


def held_by(given: MemoryFacts) -> Held:
    try:
        return choose(given)
    except DwdpError:
        assume(False)
        raise


@given(facts())
def test_the_largest_share_that_leaves_the_kv_cache_its_goal(given: MemoryFacts) -> None:
    held = held_by(given)
    check_share(given.experts, given.ranks, held.share)
    assert held.kv >= given.demand
    if held.share > given.least:
        assert held.kv >= given.goal and given.dense + held.share * given.expert * (1 + 1 / given.layers) <= given.limit
    if given.slots_hold == "nothing":
        assert (held.share, held.experts_per_rank) == (given.least, None)
    elif held.share < given.experts - 1:
        more = held.share + 1
        assert given.kv(more) < given.goal or not given.loads(more)
    parts = given.dense + given.peak + held.share * given.expert + given.slots(held.share) + held.kv
    assert parts == pytest.approx(given.limit)
    assert given.kv(held.share) - given.kv(held.share + 1) == pytest.approx(held.expert_cost, abs=1e-6 * given.limit)
    assert "\n" not in held.describe()


@given(facts(), st.floats(1, 2), st.floats(0, 1))
def test_more_memory_never_means_fewer_experts_and_more_kv_cache_never_more(
    given: MemoryFacts, larger: float, part: float
) -> None:
    share = held_by(given).share
    assert choose(replace(given, limit=given.limit * larger)).share >= share
    asked = replace(given, kv_asked=max(0.0, given.kv(share)))
    assert choose(replace(asked, kv_asked=asked.demand * part)).share >= held_by(asked).share


def test_an_exact_kv_cache_is_all_that_is_kept_back() -> None:
    # 900 for experts, slots and KV cache; an expert more takes 30 of it. Slots of 8 missing experts would take 160.
    assert [FACTS.kv(share) for share in (4, 5, 6, 7)] == [620, 590, 560, 530]
    for asked, share in ((0, 7), (530, 7), (531, 6), (620, 4)):
        assert choose(replace(FACTS, kv_asked=asked)).share == share
    contiguous = replace(FACTS, slots_hold="all", kv_asked=440)
    assert choose(contiguous).share == 6 and contiguous.kv(6) == 440


def test_without_one_at_least_two_fifths_of_what_is_left_go_to_it() -> None:
    tight = replace(FACTS, limit=500)  # 400 left, 160 for KV
    assert KV_PART == 0.4 and tight.goal == 160
    assert choose(tight).share == 4 and [tight.kv(share) for share in (4, 5)] == [120, 90]
    roomy = replace(FACTS, limit=650)
    assert roomy.goal == 220 and choose(roomy).share == 5 and roomy.kv(5) == 240
    # A longer request takes more.
    assert choose(replace(roomy, kv_request=250)).share == 4


def test_a_share_that_cannot_be_loaded_is_not_chosen() -> None:
    # One layer: while it moves it is there twice.
    one = MemoryFacts(
        experts=8, ranks=2, layers=1, limit=100, dense=0, peak=0, expert=10, slot_expert=0, slots_hold="missing",
        kv_token=1, kv_request=1, kv_asked=1,
    )  # fmt: skip
    assert [one.loads(share) for share in (5, 6)] == [True, False] and choose(one).share == 5


def test_the_line_says_what_was_chosen_and_what_an_expert_costs() -> None:
    gib = 2**30
    facts = MemoryFacts(
        experts=128, ranks=2, layers=48, limit=68 * gib, dense=3 * gib, peak=3 * gib, expert=0.45 * gib,
        slot_expert=0.02 * gib, slots_hold="missing", kv_token=96 * 1024, kv_request=gib,
    )  # fmt: skip
    held = choose(facts)
    assert held.describe() == (
        'experts_per_rank "auto": 80 of 128 experts; about 25.04 GiB left for the KV cache (273,503 tokens), the goal is '
        "24.80 GiB (40% of what dense weights and the estimated peak leave); one expert more costs, one less gives, "
        "4,696 tokens"
    )
    words = choose(replace(facts, kv_asked=5 * gib)).describe()
    assert "126 of 128" in words and "5.00 GiB (as asked for)" in words and "replicas" not in words
    words = choose(replace(facts, kv_asked=4 * gib)).describe()
    assert "127 of 128" in words and "all 128 would fit: full replicas" in words
    words = choose(replace(facts, limit=45 * gib)).describe()
    assert "64 of 128" in words and "less than the goal of 15.60 GiB" in words
    words = choose(replace(facts, kv_request=30 * gib)).describe()
    assert "30.00 GiB (one request of max_model_len)" in words
    words = choose(replace(facts, slots_hold="nothing")).describe()
    assert "64 of 128 experts, a partition, since in place nothing is pulled" in words
    figures = held.figures()
    assert figures["experts_per_rank"] == 80 and figures["kv_tokens_per_expert"] == pytest.approx(4696, abs=1)


def test_too_little_memory_is_one_line_with_the_numbers() -> None:
    gib = 2**30
    facts = MemoryFacts(
        experts=8, ranks=2, layers=5, limit=10 * gib, dense=2 * gib, peak=gib, expert=gib, slot_expert=0.4 * gib,
        slots_hold="missing", kv_token=1024, kv_request=2 * gib,
    )  # fmt: skip
    with pytest.raises(DwdpError) as caught:
        choose(facts)
    message = str(caught.value)
    assert "\n" not in message
    for words in (
        "of 10.00 GiB even 4 of 8 experts leave 1.40 GiB",
        "but 2.00 GiB is needed (one request",
        "2.00 GiB, the",
    ):
        assert words in message
    for words in ("the share 4.00 GiB", "slots 1.60 GiB", "about 1.00 GiB", "use more ranks"):
        assert words in message
    with pytest.raises(DwdpError, match=r"1\.50 GiB is needed \(as asked for\)"):
        choose(replace(facts, kv_asked=1.5 * gib))
    assert choose(replace(facts, kv_asked=gib)).share == 4


def test_a_kv_cache_below_nine_tenths_of_the_promise_is_told_with_both_figures() -> None:
    gib = 2**30
    held = choose(
        MemoryFacts(
            experts=64, ranks=2, layers=10, limit=100 * gib, dense=5 * gib, peak=5 * gib, expert=gib, slot_expert=0.2 * gib,
            slots_hold="missing", kv_token=1024, kv_request=gib,
        )
    )  # fmt: skip
    assert held.share == 51 and held.promised == 36 * gib
    assert held.shortfall(0.9 * 36 * gib) is None
    words = held.shortfall(32 * gib)
    assert words is not None and "\n" not in words
    # 4 GiB are missing, and an expert less gives 0.8.
    assert "profiling left 32.00 GiB" in words and "36.00 GiB were promised" in words and "experts_per_rank 46" in words
    # 4.5 are more than five experts give.
    assert "experts_per_rank 45" in str(held.shortfall(31.5 * gib))
    # The smallest share promised what it leaves, not what it could not.
    small = Held(replace(held.facts, limit=55 * gib), 32)
    assert small.promised == small.kv < small.facts.goal and small.shortfall(small.kv) is None
    words = small.shortfall(0)
    assert words is not None and "lower max_num_batched_tokens or use more ranks" in words
