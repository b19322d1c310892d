"""Ranks that are servers of their own, piece by piece: what is tried again, for how long, and what goes after a failure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("torch")

from tests.unit.helpers import LIMIT_S, LaunchOwner
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpError, DwdpTimeout, PeerLost
from vllm_dwdp.group import apart as group_apart
from vllm_dwdp.group.apart import ApartRendezvous, left_in_memory
from vllm_dwdp.group.launch import Apart
from vllm_dwdp.group.launch_folder import make_folder
from vllm_dwdp.group.rendezvous import Rendezvous
from vllm_dwdp.layers import transports
from vllm_dwdp.layers.map_peers import map_peers
from vllm_dwdp.platform import CUDA
from vllm_dwdp.transport.base import Handle

HANDLE: Any = Handle("shm", "a host", "cpu", 8, {}).to_dict()


def rendezvous(timeout_s: float = LIMIT_S) -> ApartRendezvous:
    """Of rank 0 of two, that has joined nothing."""
    found = object.__new__(ApartRendezvous)
    found.rank = found.share = 0
    found.ranks, found.timeout_s = [0, 1], timeout_s
    return found


@pytest.mark.parametrize("error", [PeerLost, DwdpTimeout])
def test_half_of_a_share_is_not_kept(error: type[DwdpError], monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is waited for as long as a start may take: another one may have it."""
    closed: list[int] = []
    limits: list[float] = []

    def keep(handle: Any, purpose: str, limit_s: float) -> Any:
        limits.append(limit_s)
        if len(limits) == 3:
            raise error("gone")
        number = len(limits)
        return SimpleNamespace(close=lambda: closed.append(number))

    monkeypatch.setattr(group_apart, "keep_slab", keep)
    with pytest.raises(error):
        rendezvous(timeout_s=300.0)._keep([HANDLE] * 4)
    assert closed == [2, 1] and limits == [10.0] * 3
    limits.clear()
    with pytest.raises(error):
        rendezvous(timeout_s=5.0)._keep([HANDLE] * 4)
    assert limits == [5.0] * 3


@pytest.mark.parametrize("error", [PeerLost, DwdpTimeout])
def test_a_share_that_its_keeper_takes_along_is_asked_for_again(
    error: type[DwdpError], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def keep(self: ApartRendezvous, handles: list[Any]) -> list[Any]:
        tried.append(handles)
        if len(tried) < 4:
            raise error("gone")
        return ["kept"]

    monkeypatch.setattr(ApartRendezvous, "_keepers", lambda self, rank: iter([["first"], ["second"]]))
    monkeypatch.setattr(ApartRendezvous, "_keep", keep)
    assert rendezvous().adopt() == ["kept"]
    assert tried == [["first"], ["second"]] * 2
    tried.clear()
    with pytest.raises(error):
        rendezvous(timeout_s=-1.0).adopt()
    assert len(tried) == 2


@pytest.mark.usefixtures("public")
def test_what_is_let_go_of_is_offered_no_more(group_path: str) -> None:
    owner = LaunchOwner()
    found = ApartRendezvous(make_folder(owner), Apart("group", 0, group_path), [0, 1], LIMIT_S)
    found.put("slabs", [HANDLE])
    found.hold({0: [HANDLE], 1: [HANDLE]})
    assert found.held(1) == [HANDLE] and found.meeting.said(0, "slabs") == [HANDLE]
    found.withdraw()
    assert found.held(0) is found.held(1) is None and found.meeting.said(0, "slabs") is None
    found.leave()


def test_nothing_is_left_of_a_group_that_never_met(tmp_path: Path) -> None:
    folder = tmp_path / "group"
    assert left_in_memory(Apart("group", 0, str(folder)), range(2)) == 0
    assert not folder.exists()


def mapping(offers: Any, timeout_s: float = LIMIT_S, held: list[Any] | None = None) -> None:
    """`map_peers` of rank 0 of two with two layers, of whose slabs another process has handles of its own."""
    kept = SimpleNamespace(handle=SimpleNamespace(to_dict=lambda: "mine of it"), forget=lambda: None)
    transport: Any = SimpleNamespace(
        export_handle=lambda slab: SimpleNamespace(to_dict=lambda: "mine"),
        map_peer=lambda handle: kept,
        unmap_peer=lambda mapped: None,
    )
    told = held if held is not None else []
    apart = SimpleNamespace(hold=lambda found: told.append(dict(found)), copies=False)
    build: Any = SimpleNamespace(rank=0, apart=apart)
    layers: Any = [SimpleNamespace(slab=None, peers={}) for _ in range(2)]
    there: Any = SimpleNamespace(rank=0, timeout_s=timeout_s, put=lambda *_: None, offers=offers)
    map_peers(layers, build, transport, there, [0, 1])


def test_what_a_rank_has_open_is_told_before_it_waits_and_after() -> None:
    """By handles that it answers for: those of the owner end with the owner."""
    held: list[Any] = []
    before: list[Any] = []

    def offers(rank: int, name: str, limit_s: float) -> Iterator[Any]:
        before.extend(held)
        yield [HANDLE] * 2

    mapping(offers, held=held)
    assert before == [{0: ["mine"] * 2}]
    assert held[-1] == {0: ["mine"] * 2, 1: ["mine of it"] * 2}


@pytest.mark.parametrize("count", [1, 3])
def test_a_rank_with_other_layers_is_refused(count: int) -> None:
    with pytest.raises(DwdpError, match=rf"^rank 1 has {count} MoE layers, rank 0 2: start all ranks with the same"):
        mapping(lambda rank, name, limit_s: iter([[HANDLE] * count]))


@pytest.mark.parametrize("error", [PeerLost, DwdpTimeout])
def test_a_rank_that_dies_each_time_it_is_mapped_ends_the_start(error: type[DwdpError]) -> None:
    asked: list[float] = []

    def lost(handle: Any) -> Any:
        raise error("gone")

    def offers(rank: int, name: str, limit_s: float) -> Iterator[Any]:
        asked.append(time.monotonic())
        assert asked[-1] - asked[0] < 20, "it is tried for ever"
        yield [HANDLE] * 2

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("vllm_dwdp.layers.map_peers._map_all", lambda handles, transport: lost(handles))
        with pytest.raises(error):
            mapping(offers, timeout_s=0.3)
    # But for the last pause, which would go beyond it.
    assert len(asked) > 2 and asked[-1] - asked[0] >= 0.2


def test_ranks_that_come_and_go_ask_nobody_for_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that returns would wait for the words of those that serve, and they have no composite view."""
    monkeypatch.setattr(transports, "make_transport", lambda *_: pytest.fail("memory is tried"))
    build: Any = SimpleNamespace(apart=SimpleNamespace(), platform=CUDA, config=DwdpConfig.parse({}))
    assert transports.page_of_group(build, cast("Rendezvous", None), [0, 1]) is None
