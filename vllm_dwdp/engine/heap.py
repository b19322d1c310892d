"""Keeping the C heap from holding on to weights that were freed while loading on CPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

# mallopt(3) of glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
#: Where glibc's own sliding threshold ends on 64-bit machines.
_USUAL_BYTES = 32 << 20
_LOADING_BYTES = 128 << 10


@contextlib.contextmanager
def freed_memory_is_returned() -> Iterator[None]:
    """Have every large tensor that is freed inside go back to the system at once.

    glibc moves its mmap threshold up to the largest block ever freed, 32 MiB at most, after which originals of weights
    that were repacked or moved into slabs would stay in the heap. Does nothing with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LOADING_BYTES)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _USUAL_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _USUAL_BYTES)
