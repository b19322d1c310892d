"""The counter page: written by one process, read by others."""

import ctypes

import pytest

from tests.unit.helpers import PAGE, dies_of_a_fault
from tests.unit.owner import owner
from vllm_dwdp.errors import DwdpError, PeerLost
from vllm_dwdp.prefetch.counters import NUMBERS, CounterFields, CounterPage
from vllm_dwdp.transport.shm import ShmTransport


def test_readers_see_what_is_written(transport: ShmTransport) -> None:
    page = CounterPage.create(rank=3)
    page.describe("inplace", experts_held=32, slab_bytes=1 << 40, slot_bytes=0)
    reader = CounterPage.open(page.handle())
    page.fields.forwards += 1
    page.fields.exposed_wait_ns += 5_000_000_000
    seen = reader.snapshot()
    assert seen == page.snapshot()
    assert (seen.rank, seen.view, seen.experts_held, seen.slab_bytes) == (3, "inplace", 32, 1 << 40)
    assert (seen.forwards, seen.exposed_wait_ns, seen.on_demand_fetches) == (1, 5_000_000_000, 0)
    page.close()
    page.close()
    assert reader.snapshot().forwards == 1
    with pytest.raises(PeerLost):
        CounterPage.open(page.handle())
    reader.close()
    reader.close()
    with pytest.raises(DwdpError, match="closed"):
        reader.snapshot()


def test_fields_are_aligned_and_fit() -> None:
    names = [field[0] for field in CounterFields._fields_]
    assert names == list(CounterFields.__annotations__) and names[3:] == list(NUMBERS)
    assert ctypes.sizeof(CounterFields) == 8 * len(names) <= PAGE


def test_other_pages_are_refused() -> None:
    with owner((PAGE, 7)) as other, pytest.raises(DwdpError, match="magic 0x707070707070707"):
        CounterPage.open(other.handles[0])
    page = CounterPage.create()
    page.fields.version = 99
    with pytest.raises(DwdpError, match="version 99"):
        CounterPage.open(page.handle())
    with pytest.raises(DwdpError, match="view 'both'"):
        page.describe("both", 1, 1, 1)


def test_readers_cannot_write() -> None:
    page = CounterPage.create()
    code = (
        "from vllm_dwdp.prefetch.counters import CounterPage\nreader = CounterPage.open(handles[0])\n"
        "print('before', flush=True)\nctypes.memset(reader._mapping.address, 1, 1)\nprint('after')"
    )
    assert dies_of_a_fault(code, page.handle())
    assert page.snapshot().forwards == 0
