"""The copy plan, byte by byte."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dwdp.copy_plan import (
    CopyPlan,
    LayerLayout,
    Layout,
    Slice,
    TensorSpec,
    build_plan,
)
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.placement import place

row_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@st.composite
def cases(
    draw: st.DrawFn, views: tuple[bool, ...] = (False, True)
) -> tuple[LayerLayout, int, CopyPlan, int | None, bool]:
    num_ranks = draw(st.integers(2, 6))
    num_experts = draw(st.integers(max(num_ranks, 3), 20))
    share = draw(st.none() | st.integers(-(-num_experts // num_ranks), num_experts - 1))
    placement = place(num_experts, num_ranks, share)
    reader = draw(st.integers(0, num_ranks - 1))
    # Some are replicated: they lie in slabs, before, between or behind those that slots hold.
    rows = draw(row_sizes)
    fetched = draw(st.permutations([True, *[draw(st.booleans()) for _ in rows[1:]]]))
    specs = tuple(TensorSpec(f"t{i}", row, there) for i, (row, there) in enumerate(zip(rows, fetched, strict=True)))
    slice_bytes = draw(st.none() | st.integers(1, 100))
    split = draw(st.sampled_from(views))
    layout = LayerLayout(placement, specs, draw(st.sampled_from([1, 16, 256])))
    return layout, reader, build_plan(layout, reader, slice_bytes, split), slice_bytes, split


def row(layout: Layout, spec: TensorSpec, expert: int) -> slice:
    begin = layout.offset(spec.name, expert)
    return slice(begin, begin + spec.row_bytes)


@given(cases())
def test_the_slot_gets_every_byte_of_its_experts_once(case: tuple) -> None:  # type: ignore[type-arg]
    layout, reader, plan, slice_bytes, split = case
    placement, specs = layout.placement, layout.tensors
    slot_experts = plan.slot.experts
    assert slot_experts == (placement.missing(reader) if split else tuple(range(placement.num_experts)))
    assert plan.slot.tensors == tuple(spec for spec in specs if spec.fetched)
    rng = np.random.default_rng(0)
    weights = [rng.integers(1, 255, (placement.num_experts, spec.row_bytes), dtype=np.uint8) for spec in specs]
    slabs = []
    for share, own in zip(placement.shares, layout.slabs, strict=True):
        slab = np.zeros(own.nbytes, np.uint8)
        for spec, rows in zip(specs, weights, strict=True):
            for expert in share:
                assert not slab[row(own, spec, expert)].any()
                slab[row(own, spec, expert)] = rows[expert]
        slabs.append(slab)
    slot = np.zeros(plan.slot.nbytes, np.uint8)
    writes = np.zeros(plan.slot.nbytes, np.uint8)
    for item in (*plan.pulls, *plan.local):
        assert item.src_offset + item.nbytes <= slabs[item.source].size
        slot[item.dst_offset :][: item.nbytes] = slabs[item.source][item.src_offset :][: item.nbytes]
        writes[item.dst_offset :][: item.nbytes] += 1
    for spec, rows in zip(specs, weights, strict=True):
        for expert in slot_experts if spec.fetched else ():
            place_ = row(plan.slot, spec, expert)
            assert (slot[place_] == rows[expert]).all() and (writes[place_] == 1).all()
    row_bytes = sum(spec.row_bytes for spec in plan.slot.tensors)
    assert writes.sum() == row_bytes * len(slot_experts)
    assert plan.pulled_bytes == row_bytes * len(placement.missing(reader))
    assert plan.merged_bytes == (0 if split else row_bytes * len(placement.shares[reader]))
    assert all(item.source != reader and 0 < item.nbytes <= (slice_bytes or item.nbytes) for item in plan.pulls)
    assert all(item.source == reader for item in plan.local)


@given(cases())
def test_sources_are_balanced_and_interleaved(case: tuple) -> None:  # type: ignore[type-arg]
    layout, reader, plan, _, _ = case
    placement, row_bytes = layout.placement, sum(spec.row_bytes for spec in plan.slot.tensors)
    served: Counter[int] = Counter()
    for item in plan.pulls:
        served[item.source] += item.nbytes
    peers = [(reader + step) % placement.num_ranks for step in range(1, placement.num_ranks)]
    assert max(served[peer] for peer in peers) - min(served[peer] for peer in peers) <= row_bytes
    assert next(peer for peer in peers if served[peer]) == plan.pulls[0].source
    left = Counter(item.source for item in plan.pulls)
    done: Counter[int] = Counter()
    for item in plan.pulls:
        done[item.source] += 1
        left[item.source] -= 1
        for peer in peers:
            assert not left[peer] or max(done.values()) - done[peer] <= 1


def test_readers_begin_at_different_sources() -> None:
    layout = LayerLayout(place(16, 4), (TensorSpec("w", 1000),))
    plans = [build_plan(layout, reader, 500) for reader in range(4)]
    # Known mistake of others: all ranks visit peers in ascending order, so that all start on rank 0.
    assert [plan.pulls[0].source for plan in plans] == [1, 2, 3, 0]
    assert [item.source for item in plans[2].pulls[:4]] == [3, 0, 1, 3]


def test_an_example_in_full() -> None:
    layout = LayerLayout(place(3, 2), (TensorSpec("a", 300), TensorSpec("b", 10)))
    plan, peer = build_plan(layout, 0, 512), layout.slabs[1]
    assert (plan.slot.begin("a"), plan.slot.begin("b"), plan.slot.nbytes) == (0, 1024, 1280)
    assert (peer.begin("a"), peer.begin("b"), peer.nbytes) == (0, 768, 1024)
    assert plan.pulls == (Slice(1, 0, 300, 512), Slice(1, 512, 812, 88), Slice(1, 768, 1034, 20))
    assert plan.local == (Slice(0, 0, 0, 300), Slice(0, 512, 1024, 10))


def test_page_alignment() -> None:
    layout = Layout((TensorSpec("a", 4096), TensorSpec("b", 100)), (0, 1, 5), 4096)
    assert (layout.begin("a"), layout.begin("b"), layout.nbytes) == (0, 12288, 16384)
    assert (layout.offset("a", 5), layout.offset("b", 1)) == (8192, 12388)


@given(st.integers(2, 12), st.integers(12, 300), st.lists(st.integers(1 << 10, 64 << 20), min_size=1, max_size=4))
def test_without_a_size_every_range_is_one_copy(ranks: int, experts: int, rows: list[int]) -> None:
    specs = tuple(TensorSpec(str(i), nbytes) for i, nbytes in enumerate(rows))
    plan = build_plan(LayerLayout(place(experts, ranks), specs), 0, None, split=True)
    assert len(plan.pulls) == (len(place(experts, ranks).runs(0)) - 1) * len(rows)  # but the reader's own


def test_without_a_size_sources_still_take_turns() -> None:
    specs = (TensorSpec("w13", 6 << 20), TensorSpec("w2", 3 << 20))
    plan = build_plan(LayerLayout(place(64, 4), specs), 2, None, split=True)
    assert [item.source for item in plan.pulls] == [3, 0, 1] * 2
    assert [item.nbytes for item in plan.pulls] == [96 << 20] * 3 + [48 << 20] * 3


def test_refusals() -> None:
    placement = place(4, 2)
    with pytest.raises(DwdpError, match="tensor w has rows of 0 bytes"):
        build_plan(LayerLayout(placement, (TensorSpec("w", 0),)), 0, 4096)
    with pytest.raises(DwdpError, match="slice_bytes is 0"):
        build_plan(LayerLayout(placement, (TensorSpec("w", 1),)), 0, 0)
    with pytest.raises(DwdpError, match="0 rows"):
        Layout((TensorSpec("w", 1),), ())
