"""The in-place view: pages of several slabs in one range of addresses."""

import gc
from typing import Any

import pytest
import torch

from tests.unit.helpers import LIMIT_S, PAGE, dies_of_a_fault, slab_maps
from tests.unit.owner import owner
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport import inplace
from vllm_dwdp.transport.mapping import map_pages
from vllm_dwdp.transport.shm import ShmTransport, SlabRun


def test_pages_of_several_slabs_make_one_range(transport: ShmTransport) -> None:
    with owner((4 * PAGE, 7), (2 * PAGE, 8)) as other:
        own = transport.allocate_slab(3 * PAGE)
        own.tensor().fill_(9)
        first, second = (transport.map_peer(handle) for handle in other.handles)
        made = transport.map_runs(
            [
                SlabRun(own, PAGE, 0, 2 * PAGE),
                SlabRun(first, 3 * PAGE, 2 * PAGE, PAGE),
                SlabRun(second, 0, 3 * PAGE, PAGE + 10),
            ]
        )
        seen = made.tensor()
        assert made.nbytes == seen.numel() == 4 * PAGE + 10 and seen.data_ptr() == made.address
        own.tensor()[PAGE] = 1  # one memory, two addresses
        other.ask("set", 1, PAGE + 9, 2)
        for memory in (first, second):
            transport.unmap_peer(memory)
        own.close()
        other.process.kill()
        other.process.join(LIMIT_S)
        expected = torch.cat(
            [torch.full((n,), value, dtype=torch.uint8) for n, value in [(2 * PAGE, 9), (PAGE, 7), (PAGE + 10, 8)]]
        )
        expected[0], expected[-1] = 1, 2
        assert torch.equal(seen, expected)
        del seen
        made.close()
        made.close()


def test_an_in_place_range_is_read_only(transport: ShmTransport) -> None:
    handle = transport.export_handle(transport.allocate_slab(PAGE))
    code = (
        "t = ShmTransport()\nown = t.allocate_slab(4096)\npeer = t.map_peer(handles[0])\n"
        "made = t.map_runs([SlabRun(own, 0, 0, 4096), SlabRun(peer, 0, 4096, 4096)])\nprint('before', flush=True)\n"
    )
    for offset in (0, PAGE):
        assert dies_of_a_fault(code + f"ctypes.memset(made.address + {offset}, 1, 1)\nprint('after')", handle)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([], "without runs"),
        ([(0, 0, 100), (0, 100, 100)], "off the page size"),
        ([(10, 0, PAGE)], "off the page size"),
        ([(0, PAGE, PAGE)], f"offset {PAGE}, not 0"),
        ([(0, 0, PAGE), (0, 2 * PAGE, PAGE)], f"offset {2 * PAGE}, not {PAGE}"),
        ([(0, 0, 0)], "no bytes"),
        ([(PAGE, 0, 2 * PAGE)], f"ends at byte {3 * PAGE} of a slab of {2 * PAGE}"),
    ],
)
def test_runs_that_do_not_fit_are_refused(
    transport: ShmTransport, runs: list[tuple[int, int, int]], words: str
) -> None:
    slab = transport.allocate_slab(2 * PAGE)
    with pytest.raises(DwdpError, match=words):
        transport.map_runs([SlabRun(slab, *run) for run in runs])


def test_only_slabs_have_pages_to_share(transport: ShmTransport) -> None:
    with pytest.raises(DwdpError, match="in-place range of a ShmSlot"):
        transport.map_runs([SlabRun(transport.allocate_slot(PAGE), 0, 0, PAGE)])


def test_a_failing_map_leaves_nothing_mapped(transport: ShmTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    before = slab_maps()  # other tests of this process may have left some
    slab = transport.allocate_slab(2 * PAGE)
    mapped: list[int] = []

    def fail_at_the_second_run(*arguments: Any) -> int:
        if len(mapped) == 2:
            raise DwdpError("made to fail")
        mapped.append(map_pages(*arguments))
        return mapped[-1]

    monkeypatch.setattr(inplace, "map_pages", fail_at_the_second_run)
    failed = False
    try:
        transport.map_runs([SlabRun(slab, 0, 0, PAGE), SlabRun(slab, PAGE, PAGE, PAGE)])
    except DwdpError:
        failed = True
    gc.collect()
    assert failed and mapped[0] == mapped[1] and slab_maps() == before + 1
