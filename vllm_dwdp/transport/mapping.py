"""Memory maps through libc: unlike Python's mmap they can be placed, and they live as long as the views of them."""

import ctypes
import errno
import mmap
import os
import weakref
from typing import TYPE_CHECKING, Protocol

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.base import Memory
from vllm_dwdp.transport.limits import why_no_map

if TYPE_CHECKING:
    import torch

PAGE = mmap.PAGESIZE

PROT_NONE = 0
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
MADV_HUGEPAGE = 14
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def round_up(nbytes: int, unit: int = PAGE) -> int:
    """`nbytes` rounded up to a multiple of `unit`."""
    return -(-nbytes // unit) * unit


def map_pages(address: int, nbytes: int, prot: int, flags: int, fd: int, offset: int, purpose: str) -> int:
    """mmap(2); returns the address. Raises DwdpError."""
    found = _libc.mmap(address or None, nbytes, prot, flags, fd, offset)
    if found is None or found == _FAILED:
        number = ctypes.get_errno()
        remedy = why_no_map(nbytes) if number == errno.ENOMEM else "check ulimit -l and the limits of this sandbox"
        raise DwdpError(f"mapping {nbytes} bytes for {purpose} failed ({os.strerror(number)}): {remedy}")
    return int(found)


class Mapping:
    """A mapped range; unmapped as a whole when this object and every tensor made from it are gone."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        # Not at exit: other threads may still read, and the kernel unmaps anyway.
        weakref.finalize(self, _libc.munmap, address, round_up(nbytes)).atexit = False

    def tensor(self) -> "torch.Tensor":
        """uint8 [nbytes] without a copy; it keeps this object alive."""
        import torch

        buffer = (ctypes.c_ubyte * self.nbytes).from_address(self.address)
        buffer.mapping = self  # type: ignore[attr-defined]
        # Made under inference mode it could not be written to outside of it.
        with torch.inference_mode(False):
            return torch.frombuffer(buffer, dtype=torch.uint8)


def map_file(fd: int, nbytes: int, prot: int, purpose: str) -> Mapping:
    """Map a whole shared file."""
    # MAP_POPULATE: fill the page tables now rather than fault by fault in the first forward.
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    return Mapping(map_pages(0, round_up(nbytes), prot, flags, fd, 0, purpose), nbytes)


def map_private(nbytes: int, purpose: str) -> Mapping:
    """Zeroed private memory, on huge pages where the host allows, all of it touched."""
    length = round_up(nbytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapping = Mapping(map_pages(0, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0, purpose), nbytes)
    _libc.madvise(mapping.address, length, MADV_HUGEPAGE)
    ctypes.memset(mapping.address, 0, length)
    return mapping


class Range(Protocol):
    """What `Mapping` is to others: memory of this process that goes when the last one lets go of it."""

    address: int
    nbytes: int

    def tensor(self) -> "torch.Tensor":
        """uint8 [nbytes] without a copy; it keeps the memory."""


class MappedMemory(Memory):
    """Memory behind a `Mapping`, or another range."""

    def __init__(self, mapping: Range) -> None:
        self._mapping: Range | None = mapping

    def _mapped(self) -> Range:
        if self._mapping is None:
            raise DwdpError(f"{type(self).__name__} was let go of: allocate or map it again")
        return self._mapping

    @property
    def address(self) -> int:
        """See Memory; raises DwdpError once let go of."""
        return self._mapped().address

    @property
    def nbytes(self) -> int:
        """See Memory; raises DwdpError once let go of."""
        return self._mapped().nbytes

    def tensor(self) -> "torch.Tensor":
        """See Memory; raises DwdpError once let go of."""
        return self._mapped().tensor()

    def close(self) -> None:
        """Let go of the mapping; idempotent."""
        self._mapping = None
