"""The counter page: what a rank tells about itself, in memory that other processes of the host can read at any time.

One worker writes, with plain stores into its own page; readers map the page read-only, as peers map slabs. Every field
is eight aligned bytes, so that a reader never sees half a number; fields of one snapshot may be some stores apart.
"""

import ctypes
from dataclasses import asdict, dataclass, fields
from typing import Final

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.mapping import PAGE, Mapping
from vllm_dwdp.transport.memfd import MemoryFile, create_file, map_handle

MAGIC: Final = 0x44574450_50414745  # 'DWDPPAGE'
VERSION: Final = 7
VIEWS: Final = ("none", "split", "contiguous", "inplace", "composite")  # a view's code is its position
_HEADER: Final = ("magic", "version", "view_code")


@dataclass(frozen=True)
class Counters:
    """A snapshot. Bytes and counts since the worker started; times in nanoseconds."""

    rank: int
    view: str  # one of VIEWS
    experts_held: int  # of one layer
    slab_bytes: int  # all slabs
    slot_bytes: int  # all slots
    peers_alive: int  # other ranks of the group that are there
    forwards: int  # of the target model, both ways
    direct_forwards: int  # those that read missing experts where they are
    direct_bytes: int  # read from peers by kernels, as expected where every expert is hit as often
    travel_forwards: int  # those whose tokens travel to the owners of missing experts
    travel_requests: int  # to owners, one for each layer; this and the next two may be some forwards old
    travel_late: int  # those that were not answered in time: experts were read directly
    travel_served: int  # requests of other ranks that this one answered
    layers: int  # acquired
    pulls: int  # submitted
    pulled_bytes: int  # from peers
    merged_bytes: int  # of the merge copy
    slot_waits: int  # acquires that had to wait for a copy
    exposed_wait_ns: int  # time they waited
    on_demand_fetches: int  # acquires of a layer that was not in its slot nor on its way
    kernels_compiled_after_start: int  # of the split view, each by a forward that waited for it

    def to_dict(self) -> dict[str, int | str]:
        """By field name."""
        return asdict(self)


NUMBERS: Final = tuple(field.name for field in fields(Counters) if field.name != "view")


class CounterFields(ctypes.Structure):
    """The fields as they lie in the page; the worker adds to them in place."""

    magic: int
    version: int
    view_code: int
    rank: int
    experts_held: int
    slab_bytes: int
    slot_bytes: int
    peers_alive: int
    forwards: int
    direct_forwards: int
    direct_bytes: int
    travel_forwards: int
    travel_requests: int
    travel_late: int
    travel_served: int
    layers: int
    pulls: int
    pulled_bytes: int
    merged_bytes: int
    slot_waits: int
    exposed_wait_ns: int
    on_demand_fetches: int
    kernels_compiled_after_start: int

    _fields_ = [(name, ctypes.c_int64) for name in (*_HEADER, *NUMBERS)]


class CounterReader:
    """A mapped counter page of any rank of this host."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping: Mapping | None = mapping

    def snapshot(self) -> Counters:
        """The counters now; also after the worker has gone. Raises DwdpError once closed."""
        if self._mapping is None:
            raise DwdpError("this counter page was closed: open it again")
        page = CounterFields.from_buffer_copy(ctypes.string_at(self._mapping.address, ctypes.sizeof(CounterFields)))
        return Counters(view=VIEWS[page.view_code], **{name: getattr(page, name) for name in NUMBERS})

    def close(self) -> None:
        """Unmap; idempotent."""
        self._mapping = None


class CounterPage(CounterReader):
    """The page of this worker."""

    def __init__(self, file: MemoryFile, rank: int) -> None:
        super().__init__(file.mapping)
        self._file = file
        self.fields = CounterFields.from_address(file.mapping.address)
        self.fields.mapping = file.mapping  # stores must never meet an unmapped page
        self.fields.magic, self.fields.version, self.fields.rank = MAGIC, VERSION, rank

    @classmethod
    def create(cls, rank: int = 0, peers: int = 0) -> "CounterPage":
        """A zeroed page for `rank`, which has so many peers; raises DwdpError where there is no memory."""
        page = cls(create_file(PAGE, "a counter page"), rank)
        page.fields.peers_alive = peers
        return page

    @staticmethod
    def open(handle: Handle) -> CounterReader:
        """Map the page of another worker. Raises PeerLost where it is gone, DwdpError where it is no counter page."""
        mapping = map_handle(handle, "a counter page")
        found = CounterFields.from_buffer_copy(ctypes.string_at(mapping.address, ctypes.sizeof(CounterFields)))
        if (found.magic, found.version) != (MAGIC, VERSION):
            raise DwdpError(
                f"a counter page has magic {found.magic:#x} and version {found.version}, not {MAGIC:#x} and {VERSION}: "
                "install the same vllm-dwdp for all ranks"
            )
        return CounterReader(mapping)

    def handle(self) -> Handle:
        """For readers; valid until `close`."""
        return self._file.handle

    def describe(self, view: str, experts_held: int, slab_bytes: int, slot_bytes: int) -> None:
        """Publish what stays fixed after set-up; raises DwdpError for an unknown view."""
        if view not in VIEWS:
            raise DwdpError(f"view {view!r} has no code: it must be one of {', '.join(VIEWS)}")
        page = self.fields
        page.view_code, page.experts_held = VIEWS.index(view), experts_held
        page.slab_bytes, page.slot_bytes = slab_bytes, slot_bytes

    def close(self) -> None:
        """Withdraw the handle; readers keep what they have mapped. Idempotent."""
        super().close()
        self._file.close()
