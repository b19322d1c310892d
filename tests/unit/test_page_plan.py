"""Pages, pieces and copies of the composite view, played with bytes in plain arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_dwdp.copy_plan import ALIGNMENT, TensorSpec
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hot_placement import place_hot
from vllm_dwdp.page_plan import SLOT, PagedLayout, PagedMemory, TensorPages
from vllm_dwdp.placement import Placement, place

PAGE = 64
Bytes = NDArray[np.uint8]


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Partitions, overlapping shares, of which one wraps around, and scattered ones."""
    experts = draw(st.integers(2, 24))
    ranks = draw(st.integers(2, min(5, experts)))
    held = draw(st.none() | st.integers(-(-experts // ranks), experts - 1)) if experts > 2 else None
    if held is not None and draw(st.booleans()):
        return place_hot(experts, ranks, held, draw(st.lists(st.integers(0, 9), min_size=experts, max_size=experts)))
    return place(experts, ranks, held)


@st.composite
def layouts(draw: st.DrawFn) -> PagedLayout:
    """Rows below, at and above a page, on its multiples and off them; with a small tensor or without."""
    row = st.integers(1, 4 * PAGE) | st.sampled_from([PAGE // 2, PAGE, 3 * PAGE])
    tensors = [TensorSpec("w13", draw(row)), TensorSpec("w2", draw(row))]
    if draw(st.booleans()):
        tensors.append(TensorSpec("bias", draw(st.integers(1, 20)), fetched=False))
    return PagedLayout(draw(placements()), tuple(tensors), PAGE)


def whole(layout: PagedLayout, number: int) -> Bytes:
    """All pages of a tensor as everybody should see them; behind the last row they are zeros."""
    spec = layout.tensors[number]
    nbytes = layout.placement.num_experts * spec.row_bytes
    made = np.zeros(-(-nbytes // PAGE) * PAGE, np.uint8)
    made[:nbytes] = np.random.default_rng(number).integers(1, 256, nbytes, np.uint8)
    return made


def rows(layout: PagedLayout, number: int, first: int, length: int) -> Bytes:
    row = layout.tensors[number].row_bytes
    return whole(layout, number)[first * row : (first + length) * row]


def filled(layout: PagedLayout) -> list[Bytes]:
    """[rank] -> its slab: the rows of its share, then what it copies of others' shares while these are not on their slabs
    but in them already."""
    slabs = []
    for rank, slab in enumerate(layout.slabs):
        slabs.append(np.zeros(sum(slab.sizes), np.uint8))
        for run in layout.placement.runs(rank):
            if run.owner == rank:
                for number, spec in enumerate(layout.tensors):
                    begin = slab.offset(spec.name, run.first)
                    slabs[rank][begin : begin + run.length * spec.row_bytes] = rows(
                        layout, number, run.first, run.length
                    )
    before = [slab.copy() for slab in slabs]
    for rank, slab in enumerate(slabs):
        for item in layout.foreign(rank):
            assert item.source != rank
            copied = before[item.source][item.src_offset : item.src_offset + item.nbytes]
            assert copied.all(), "bytes that the owner has not loaded itself"
            slab[item.dst_offset : item.dst_offset + item.nbytes] = copied
    return slabs


def pieces(memory: PagedMemory, content: Bytes) -> list[Bytes]:
    return np.split(content, np.cumsum(memory.sizes)[:-1]) if memory.sizes else []


@settings(deadline=None)
@given(layouts(), st.none() | st.integers(1, 5 * PAGE))
def test_every_range_of_every_reader_is_the_tensor(layout: PagedLayout, slice_bytes: int | None) -> None:
    slabs = filled(layout)
    cut = [pieces(memory, slab) for memory, slab in zip(layout.slabs, slabs, strict=True)]
    for reader in range(layout.placement.num_ranks):
        slot = np.zeros(sum(layout.slots[reader].sizes), np.uint8)
        written = np.zeros(len(slot), int)
        for item in layout.pulls(reader, slice_bytes):
            assert item.source != reader and item.nbytes <= (slice_bytes or item.nbytes)
            to = slice(item.dst_offset, item.dst_offset + item.nbytes)
            slot[to] = slabs[item.source][item.src_offset : item.src_offset + item.nbytes]
            written[to] += 1
        assert (written == 1).all()
        in_slot = pieces(layout.slots[reader], slot)
        for number, spec in enumerate(layout.tensors):
            if not spec.fetched:
                continue
            for direct in (False, True):
                parts = layout.range_of(reader, spec.name, direct)
                seen = [in_slot[part.number] if part.owner == SLOT else cut[part.owner][part.number] for part in parts]
                assert np.array_equal(np.concatenate(seen), whole(layout, number))
                assert {part.owner for part in parts} <= ({*range(len(slabs))} if direct else {reader, SLOT})


@settings(deadline=None)
@given(layouts())
def test_pieces_are_whole_pages_and_in_each_range_once(layout: PagedLayout) -> None:
    for reader in range(layout.placement.num_ranks):
        own, slot = layout.slabs[reader], layout.slots[reader]
        assert all(size and size % PAGE == 0 for size in (*own.sizes, *slot.sizes))
        for direct in (False, True):
            parts = [part for name in layout.pages for part in layout.range_of(reader, name, direct)]
            assert len(set(parts)) == len(parts)
            assert [part.number for part in parts if part.owner == reader] == [*range(len(own.pieces))]
            assert direct or [part.number for part in parts if part.owner == SLOT] == [*range(len(slot.pieces))]


@settings(deadline=None)
@given(layouts())
def test_what_pages_cost(layout: PagedLayout) -> None:
    """Less than two pages beyond the share for each of its runs and tensors, and the small ones."""
    for rank, slab in enumerate(layout.slabs):
        runs = [run for run in layout.placement.runs(rank) if run.owner == rank]
        for name, pages in layout.pages.items():
            share = sum(run.length for run in runs) * pages.row_bytes
            beyond = len(pages.held[rank]) * PAGE - share
            assert 0 <= beyond < 2 * PAGE * len(runs)
            assert len(pages.held[rank]) == sum(piece.length for piece in slab.pieces if piece.tensor == name)
        small = sum(spec.row_bytes for spec in layout.tensors if not spec.fetched) * len(layout.placement.shares[rank])
        held = sum(len(pages.held[rank]) for pages in layout.pages.values())
        assert sum(slab.sizes) == held * PAGE + -(-small // ALIGNMENT) * ALIGNMENT


@pytest.mark.parametrize(("experts", "ranks", "held"), [(32, 4, None), (32, 4, 12), (64, 8, 16), (33, 3, 20)])
def test_sources_serve_equally_much(experts: int, ranks: int, held: int | None) -> None:
    """As with whole experts, to within the pages at either end of a run."""
    pages = TensorPages(place(experts, ranks, held), 5 * PAGE + 7, PAGE)
    for reader in range(ranks):
        counts = [0] * ranks
        for run in pages.runs(reader):
            counts[run.owner] += run.length if run.owner != reader else 0
        loads = pages.placement.loads(reader)
        assert all(abs(count - load * pages.row_bytes / PAGE) <= 2 for count, load in zip(counts, loads, strict=True))


def test_rows_on_pages_leave_nothing_beyond_the_share() -> None:
    layout = PagedLayout(place(8, 2), (TensorSpec("w13", 2 * PAGE), TensorSpec("w2", PAGE)), PAGE)
    assert [list(layout.foreign(rank)) for rank in range(2)] == [[], []]
    assert [slab.sizes for slab in layout.slabs] == [(8 * PAGE, 4 * PAGE)] * 2 == [slot.sizes for slot in layout.slots]


def test_a_page_with_all_rows_is_held_by_all() -> None:
    """Nothing is missing then; a larger tensor beside it is pulled as ever."""
    layout = PagedLayout(place(4, 2), (TensorSpec("w13", 3), TensorSpec("w2", PAGE + 1)), PAGE)
    assert [pages.missing(0) for pages in layout.pages.values()] == [[], [(3, 2)]]
    assert [slot.sizes for slot in layout.slots] == [(2 * PAGE,), (2 * PAGE,)]
    filled(layout)


def test_a_share_that_wraps_around_has_a_piece_at_either_end() -> None:
    """Rank 1 of two holds experts 2, 3, 4 and 0 of five: the last page and the first are its own."""
    pages = TensorPages(place(5, 2, 4), PAGE + 8, PAGE)
    assert pages.placement.shares[1] == (0, 2, 3, 4)
    assert sorted(pages.held[1]) == [0, 1, 2, 3, 4, 5] and pages.missing(1) == []
    wide = TensorPages(place(5, 2, 4), 3 * PAGE, PAGE)
    assert (
        wide.missing(1) == [(3, 3)]
        and wide.cut(1) == [(0, 3), (6, 6), (12, 3)]
        and wide.cut(0) == [(0, 3), (3, 3), (6, 6)]
    )


def test_what_is_not_there() -> None:
    layout = PagedLayout(place(8, 2), (TensorSpec("w13", PAGE),), PAGE)
    for slab, tensor, expert in ((0, "w13", 4), (1, "w13", 0), (0, "bias", 0)):
        with pytest.raises(KeyError):
            layout.slabs[slab].offset(tensor, expert)
    with pytest.raises(DwdpError, match="slice_bytes is 0"):
        layout.pulls(0, 0)
