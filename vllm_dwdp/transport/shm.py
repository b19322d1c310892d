"""Shared memory: slabs are memory files of one host, peers map them read-only, one thread per rank copies.

limits.py    what may still be allocated      mapping.py   libc mmap and the life of views
memfd.py     memory files and their handles   inplace.py   pages of several slabs in one range
shm_copy.py  the copy thread
"""

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.base import Handle, Memory, PeerSlab, Slab, Slot
from vllm_dwdp.transport.inplace import InPlaceRange, PageRun, map_runs
from vllm_dwdp.transport.limits import require_memory
from vllm_dwdp.transport.live import LiveTransport
from vllm_dwdp.transport.mapping import MappedMemory, Mapping, map_private
from vllm_dwdp.transport.memfd import TRANSPORT, MemoryFile, create_file, keep_file, map_handle, open_file
from vllm_dwdp.transport.shm_copy import ShmCopyEngine


class ShmSlab(MappedMemory, Slab):
    """A memory file of this process, or one that it adopted."""

    def __init__(self, file: MemoryFile) -> None:
        super().__init__(file.mapping)
        self.handle = file.handle
        self._file = file

    def close(self) -> None:
        """See MappedMemory; withdraws the handle."""
        super().close()
        self._file.close()


class ShmPeerSlab(MappedMemory, PeerSlab):
    """A peer's memory file, mapped read-only. `handle`: the peer's, or this process's where it keeps the file open."""

    def __init__(self, mapping: Mapping, handle: Handle, forget: Callable[[], None] = lambda: None) -> None:
        super().__init__(mapping)
        self.handle = handle
        self._forget = forget

    def forget(self) -> None:
        """See PeerSlab."""
        self._forget()


class ShmSlot(MappedMemory, Slot):
    """Private memory."""


class SlabRun(NamedTuple):
    """Bytes of a slab, the own one or a peer's, at an offset of an in-place range."""

    slab: Memory
    src_offset: int
    dst_offset: int
    nbytes: int


class ShmTransport(LiveTransport):
    """The shm transport of one rank; see Transport."""

    name = TRANSPORT

    def __init__(self, timeout_s: float = 300.0, copy_cores: Collection[int] = (), keep_files: bool = False) -> None:
        """timeout_s: limit of a copy's wait for the release of its slot. copy_cores: see ShmCopyEngine's cores.
        keep_files: keep peers' files open until `close`, so that others can have them when their owners are gone.
        """
        super().__init__()
        self._keep_files = keep_files
        self._kept: list[int] = []
        self._timeout_s = timeout_s
        self._copy_cores = tuple(copy_cores)

    def allocate_slab(self, nbytes: int) -> ShmSlab:
        """See Transport."""
        return self._keep(ShmSlab(create_file(nbytes, "a slab")))

    def export_handle(self, slab: Slab) -> Handle:
        """See Transport."""
        return self._checked(slab, ShmSlab).handle

    def adopt_slab(self, file: MemoryFile) -> ShmSlab:
        """A slab that a process which is gone has filled: the same memory, read-only. The transport closes `file`."""
        return self._keep(ShmSlab(file))

    def map_peer(self, handle: Handle) -> ShmPeerSlab:
        """See Transport; raises DwdpError for a slab of another host, PID namespace or user."""
        if not self._keep_files:
            return self._keep(ShmPeerSlab(map_handle(handle, "a peer's slab"), handle))
        file = keep_file(handle, "a peer's slab")
        # The mapping goes with the slab, the descriptor does not.
        self._kept.append(file.fd)
        return self._keep(ShmPeerSlab(file.mapping, file.handle, partial(self._forget, file.fd)))

    def allocate_slot(self, nbytes: int) -> ShmSlot:
        """See Transport."""
        if nbytes < 1:
            raise DwdpError(f"a slot of {nbytes} bytes: it must have at least one")
        require_memory(nbytes, "a slot")
        return self._keep(ShmSlot(map_private(nbytes, "a slot")))

    def map_runs(self, runs: Sequence[SlabRun]) -> InPlaceRange:
        """Make one read-only range of addresses of pages of slabs; rules and errors as `inplace.map_runs`.

        The owners must still be there, since their memory files are opened once more; the range then outlives them, and
        the mappings of the slabs.
        """
        with ExitStack() as opened:
            fds: dict[Memory, int] = {}
            for slab in dict.fromkeys(run.slab for run in runs):
                if not isinstance(slab, ShmSlab | ShmPeerSlab):
                    raise DwdpError(f"an in-place range of a {type(slab).__name__}: it is made of slabs of shm only")
                fds[slab] = open_file(slab.handle)
                opened.callback(os.close, fds[slab])
            made = map_runs([PageRun(fds[run.slab], run.src_offset, run.dst_offset, run.nbytes) for run in runs])
        return self._keep(made)

    def copy_engine(self) -> ShmCopyEngine:
        """See Transport."""
        return ShmCopyEngine(self._timeout_s, self._copy_cores)

    def close(self) -> None:
        """See Transport."""
        super().close()
        while self._kept:
            os.close(self._kept.pop())

    def _forget(self, fd: int) -> None:
        if fd in self._kept:
            self._kept.remove(fd)
            os.close(fd)
