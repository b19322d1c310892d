"""Which pages of a layer's tensors a rank holds, and from whom it has the others (pure).

A tensor [E, row_bytes] lies in a range of pages, the unit in which a device maps memory (2 MiB on GPUs). A rank holds every
page that a row of its share touches. What lies on the outermost of them and is not of the share it copies from the owners
once, at start: then a page is read from one rank, whatever the size of a row, and no boundary has to be moved.

A device maps whole allocations only. So a slab is cut into pieces, each an allocation, wherever a run of pages of any reader
begins or ends, its own included; a slot has a piece for each row of missing pages. Every range of a tensor's pages, of own
ones and a slot's, or of own ones and peers', is then a row of whole pieces.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Final, NamedTuple

from vllm_dwdp.copy_plan import Layout, Slice, TensorSpec, take_turns
from vllm_dwdp.placement import Placement

#: In place of a rank: the slot.
SLOT: Final = -1


class PageRun(NamedTuple):
    """Consecutive pages of a tensor that a reader has from one rank."""

    owner: int  # rank within the group; the reader itself for those it holds
    first: int
    length: int


class Piece(NamedTuple):
    """Consecutive pages of a tensor that are one allocation."""

    tensor: str
    first: int
    length: int


class PieceOf(NamedTuple):
    """A piece of a rank's slab of the layer, or of the reader's slot (SLOT), by its number there."""

    owner: int
    number: int


@dataclass(frozen=True)
class TensorPages:
    """One tensor [E, row_bytes] on all ranks of a group, in pages of `page` bytes."""

    placement: Placement
    row_bytes: int
    page: int

    @cached_property
    def count(self) -> int:
        """Pages of all E rows; the last may be filled in part."""
        return -(-self.placement.num_experts * self.row_bytes // self.page)

    def touched(self, first: int, length: int) -> range:
        """Pages on which bytes of `length` > 0 rows are, from expert `first` on."""
        end = (first + length) * self.row_bytes
        return range(first * self.row_bytes // self.page, -(-end // self.page))

    @cached_property
    def held(self) -> tuple[frozenset[int], ...]:
        """[rank] -> pages that it holds."""
        return tuple(
            frozenset(
                page
                for run in self.placement.runs(rank)
                if run.owner == rank
                for page in self.touched(run.first, run.length)
            )
            for rank in range(self.placement.num_ranks)
        )

    def runs(self, reader: int) -> tuple[PageRun, ...]:
        """All pages as `reader` has them, in order: its own, and each other from the rank from which it takes the expert of
        the page's first byte, and which therefore holds the page."""
        return self._runs[reader]

    @cached_property
    def _runs(self) -> tuple[tuple[PageRun, ...], ...]:
        found = []
        for reader, owners in enumerate(self.placement.owners):
            sources = (
                reader if page in self.held[reader] else owners[page * self.page // self.row_bytes]
                for page in range(self.count)
            )
            runs, first = [], 0
            for owner, pages in groupby(sources):
                runs.append(PageRun(owner, first, sum(1 for _ in pages)))
                first += runs[-1].length
            found.append(tuple(runs))
        return tuple(found)

    def cut(self, rank: int) -> list[tuple[int, int]]:
        """(first, length) of each piece in which `rank` holds its pages, ascending."""
        cuts = {
            edge
            for reader in range(self.placement.num_ranks)
            for run in self.runs(reader)
            if run.owner == rank
            for edge in (run.first, run.first + run.length)
        }
        return _rows(self.held[rank], cuts)

    def missing(self, reader: int) -> list[tuple[int, int]]:
        """(first, length) of each row of pages that `reader` does not hold, ascending."""
        return _rows(set(range(self.count)) - self.held[reader], set())


def _rows(pages: set[int] | frozenset[int], cuts: set[int]) -> list[tuple[int, int]]:
    """`pages` as rows of consecutive ones, which end before each of `cuts`."""
    rows: list[tuple[int, int]] = []
    for page in sorted(pages):
        if rows and page not in cuts and sum(rows[-1]) == page:
            rows[-1] = (rows[-1][0], rows[-1][1] + 1)
        else:
            rows.append((page, 1))
    return rows


@dataclass(frozen=True)
class PagedMemory:
    """A slab or a slot: `pieces` next to each other.

    row_bytes: by tensor. small: rows that follow the pieces, in one of their own.
    """

    pieces: tuple[Piece, ...]
    page: int
    row_bytes: Mapping[str, int]
    small: Layout | None = None

    @cached_property
    def _numbers(self) -> dict[tuple[str, int], int]:
        return {(piece.tensor, piece.first): number for number, piece in enumerate(self.pieces)}

    @cached_property
    def _offsets(self) -> dict[tuple[str, int], int]:
        pages = ((piece.tensor, piece.first + i) for piece in self.pieces for i in range(piece.length))
        return {at: number * self.page for number, at in enumerate(pages)}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each piece."""
        small = () if self.small is None else (-(-self.small.nbytes // self.page) * self.page,)
        return (*(piece.length * self.page for piece in self.pieces), *small)

    def number(self, tensor: str, first: int) -> int | None:
        """Of the piece that begins with page `first` of `tensor`; None where none does."""
        return self._numbers.get((tensor, first))

    def at(self, tensor: str, byte: int) -> int:
        """Byte offset of byte `byte` of all E rows of `tensor`; KeyError for one whose page is not here."""
        return self._offsets[tensor, byte // self.page] + byte % self.page

    def offset(self, tensor: str, expert: int) -> int:
        """Byte offset of the row of an expert of the share, behind which lie those of the next ids in it.

        KeyError for what is not there.
        """
        if tensor in self.row_bytes:
            return self.at(tensor, expert * self.row_bytes[tensor])
        if self.small is None:
            raise KeyError(tensor)
        return len(self._offsets) * self.page + self.small.offset(tensor, expert)


@dataclass(frozen=True)
class PagedLayout:
    """One MoE layer in the memory of its group where slabs and slots are made of pages: what `LayerLayout` is elsewhere."""

    placement: Placement
    tensors: tuple[TensorSpec, ...]
    page: int

    @cached_property
    def pages(self) -> dict[str, TensorPages]:
        """Those tensors that forwards fetch."""
        fetched = (tensor for tensor in self.tensors if tensor.fetched)
        return {tensor.name: TensorPages(self.placement, tensor.row_bytes, self.page) for tensor in fetched}

    @cached_property
    def slabs(self) -> tuple[PagedMemory, ...]:
        """[rank] -> its slab."""
        small = tuple(tensor for tensor in self.tensors if not tensor.fetched)
        return tuple(
            self._memory(
                {name: pages.cut(rank) for name, pages in self.pages.items()}, Layout(small, share) if small else None
            )
            for rank, share in enumerate(self.placement.shares)
        )

    @cached_property
    def slots(self) -> tuple[PagedMemory, ...]:
        """[reader] -> a slot of it, with the pages that it lacks; of no pieces where there are none."""
        ranks = range(self.placement.num_ranks)
        return tuple(
            self._memory({name: pages.missing(rank) for name, pages in self.pages.items()}, None) for rank in ranks
        )

    def _memory(self, rows: Mapping[str, list[tuple[int, int]]], small: Layout | None) -> PagedMemory:
        pieces = tuple(Piece(name, *row) for name, of_tensor in rows.items() for row in of_tensor)
        return PagedMemory(pieces, self.page, {name: pages.row_bytes for name, pages in self.pages.items()}, small)

    def range_of(self, reader: int, tensor: str, direct: bool) -> tuple[PieceOf, ...]:
        """The pieces that make all pages of `tensor`, in order: own and the slot's, or, `direct`, own and peers'."""
        parts = []
        for owner, first, length in self.pages[tensor].runs(reader):
            source = owner if direct or owner == reader else SLOT
            memory = self.slots[reader] if source == SLOT else self.slabs[source]
            # Several runs may lie in one piece of the slot, which begins with the first of them.
            numbers = (memory.number(tensor, page) for page in range(first, first + length))
            parts += [PieceOf(source, number) for number in numbers if number is not None]
        return tuple(parts)

    def pulls(self, reader: int, slice_bytes: int | None) -> tuple[Slice, ...]:
        """The copies that fill a slot, in issue order. slice_bytes: the most of one copy; None for whole runs of pages."""
        slot = self.slots[reader]
        ranges: list[list[Slice]] = [[] for _ in self.slabs]
        for name, pages in self.pages.items():
            for owner, first, length in pages.runs(reader):
                if owner != reader:
                    begin = first * self.page
                    source, to = self.slabs[owner].at(name, begin), slot.at(name, begin)
                    ranges[owner].append(Slice(owner, source, to, length * self.page))
        return take_turns(ranges, reader, slice_bytes)

    def foreign(self, rank: int) -> Iterator[Slice]:
        """What `rank` copies once into its slab: bytes on its pages that are not of its share, from their owners."""
        for name, pages in self.pages.items():
            for run in self.placement.runs(rank):
                if run.owner == rank:
                    continue
                touched = pages.touched(run.first, run.length)
                begin, end = run.first * pages.row_bytes, (run.first + run.length) * pages.row_bytes
                # Pages of the share reach into no more of a run than its first page and its last.
                for page in sorted({touched[0], touched[-1]} & pages.held[rank]):
                    low, high = max(begin, page * self.page), min(end, (page + 1) * self.page)
                    to, source = self.slabs[rank].at(name, low), self.slabs[run.owner].at(name, low)
                    yield Slice(run.owner, source, to, high - low)
