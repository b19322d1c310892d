"""The plan of a layer: which bytes a reader copies from which rank, in which order (pure).

Slabs and slots keep one block per tensor: the rows of the experts one after the other, a row being all bytes of one
expert. Experts that are consecutive both at the source and in the slot make one range; ranges are cut into slices, and
the slices of all peers interleave, beginning with the next rank, so that no two readers begin at the same source and, of
several, none is read in one long stretch (paper, time-division multiplexing; design, 'Rules of the data path').
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Final, NamedTuple

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.placement import Placement

ALIGNMENT = 256


class TensorSpec(NamedTuple):
    """One per-expert tensor of a layer, for example w13_weight."""

    name: str
    row_bytes: int  # bytes of one expert


@dataclass(frozen=True)
class _Layout:
    """Blocks of `rows` rows each, in the order of `tensors`, every block on a multiple of `alignment` bytes."""

    tensors: tuple[TensorSpec, ...]
    rows: int
    alignment: int = ALIGNMENT

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            if tensor.row_bytes < 1:
                raise DwdpError(f"tensor {tensor.name} has rows of {tensor.row_bytes} bytes: leave empty tensors out")
        if self.rows < 1 or self.alignment < 1:
            raise DwdpError(f"a layout of {self.rows} rows aligned to {self.alignment} bytes: both must be >= 1")

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        ends = [0]
        for tensor in self.tensors:
            ends.append(ends[-1] + -(-self.rows * tensor.row_bytes // self.alignment) * self.alignment)
        return tuple(ends)

    @property
    def offsets(self) -> tuple[int, ...]:
        """[tensor] -> byte offset of its first row."""
        return self._ends[:-1]

    @property
    def nbytes(self) -> int:
        """Total bytes, a multiple of the alignment."""
        return self._ends[-1]


#: Copies of a layer from several peers where no size is given, beside one more for the end of each range, and the size that
#: ranges are not cut below. Over NVLink (two H100s) a copy costs the device some 3 microseconds and the host 2, so that
#: 1 MiB at a time reaches 206 GB/s, 4 MiB 322 and 64 MiB 388 (ci/gpu_copy_calls.py).
SLICES: Final = 32
LEAST_SLICE_BYTES: Final = 4 << 20
_SLICE_MULTIPLE: Final = 1 << 20


def slice_bytes_for(pulled_bytes: int, num_sources: int) -> int:
    """Bytes of one slice of a layer: large, but several sources still take turns; one source is read whole."""
    if num_sources <= 1:
        return max(pulled_bytes, LEAST_SLICE_BYTES)
    share = -(-pulled_bytes // SLICES)
    return max(LEAST_SLICE_BYTES, -(-share // _SLICE_MULTIPLE) * _SLICE_MULTIPLE)


class SlabLayout(_Layout):
    """Offsets within the slab of a rank; rows: the experts it holds, in the order of its share."""


class SlotLayout(_Layout):
    """Offsets within a slot; rows: all E experts (contiguous view), or those that the reader lacks (split view), in the
    order of their ids."""


class Slice(NamedTuple):
    """One copy."""

    source: int  # rank within the group whose slab is read
    src_offset: int  # bytes into that slab
    dst_offset: int  # bytes into the slot
    nbytes: int


@dataclass(frozen=True)
class CopyPlan:
    """The copies that fill a slot with all E experts of a layer, or with those that the reader lacks.

    pulls: from peers, at most slice_bytes each, in issue order. local: from the reader's own slab (the merge copy), one
    per range; none in the split view. slot, slabs: the layouts that the offsets refer to; slabs is indexed by rank.
    """

    reader: int
    slot: SlotLayout
    slabs: tuple[SlabLayout, ...]
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


def slot_rows(placement: Placement, reader: int, split: bool) -> dict[int, int]:
    """Expert -> its row in a slot of `reader`; only experts that have one."""
    own = frozenset(placement.shares[reader]) if split else frozenset()
    lacking = (expert for expert in range(placement.num_experts) if expert not in own)
    return {expert: row for row, expert in enumerate(lacking)}


def build_plan(
    placement: Placement,
    reader: int,
    tensors: Sequence[TensorSpec],
    slice_bytes: int | None,
    alignment: int = ALIGNMENT,
    split: bool = False,
) -> CopyPlan:
    """Plan how rank `reader` fills a slot; split: with the experts it lacks only. slice_bytes: None for `slice_bytes_for`.

    Raises DwdpError for empty tensors or a slice_bytes below 1.
    """
    if slice_bytes is not None and slice_bytes < 1:
        raise DwdpError(f"slice_bytes is {slice_bytes}: it must be >= 1")
    specs = tuple(tensors)
    rows = slot_rows(placement, reader, split)
    slot = SlotLayout(specs, len(rows), alignment)
    slabs = tuple(SlabLayout(specs, len(share), alignment) for share in placement.shares)
    ranges: list[list[Slice]] = [[] for _ in slabs]
    for run in placement.runs(reader):
        if split and run.owner == reader:
            continue
        for spec, src, dst in zip(specs, slabs[run.owner].offsets, slot.offsets, strict=True):
            row = spec.row_bytes
            first = rows[run.first]
            ranges[run.owner].append(Slice(run.owner, src + run.local * row, dst + first * row, run.length * row))
    peers = [(reader + step) % placement.num_ranks for step in range(1, placement.num_ranks)]
    if slice_bytes is None:
        pulled = [sum(whole.nbytes for whole in ranges[peer]) for peer in peers]
        slice_bytes = slice_bytes_for(sum(pulled), sum(nbytes > 0 for nbytes in pulled))
    turns = zip_longest(*(_cut(ranges[peer], slice_bytes) for peer in peers))
    pulls = tuple(item for turn in turns for item in turn if item is not None)
    return CopyPlan(reader, slot, slabs, pulls, tuple(ranges[reader]))


def _cut(ranges: list[Slice], slice_bytes: int) -> Iterator[Slice]:
    for whole in ranges:
        for done in range(0, whole.nbytes, slice_bytes):
            yield Slice(
                whole.source, whole.src_offset + done, whole.dst_offset + done, min(slice_bytes, whole.nbytes - done)
            )
