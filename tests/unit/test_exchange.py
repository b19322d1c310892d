"""Where mailboxes, answers, flags and bells lie, and how two ranks map each other's, on simulated CUDA."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.cuda_pair import KINDS
from tests.unit.cuda_rank import process_id, transport_of
from tests.unit.fake_cuda import Machine
from tests.unit.helpers import descriptors, slab_maps
from vllm_dwdp.errors import DwdpError, PeerLost
from vllm_dwdp.kernels.mail import MailLayout
from vllm_dwdp.travel.exchange import Exchange, Places

PLACES = Places(2, 1024, 512)


def apart(ranges: list[tuple[int, int]], end: int) -> bool:
    """Whether (begin, nbytes) neither overlap nor leave [0, end)."""
    ordered = sorted(ranges)
    ends = [begin + nbytes for begin, nbytes in ordered]
    return ordered[0][0] >= 0 and ends[-1] <= end and all(a <= b for a, (b, _) in zip(ends, ordered[1:], strict=False))


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 10_000), st.integers(1, 10_000))
def test_places_do_not_overlap(ranks: int, mail: int, rows: int) -> None:
    places = Places(ranks, 256 * mail, 256 * rows)
    mails = [(places.mail(rank), places.mail_bytes) for rank in range(ranks)]
    answers = [(places.rows(rank), places.rows_bytes) for rank in range(ranks)]
    assert apart([*mails, *answers, (places.flags, 4 * ranks)], places.nbytes)
    assert all(begin % 256 == 0 for begin, _ in mails + answers) and places.flags % 256 == 0


@settings(deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 16), st.integers(1, 8000), st.integers(0, 64),
    st.sampled_from((torch.bfloat16, torch.float8_e4m3fn, torch.float32)),
)  # fmt: skip
def test_parts_of_a_mailbox_do_not_overlap(room: int, top_k: int, hidden: int, groups: int, dtype: torch.dtype) -> None:
    layout = MailLayout(room, top_k, hidden, groups, dtype, torch.bfloat16)
    parts = [
        (0, 8), (layout.ids_at, 4 * room * top_k), (layout.weights_at, 4 * room * top_k),
        (layout.scales_at, 4 * room * groups), (layout.tokens_at, room * hidden * dtype.itemsize),
    ]  # fmt: skip
    assert apart(parts, layout.mail_bytes)
    assert all(begin % 256 == 0 for begin, _ in parts) and layout.mail_bytes % 256 == layout.rows_bytes % 256 == 0
    assert layout.rows_bytes >= room * top_k * hidden * 2


class Two:
    """Ranks 0 and 1, on devices of their own."""

    def __init__(self, kind: str) -> None:
        self.machine = Machine(num_devices=2)
        self.devices = [self.machine.process(rank) for rank in (0, 1)]
        self.transports = [
            transport_of(kind, device, process=process_id(rank)) for rank, device in enumerate(self.devices)
        ]
        self.exchanges = [
            Exchange(transport, device, PLACES)
            for transport, device in zip(self.transports, self.devices, strict=True)
        ]  # fmt: skip

    def handles(self, rank: int) -> dict[str, Any]:
        return json.loads(json.dumps(self.exchanges[rank].handles()))

    def map(self) -> None:
        for rank in (0, 1):
            self.exchanges[rank].map({1 - rank: self.handles(1 - rank)})


@pytest.fixture(params=KINDS)
def two(quick_collections: None, request: pytest.FixtureRequest) -> Iterator[Two]:
    gc.collect()
    before = descriptors(), slab_maps()
    made = Two(request.param)
    yield made
    for exchange in made.exchanges:
        exchange.close()
        exchange.close()
    for transport in made.transports:
        transport.close()
    made.exchanges.clear()
    del exchange
    gc.collect()
    assert all(device.clean() for device in made.devices)
    assert (descriptors(), slab_maps()) == before


def test_two_ranks_see_each_others_memory_and_bells(two: Two) -> None:
    two.map()
    first, second = two.exchanges
    first.memory(1).tensor()[PLACES.mail(0) + 3] = 9
    assert second.own.tensor()[PLACES.mail(0) + 3] == 9 and not first.own.tensor().any()
    assert first.memory(0) is first.own
    at = first.bell(1, 0)
    two.devices[0].real(at, 8)  # registered: the device reaches it
    page = first._bells_of[1].tensor().view(torch.int64)
    page[0] = 5 * 256 + 1
    assert second.bells().tolist() == [5 * 256 + 1, 0] and first.bells().tolist() == [0, 0]
    assert at == page.data_ptr()
    assert first.bell(1, 1) == at + 8


def test_a_rank_that_is_gone_is_told(two: Two) -> None:
    """And what had been mapped until then is let go of."""
    given = two.handles(1)
    two.exchanges[1].close()
    with pytest.raises(PeerLost) as caught:
        two.exchanges[0].map({1: given})
    assert "\n" not in str(caught.value)


def test_memory_that_cannot_be_registered(two: Two) -> None:
    two.devices[0].fail["host_register"] = "cudaErrorNotSupported"
    with pytest.raises(DwdpError, match="cudaErrorNotSupported"):
        two.exchanges[0].map({1: two.handles(1)})


def test_close_goes_on_where_it_failed(two: Two) -> None:
    two.map()
    two.devices[0].fail["host_unregister"] = "cudaErrorLaunchFailure"
    with pytest.raises(DwdpError, match="cudaErrorLaunchFailure"):
        two.exchanges[0].close()
    two.devices[0].pinned.clear()  # what CUDA refused to let go of
    two.exchanges[0].close()
