"""Slabs of a rank that is a server of its own, and stopped, ending or dead while another one maps them: who else is asked,
for how long, and what of a try that failed is left."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.unit.cuda_pair import LIMIT_S, Pair, with_payload
from tests.unit.cuda_rank import process_id
from tests.unit.fake_vmm import open_descriptors
from tests.unit.helpers import descriptors
from tests.unit.leftovers import refusal
from vllm_dwdp.errors import DwdpError, DwdpTimeout, PeerLost
from vllm_dwdp.layers import map_peers as maps
from vllm_dwdp.transport import vmm
from vllm_dwdp.transport.base import Handle, Transport
from vllm_dwdp.transport.cuda_copy import CopyOptions
from vllm_dwdp.transport.shm import ShmTransport
from vllm_dwdp.transport.vmm import VmmTransport

NBYTES = 4096
SILENT = f"dwdp-vmm-test-stopped-{os.getpid()}"


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """Of which the reader keeps descriptors; nobody takes long to be seen as gone."""
    monkeypatch.setattr("vllm_dwdp.transport.vmm_kept._ENDING_S", 0.0)
    made = Pair("vmm")
    made.reader.close()
    made.reader = VmmTransport(
        made.theirs, made.theirs.vmm, CopyOptions(timeout_s=LIMIT_S / 2), process_id(1), keep_descriptors=True
    )
    yield made
    made.close()


@pytest.fixture
def stopped() -> Iterator[str]:
    """The name of a socket at which nobody answers, as at that of a process that is stopped."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(f"\0{SILENT}")
        silent.listen()
        yield SILENT


class Offers:
    """A rendezvous in which rank 1's slabs are offered in rounds, the last one again and again; `limits` of its waits."""

    def __init__(self, timeout_s: float, *rounds: list[Handle]) -> None:
        self.rank, self.timeout_s, self._rounds = 0, timeout_s, list(rounds)
        self.limits: list[float] = []

    def put(self, name: str, value: Any) -> None:
        pass

    def offers(self, rank: int, name: str, timeout_s: float) -> Iterator[Any]:
        self.limits.append(timeout_s)
        for handle in self._rounds.pop(0) if len(self._rounds) > 1 else self._rounds[0]:
            yield [handle.to_dict()]

    def map(self, transport: Transport | Slow) -> Any:
        """What rank 0 maps of rank 1, of one layer."""
        layer: Any = SimpleNamespace(slab=transport.allocate_slab(NBYTES), peers={})
        build: Any = SimpleNamespace(rank=0, apart=SimpleNamespace(hold=lambda held: None, copies=False))
        maps.map_peers([layer], build, transport, self, [0, 1])  # type: ignore[arg-type]
        return layer.peers[1]


def test_who_else_has_the_slabs_of_a_stopped_owner_is_asked_soon(
    pair: Pair, stopped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the limit of all waits."""
    monkeypatch.setattr(vmm, "ANSWER_S", 0.2)
    good, began = pair.handle(), time.monotonic()
    mapped = Offers(LIMIT_S, [with_payload(good, socket=stopped), good]).map(pair.reader)
    assert mapped.nbytes == good.nbytes and time.monotonic() - began < LIMIT_S / 3


class Slow:
    """A transport, and the clock: an owner whose device is called stopped takes `answer_s` and gives nothing."""

    def __init__(self, answer_s: float) -> None:
        self.now, self._answer_s = 0.0, answer_s

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def allocate_slab(self, nbytes: int) -> str:
        return "own"

    def export_handle(self, slab: str) -> Handle:
        return handle_of(slab)

    def unmap_peer(self, peer: Any) -> None:
        pass

    def map_peer(self, handle: Handle) -> Any:
        if handle.device.startswith("stopped"):
            self.now += self._answer_s
            raise DwdpTimeout(f"{handle.device} does not answer")
        return SimpleNamespace(handle=handle, forget=lambda: None)


def handle_of(owner: str) -> Handle:
    return Handle("slow", "", owner, NBYTES, {})


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    made = Slow(10.0)
    monkeypatch.setattr(maps, "time", made)
    return made


def test_all_are_asked_once_however_long_the_first_takes(slow: Slow) -> None:
    keeper = handle_of("a keeper")
    assert Offers(5.0, [handle_of("stopped"), keeper]).map(slow).handle == keeper


def test_a_wait_for_a_stopped_owner_ends_at_the_limit(slow: Slow) -> None:
    """Of all tries together; each wait for its next life has what is left of it."""
    offers = Offers(35.0, [handle_of("stopped")])
    assert refusal(lambda: offers.map(slow), DwdpTimeout) == "stopped does not answer"
    assert 35.0 <= slow.now <= 35.0 + 10.0
    assert offers.limits == pytest.approx([35.0, 25.0, 14.9, 4.9], abs=0.11)


def test_an_owner_that_ends_in_order_is_asked_no_more(pair: Pair) -> None:
    """Its process is there, its socket is not; another one may have the slabs, or its next life."""
    other, good = pair.transport(pair.mine, 2), pair.handle()
    ending = other.export_handle(other.allocate_slab(NBYTES))
    other.close()
    assert Offers(LIMIT_S, [ending], [ending, good]).map(pair.reader).nbytes == good.nbytes
    # Where nobody keeps slabs for others it ends at once, as a refusal.
    with pytest.raises(DwdpError) as caught:
        pair.owner.map_peer(ending)
    assert not isinstance(caught.value, PeerLost)


def test_no_descriptor_of_device_memory_stays_of_a_try_that_failed(pair: Pair) -> None:
    first, second = pair.handle(), pair.handle()
    before = open_descriptors()
    peers = [pair.reader.map_peer(handle) for handle in (first, second)]
    assert open_descriptors() == before + 2
    for _ in range(2):
        peers[0].forget()
    assert open_descriptors() == before + 1
    # What is mapped stays so.
    assert peers[0].tensor().numel() == first.nbytes


def test_no_memory_file_stays_of_a_try_that_failed() -> None:
    owner, reader = ShmTransport(LIMIT_S), ShmTransport(LIMIT_S, keep_files=True)
    handles = [owner.export_handle(owner.allocate_slab(NBYTES)) for _ in range(2)]
    before = descriptors()
    peers = [reader.map_peer(handle) for handle in handles]
    for _ in range(2):
        peers[0].forget()
    assert descriptors() - before == 1 and peers[0].tensor().numel() == NBYTES
    reader.unmap_peer(peers[1])
    # For others it is kept until the transport is closed.
    assert descriptors() - before == 1
    reader.close()
    assert descriptors() == before
    # One that keeps nothing has nothing to forget.
    plain = ShmTransport(LIMIT_S)
    plain.map_peer(handles[0]).forget()
    plain.close(), owner.close()
