"""One contiguous range of addresses made of pages of several slabs: the in-place view, without any copy."""

import mmap
import os
from collections.abc import Sequence
from typing import NamedTuple

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.mapping import (
    MAP_FIXED,
    MAP_NORESERVE,
    PAGE,
    PROT_NONE,
    MappedMemory,
    Mapping,
    map_pages,
    round_up,
)


class PageRun(NamedTuple):
    """Consecutive bytes of a file and where they go; offsets are multiples of the page size, and so is nbytes except in
    the last run."""

    fd: int
    file_offset: int
    dst_offset: int
    nbytes: int


class InPlaceRange(MappedMemory):
    """A read-only range over pages of several slabs; it needs neither the slabs' own mappings nor their descriptors."""


def map_runs(runs: Sequence[PageRun]) -> InPlaceRange:
    """Map `runs`, which follow each other without gaps from offset 0, into one new range of addresses, read-only.

    Raises DwdpError for offsets off the page size, gaps, runs beyond the end of their file, and failing maps; nothing
    stays mapped then.
    """
    nbytes = _check_runs(runs)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    reserved = Mapping(map_pages(0, round_up(nbytes), PROT_NONE, flags, -1, 0, "an in-place range"), nbytes)
    for run in runs:
        map_pages(
            reserved.address + run.dst_offset,
            round_up(run.nbytes),
            mmap.PROT_READ,
            mmap.MAP_SHARED | mmap.MAP_POPULATE | MAP_FIXED,
            run.fd,
            run.file_offset,
            "a run of an in-place range",
        )
    return InPlaceRange(reserved)


def _check_runs(runs: Sequence[PageRun]) -> int:
    """The bytes of all runs; raises DwdpError as `map_runs` says."""
    end = 0
    for number, run in enumerate(runs):
        last = number == len(runs) - 1
        if run.file_offset % PAGE or run.dst_offset % PAGE or (run.nbytes % PAGE and not last):
            raise DwdpError(
                f"run {number} of an in-place range (file offset {run.file_offset}, offset {run.dst_offset}, "
                f"{run.nbytes} bytes) is off the page size {PAGE}: place with a granularity that fills pages, "
                "or use the contiguous view"
            )
        if run.dst_offset != end or run.nbytes < 1:
            raise DwdpError(
                f"run {number} of an in-place range has offset {run.dst_offset}, not {end}, or no bytes: fix it"
            )
        size = os.fstat(run.fd).st_size
        if run.file_offset + run.nbytes > size:
            raise DwdpError(
                f"run {number} of an in-place range ends at byte {run.file_offset + run.nbytes} of a slab of {size}: "
                "the ranks disagree on the layout; check that all load the same model"
            )
        end += run.nbytes
    if not end:
        raise DwdpError("an in-place range without runs: give it at least one")
    return end
