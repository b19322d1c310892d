"""The plan of a layer: which bytes a reader copies from which rank, in which order (pure).

Slabs and slots keep one block per tensor: the rows of the experts one after the other, a row being all bytes of one
expert. Experts that are consecutive both at the source and in the slot make one range, and a range is one copy unless it is
cut into slices. The copies of all peers take turns, beginning with the next rank, so that no two readers begin at the same
source.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import NamedTuple

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.placement import Placement

ALIGNMENT = 256


class TensorSpec(NamedTuple):
    """One per-expert tensor of a layer, for example w13_weight."""

    name: str
    row_bytes: int  # bytes of one expert
    fetched: bool = True  # in every forward, so that slots hold it too


@dataclass(frozen=True)
class Layout:
    """Where a slab or a slot has which expert: a block for each of `tensors`, in their order, with a row for each of
    `experts`, in theirs; every block on a multiple of `alignment` bytes."""

    tensors: tuple[TensorSpec, ...]
    experts: tuple[int, ...]
    alignment: int = ALIGNMENT

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            if tensor.row_bytes < 1:
                raise DwdpError(f"tensor {tensor.name} has rows of {tensor.row_bytes} bytes: leave empty tensors out")
        if not self.experts or self.alignment < 1:
            raise DwdpError(f"a layout of {len(self.experts)} rows, aligned to {self.alignment}: both must be >= 1")

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        ends = [0]
        for tensor in self.tensors:
            ends.append(ends[-1] + -(-len(self.experts) * tensor.row_bytes // self.alignment) * self.alignment)
        return tuple(ends)

    @cached_property
    def _blocks(self) -> dict[str, tuple[int, int]]:
        return {tensor.name: (begin, tensor.row_bytes) for tensor, begin in zip(self.tensors, self._ends, strict=False)}

    @cached_property
    def _rows(self) -> dict[int, int]:
        return {expert: row for row, expert in enumerate(self.experts)}

    def offset(self, tensor: str, expert: int) -> int:
        """Byte offset of the row of `expert` in the block of `tensor`; KeyError for what is not there."""
        begin, row_bytes = self._blocks[tensor]
        return begin + self._rows[expert] * row_bytes

    def begin(self, tensor: str) -> int:
        """Byte offset of the first row of `tensor`."""
        return self._blocks[tensor][0]

    @property
    def nbytes(self) -> int:
        """Total bytes, a multiple of the alignment."""
        return self._ends[-1]


@dataclass(frozen=True)
class LayerLayout:
    """One MoE layer in the memory of its group: the one place that says where bytes are. `tensors` are in slab order."""

    placement: Placement
    tensors: tuple[TensorSpec, ...]
    alignment: int = ALIGNMENT

    @cached_property
    def slabs(self) -> tuple[Layout, ...]:
        """[rank] -> its slab, with the experts of its share."""
        return tuple(Layout(self.tensors, share, self.alignment) for share in self.placement.shares)

    def slot(self, reader: int, split: bool = False) -> Layout:
        """A slot of `reader`: fetched tensors of all E experts (contiguous view), or of those that it lacks (split view)."""
        experts = self.placement.missing(reader) if split else tuple(range(self.placement.num_experts))
        return Layout(tuple(tensor for tensor in self.tensors if tensor.fetched), experts, self.alignment)


class Slice(NamedTuple):
    """One copy."""

    source: int  # rank within the group whose slab is read
    src_offset: int  # bytes into that slab
    dst_offset: int  # bytes into the slot
    nbytes: int


@dataclass(frozen=True)
class CopyPlan:
    """The copies that fill a slot with all E experts of a layer, or with those that the reader lacks.

    pulls: from peers, in issue order. local: from the reader's own slab (the merge copy), one
    per range; none in the split view. slot: the layout that dst_offset refers to.
    """

    reader: int
    slot: Layout
    pulls: tuple[Slice, ...]
    local: tuple[Slice, ...]

    @cached_property
    def pulled_bytes(self) -> int:
        """Bytes that come from peers."""
        return sum(item.nbytes for item in self.pulls)

    @cached_property
    def merged_bytes(self) -> int:
        """Bytes of the merge copy."""
        return sum(item.nbytes for item in self.local)


def build_plan(layout: LayerLayout, reader: int, slice_bytes: int | None, split: bool = False) -> CopyPlan:
    """Plan how rank `reader` fills a slot; split: with the experts it lacks only. slice_bytes: the most of one
    pull; None for whole ranges.

    Raises DwdpError for empty tensors or a slice_bytes below 1.
    """
    placement, slabs, slot = layout.placement, layout.slabs, layout.slot(reader, split)
    ranges: list[list[Slice]] = [[] for _ in slabs]
    for run in placement.runs(reader):
        if split and run.owner == reader:
            continue
        for name, row_bytes, _ in slot.tensors:
            begin, to = slabs[run.owner].offset(name, run.first), slot.offset(name, run.first)
            ranges[run.owner].append(Slice(run.owner, begin, to, run.length * row_bytes))
    return CopyPlan(reader, slot, take_turns(ranges, reader, slice_bytes), tuple(ranges[reader]))


def take_turns(ranges: Sequence[list[Slice]], reader: int, slice_bytes: int | None) -> tuple[Slice, ...]:
    """The pulls of `reader` in issue order. ranges: [rank] -> what is copied from it; its own are left out.

    Raises DwdpError for a slice_bytes below 1.
    """
    if slice_bytes is not None and slice_bytes < 1:
        raise DwdpError(f"slice_bytes is {slice_bytes}: it must be >= 1")
    peers = [(reader + step) % len(ranges) for step in range(1, len(ranges))]
    turns = zip_longest(*(_cut(ranges[peer], slice_bytes) for peer in peers))
    return tuple(item for turn in turns for item in turn if item is not None)


def _cut(ranges: list[Slice], slice_bytes: int | None) -> Iterator[Slice]:
    for whole in ranges:
        most = slice_bytes or whole.nbytes
        for done in range(0, whole.nbytes, most):
            yield Slice(whole.source, whole.src_offset + done, whole.dst_offset + done, min(most, whole.nbytes - done))
