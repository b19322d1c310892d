"""Ranks that are servers of their own, while some of them start: deaths, and ranks that do not belong."""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.unit.helpers import LIMIT_S, LaunchOwner
from tests.unit.leftovers import check_message, refusal
from tests.unit.member import NBYTES, Members, contents, members
from vllm_dwdp.errors import PeerLost
from vllm_dwdp.group.apart import ApartRendezvous
from vllm_dwdp.group.launch import Apart
from vllm_dwdp.group.launch_folder import make_folder
from vllm_dwdp.layers.map_peers import map_peers
from vllm_dwdp.transport.shm import ShmTransport

pytestmark = pytest.mark.usefixtures("public")


def test_a_rank_that_dies_while_others_start_is_kept_by_who_has_mapped_it(group_path: str) -> None:
    """Be it that others are waited for, for as long as they take: this process is rank 0."""
    owner, transport = LaunchOwner(), ShmTransport(LIMIT_S, keep_files=True)
    rendezvous = ApartRendezvous(make_folder(owner), Apart("group", 0, group_path), [0, 1, 2], LIMIT_S)
    layer: Any = SimpleNamespace(slab=transport.allocate_slab(NBYTES), peers={})
    ctypes.memmove(layer.slab.address, contents(0), NBYTES)
    build: Any = SimpleNamespace(rank=0, apart=SimpleNamespace(hold=rendezvous.hold, copies=False))
    with members(group_path, 3) as three, ThreadPoolExecutor(1) as pool:
        second, third = three.start(1), three.start(2)
        assert [second.ask("join"), third.ask("join")] == [1, 1]
        rendezvous.put("memory", True), third.ask("put", "memory", True)
        second.send("start")
        starting = pool.submit(map_peers, [layer], build, transport, rendezvous, rendezvous.ranks)
        deadline = time.monotonic() + LIMIT_S
        while "1" not in (rendezvous.meeting.said(0, "holds") or {}) and time.monotonic() < deadline:
            time.sleep(0.01)
        second.kill()
        again = three.start(1)
        assert again.ask("join") == 2
        again.send("start"), third.send("start")
        starting.result(LIMIT_S)
        assert {rank: ctypes.string_at(slab.address, NBYTES) for rank, slab in layer.peers.items()} == {
            rank: contents(rank) for rank in (1, 2)
        }
        rendezvous.put("mapped", True)
        assert again.answer() is True and third.answer() is False
        assert again.ask("inodes")[1] == third.ask("inodes")[1] == layer.peers[1].handle.payload["inode"]
    transport.close()
    rendezvous.leave()


def test_who_has_mapped_a_dead_rank_does_not_wait_for_it(two_members: Members) -> None:
    first, second = two_members.start(0), two_members.start(1)
    first.ask("join"), second.ask("join")
    for member in (first, second):
        member.send("start")
    assert [first.answer(), second.answer()] == [False, False]
    second.kill()
    # It never said this.
    assert first.ask("gather", "later", True, [0, 1]) == [True, None]


def test_no_memory_is_asked_for_by_a_rank_that_is_dead_and_has_it(group_path: str) -> None:
    with members(group_path, 3) as three:
        _, second, third = three.start_all()
        second.kill(), third.kill()
        second = three.start(1)
        second.ask("join")
        assert second.ask("loading", True) == (1, 0)
        # It takes memory, of slots and of an expert, but none for its share.
        three.start(2).ask("join")
        assert second.ask("loading", True) == (2, 0)


def test_who_differs_is_told_before_another_is_waited_for(group_path: str) -> None:
    with members(group_path, 3) as three:
        first, second = three.start(0), three.start(1)
        first.ask("join"), second.ask("join")
        first.ask("put", "checkpoint", {"sampled bytes": "1a"})
        began = time.monotonic()
        message = refusal(lambda: second.ask("check_same", "checkpoint", {"sampled bytes": "2b"}, [0, 1, 2], "use one"))
        check_message(message, ["ranks 1 and 0 cannot share experts (sampled bytes: 2b here, 1a there): use one"])
        assert time.monotonic() - began < LIMIT_S / 2


@pytest.mark.parametrize("apart", [True, False])
def test_a_rank_that_dies_while_it_is_mapped_does_not_end_that_start(apart: bool) -> None:
    """Its next life, or who has its slabs open, is mapped, and nothing of the first try stays; in one launch it ends."""
    lives, dead, reader = ShmTransport(LIMIT_S), ShmTransport(LIMIT_S), ShmTransport(LIMIT_S, keep_files=True)
    first, second = (lives.export_handle(lives.allocate_slab(NBYTES)).to_dict() for _ in range(2))
    gone = dead.export_handle(dead.allocate_slab(NBYTES)).to_dict()
    dead.close()
    offered = iter([[[first, gone]], [[first, gone], [first, second]]])
    layers: Any = [SimpleNamespace(slab=reader.allocate_slab(NBYTES), peers={}) for _ in range(2)]
    held: list[dict[int, Any]] = []
    told = SimpleNamespace(hold=lambda found: held.append(dict(found)), copies=False)
    build: Any = SimpleNamespace(rank=0, apart=told if apart else None)
    rendezvous: Any = SimpleNamespace(
        rank=0, timeout_s=LIMIT_S, put=lambda *_: None, offers=lambda rank, name, timeout_s: next(offered)
    )
    if apart:
        map_peers(layers, build, reader, rendezvous, [0, 1])
        assert [layer.peers[1].nbytes for layer in layers] == [NBYTES] * 2 and sorted(held[-1]) == [0, 1]
        assert len(reader._peers) == len(reader._kept) == 2
    else:
        with pytest.raises(PeerLost):
            map_peers(layers, build, reader, rendezvous, [0, 1])
        assert not reader._peers and not reader._kept
    for transport in (reader, lives):
        transport.close()


def test_slabs_are_offered_by_all_who_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ApartRendezvous, "get", lambda self, rank, name, timeout_s: [f"{name} of {rank}"])
    monkeypatch.setattr(ApartRendezvous, "_keepers", lambda self, rank: iter([["slabs of 1"], ["slabs of 1, kept"]]))
    rendezvous = object.__new__(ApartRendezvous)
    assert list(rendezvous.offers(1, "slabs")) == [["slabs of 1"], ["slabs of 1, kept"]]
    assert list(rendezvous.offers(1, "counters")) == [["counters of 1"]]
