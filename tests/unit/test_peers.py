"""What a rank that is a server of its own tells of the others of its group, and what it compares with them."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

pytest.importorskip("vllm")

from tests.unit.helpers import LIMIT_S, LaunchOwner
from tests.unit.leftovers import build, check_message, refusal
from tests.unit.member import Members, members
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import configure, peers
from vllm_dwdp.engine.peers import PeerWatch
from vllm_dwdp.engine.worker import identity_of
from vllm_dwdp.group.apart import SLABS, ApartRendezvous
from vllm_dwdp.group.launch import Apart, DwdpLaunch, launch_of
from vllm_dwdp.group.launch_folder import make_folder
from vllm_dwdp.group.meeting import meeting_place
from vllm_dwdp.hits_file import Hits
from vllm_dwdp.prefetch.counters import CounterPage


class Group(NamedTuple):
    """This process is rank 0; rank 1 is a process of its own, and what rank 0 says of it is in `said`."""

    rendezvous: ApartRendezvous
    others: Members
    page: CounterPage
    said: list[str]


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    said: list[str] = []
    owner = LaunchOwner()
    for level in ("info", "warning"):
        monkeypatch.setattr(
            peers.logger, level, lambda text, *words, level=level: said.append(f"{level}: {text % words}")
        )
    path, page = str(tmp_path / "group"), CounterPage.create()
    with members(path, 2) as others:
        rendezvous = ApartRendezvous(make_folder(owner), Apart("group", 0, path), [0, 1], LIMIT_S)
        yield Group(rendezvous, others, page, said)
        rendezvous.leave()
    page.close()


def test_a_group_whose_folder_was_removed_is_not_said_to_be_gone(group: Group) -> None:
    other = group.others.start(1)
    other.ask("join"), other.ask("put", "mapped", True)
    watch = PeerWatch(group.rendezvous, group.page)
    watch.look()
    shutil.rmtree(group.rendezvous.meeting.path)
    for _ in range(2):
        watch.look()
        assert group.page.fields.peers_alive == 1 and len(group.said) == 1
    check_message(group.said[0], ["the group cannot be watched", "was removed", "start it again", "dwdp.meet"])
    # Who was there is known by its process.
    other.kill()
    watch.look()
    assert group.page.fields.peers_alive == 0 and len(group.said) == 1


def test_a_watch_goes_on_after_an_error(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    other = group.others.start(1)
    other.ask("join"), other.ask("put", "mapped", True)
    watch = PeerWatch(group.rendezvous, group.page)
    watch.look()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for _ in range(2):
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            watch.look(), watch.look()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert group.page.fields.peers_alive == 1
        watch.look()
    # Once for each time that it began.
    assert len(group.said) == 2 and group.said[0] == group.said[1]
    check_message(group.said[0], ["the group cannot be watched", "Too many open files", "ulimit -n"])
    other.kill()
    watch.look()
    assert group.page.fields.peers_alive == 0


def test_extra_ranks_are_told_when_they_come_and_go(group: Group) -> None:
    watch = PeerWatch(group.rendezvous, group.page)
    other, extra = group.others.start(1), group.others.start(2)
    assert other.ask("join") == 1
    other.ask("put", "mapped", True)
    group.rendezvous.put(SLABS, [])
    assert extra.ask("join") == 1
    watch.look()
    # One that starts is none that serves.
    assert (group.page.fields.peers_alive, group.said) == (1, [])
    extra.kill()
    watch.look()
    assert group.said == []
    for life in (2, 3):
        group.said.clear()
        extra = group.others.start(2)
        assert extra.ask("join") == life
        extra.ask("put", "mapped", True)
        watch.look(), watch.look()
        assert group.page.fields.peers_alive == 2
        extra.kill()
        watch.look(), watch.look()
        assert group.page.fields.peers_alive == 1
        who = f"(life {life}, process {extra.process.pid})"
        assert group.said == [
            f"info: dwdp rank 0: rank 2 is there, an extra one {who}",
            f"warning: dwdp rank 0: rank 2 {who} is gone; serving goes on",
        ]


def test_who_comes_and_goes_is_told_once(group: Group) -> None:
    other = group.others.start(1)
    other.ask("join"), other.ask("put", "mapped", True)
    watch = PeerWatch(group.rendezvous, group.page)
    for _ in range(2):
        watch.look()
        assert (group.page.fields.peers_alive, group.said) == (1, [])
    other.kill()
    gone = f"warning: dwdp rank 0: rank 1 (life 1, process {other.process.pid}) is gone; its experts stay mapped here"
    for _ in range(2):
        watch.look()
        assert group.page.fields.peers_alive == 0
        assert [line.partition(", and")[0] for line in group.said] == [gone]
    again = group.others.start(1)
    again.ask("join")
    watch.look()
    # One that starts is none that serves.
    assert group.page.fields.peers_alive == 0 and len(group.said) == 1
    again.ask("put", "mapped", True)
    for _ in range(2):
        watch.look()
        assert group.page.fields.peers_alive == 1
        assert group.said[1:] == [f"info: dwdp rank 0: rank 1 is there again (life 2, process {again.process.pid})"]


def test_a_rank_that_is_replaced_between_two_looks(group: Group) -> None:
    other = group.others.start(1)
    other.ask("join"), other.ask("put", "mapped", True)
    watch = PeerWatch(group.rendezvous, group.page)
    watch.look()
    other.kill()
    again = group.others.start(1)
    again.ask("join"), again.ask("put", "mapped", True)
    watch.look()
    assert group.page.fields.peers_alive == 1
    assert group.said == [f"info: dwdp rank 0: rank 1 is there again (life 2, process {again.process.pid})"]


def test_the_watch_goes_on_by_itself_and_ends(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PERIOD_S", 0.01)
    watch = peers.watch_peers(group.rendezvous, group.page)
    other = group.others.start(1)
    other.ask("join"), other.ask("put", "mapped", True)
    deadline = time.monotonic() + LIMIT_S
    while group.page.fields.peers_alive != 1:
        assert time.monotonic() < deadline and watch.is_alive()
        time.sleep(0.01)
    group.rendezvous.put(SLABS, ["one"]), group.rendezvous.hold({0: ["one"]})
    assert other.ask("held", 0) == ["one"]
    watch.stop()
    assert not watch.is_alive()
    # Who comes now asks others: what is about to be let go of is not offered.
    assert other.ask("held", 0) is None and group.rendezvous.meeting.read("0.1-slabs.json") is None


@pytest.mark.parametrize("rank", [1, 3])
def test_a_launch_of_one_rank(rank: int, tiny_moe: Path, tmp_path: Path, nothing_left: None) -> None:
    """Its config is that of one engine of vLLM, of a MoE model, with the rank of the group, be it an extra one."""
    settings = {"group": "g", "rank": rank, "ranks": 2, "meet": str(tmp_path)}
    config = build(tiny_moe, data_parallel_size=1, additional_config={"dwdp": settings})
    launch = launch_of(config)
    assert launch is not None and launch.apart is not None
    assert (launch.num_ranks, launch.group_size, launch.ranks_here, launch.rank_of(config)) == (2, 2, [rank], rank)
    assert launch.group_of(rank) == [0, 1]
    assert launch.name == Path(launch.apart.folder).name and launch.apart.folder.startswith(str(tmp_path))
    assert config.parallel_config.data_parallel_size == 1 and config.model_config.is_moe
    # Nothing of the group is there before a worker joins.
    assert list(tmp_path.iterdir()) == []


def test_a_second_server_is_refused_before_it_starts_anything(
    tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    monkeypatch.setattr(configure, "_ENDING_S", 0.1)
    settings = {"group": "g", "rank": 1, "ranks": 2, "meet": str(tmp_path)}
    with members(meeting_place("g", str(tmp_path)), 2) as others:
        other = others.start(1)
        other.ask("join")
        pid = other.process.pid
        told = refusal(lambda: build(tiny_moe, data_parallel_size=1, additional_config={"dwdp": settings}))
    check_message(told, [f"rank 1 of the group in {tmp_path}", f"is process {pid} (life 1)", "end it first"])


def identity(rank: int, meet: str, popularity: Hits | None = None, path: str = "model", **settings: Any) -> Any:
    config = DwdpConfig(group="g", rank=rank, ranks=2, meet=meet, **settings)
    launch = DwdpLaunch(config, 2, "/made/up", (), popularity=popularity, apart=Apart("g", rank, "/made/up"))
    told = {"_name_or_path": path, "layers": 3}
    model = SimpleNamespace(model=path, dtype="bf16", hf_config=SimpleNamespace(to_dict=lambda: told))
    return identity_of(SimpleNamespace(model_config=model), launch)  # type: ignore[arg-type]


def test_ranks_differ_in_rank_and_in_nothing_else() -> None:
    assert identity(0, "/tmp") == identity(1, "/tmp/../tmp")
    # The files are compared, wherever each has them.
    assert identity(0, "/tmp", path="/here/model") == identity(1, "/tmp", path="/mnt/model")
    assert identity(0, "/tmp").dwdp != identity(1, "/tmp", num_slots=3).dwdp
    # What differs can be read.
    assert json.loads(identity(1, "/tmp", num_slots=3).dwdp) == {"group": "g", "num_slots": 3, "ranks": 2}
    # The file is read by each server when it starts, and may be another one by then.
    hits = [Hits(7, {"layer": (count, 1)}) for count in (5, 6)]
    assert identity(0, "/tmp", hits[0]) == identity(1, "/tmp", hits[0])
    assert identity(0, "/tmp", hits[0]).dwdp != identity(0, "/tmp", hits[1]).dwdp
