"""The front end's view of its ranks: pages as they come up, their growth in Prometheus, one line each at the end."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.helpers import LaunchOwner
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import rank_pages
from vllm_dwdp.engine.rank_pages import RankPages
from vllm_dwdp.group.launch import Apart, DwdpLaunch
from vllm_dwdp.group.launch_folder import make_folder
from vllm_dwdp.group.rendezvous import Rendezvous
from vllm_dwdp.prefetch.counters import CounterPage, Counters

RANKS = 2
LIMIT_S = 20.0
Published = list[tuple[int, Counters, Counters | None]]


class Group:
    """A launch, and the ranks that come up with real counter pages."""

    def __init__(self) -> None:
        self._owner = LaunchOwner()
        self.launch = DwdpLaunch(DwdpConfig(timeout_s=LIMIT_S), RANKS, make_folder(self._owner), ())
        self.pages: dict[int, CounterPage] = {}

    def come_up(self, rank: int) -> CounterPage:
        """Publish the page of `rank`."""
        page = self.pages[rank] = CounterPage.create(rank)
        Rendezvous(self.launch.folder, rank, LIMIT_S).put("counters", page.handle().to_dict())
        return page


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    for page in made.pages.values():
        page.close()


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Published:
    """What was published, in order, every 10 ms instead of every second."""
    told: Published = []
    monkeypatch.setattr(rank_pages, "PERIOD_S", 0.01)
    monkeypatch.setattr(rank_pages, "publish", lambda rank, now, before: told.append((rank, now, before)))
    return told


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of warning, in order."""
    lines: list[str] = []
    monkeypatch.setattr(rank_pages.logger, "warning", lambda text, *values: lines.append(text % values))
    return lines


def until(condition: Callable[[], object]) -> None:
    """Return once `condition` holds; an AssertionError after a time limit."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def grown(published: Published, rank: int) -> int:
    """Forwards of `rank`, as a counter that each growth is added to has them."""
    return sum(now.forwards - (before.forwards if before else 0) for number, now, before in published if number == rank)


def test_growth_of_every_rank_is_published_once(group: Group, published: Published) -> None:
    pages = RankPages(group.launch, publishing=True)
    pages.start()
    first = group.come_up(0)
    first.fields.forwards = 5
    until(lambda: grown(published, 0) == 5)
    # A rank that comes up later, and growth after all are there.
    group.come_up(1).fields.forwards = 7
    until(lambda: grown(published, 1) == 7)
    first.fields.forwards = 11
    until(lambda: grown(published, 0) == 11)
    told = len(published)
    until(lambda: len(published) > told + 2 * RANKS)
    assert (grown(published, 0), grown(published, 1)) == (11, 7)
    pages.stop(summarise=False)
    pages.join(LIMIT_S)
    assert not pages.is_alive()


def test_without_publishing_the_thread_ends_once_all_are_up_and_leaves_a_line_each(
    group: Group, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = RankPages(group.launch, publishing=False)
    pages.start()
    group.come_up(1).fields.forwards = 9
    time.sleep(0.1)
    assert pages.is_alive()
    group.come_up(0)
    pages.join(LIMIT_S)
    assert not pages.is_alive() and published == []
    lines: list[str] = []
    monkeypatch.setattr(rank_pages.logger, "info", lambda text, *values: lines.append(text % values))
    group.pages[1].fields.forwards = 12
    pages.stop(summarise=True)
    assert [line.split(",")[0] for line in lines] == [
        "dwdp rank 0 stops: 0 forwards (0 direct",
        "dwdp rank 1 stops: 12 forwards (0 direct",
    ]


def test_a_rank_that_is_gone_at_once_is_no_error(group: Group, published: Published) -> None:
    group.come_up(0).close()
    pages = RankPages(group.launch, publishing=True)
    pages.start()
    group.come_up(1).fields.forwards = 3
    until(lambda: grown(published, 1) == 3)
    assert pages.is_alive()
    pages.stop(summarise=False)
    pages.join(LIMIT_S)


def test_a_page_that_cannot_be_read_is_told_once_and_harms_no_other(
    group: Group, published: Published, warned: list[str]
) -> None:
    page = group.come_up(0)
    page.fields.version += 1
    pages = RankPages(group.launch, publishing=True)
    pages.start()
    group.come_up(1).fields.forwards = 3
    until(lambda: grown(published, 1) == 3)
    told = len(published)
    until(lambda: len(published) > told + 2)
    assert len(warned) == 1 and warned[0].startswith(
        "dwdp: the counters of rank 0 are not read: a counter page has magic"
    )
    # What may pass is tried again.
    page.fields.version -= 1
    page.fields.forwards = 5
    until(lambda: grown(published, 0) == 5)
    pages.stop(summarise=False)


def test_a_rank_that_is_not_heard_of_in_time_is_named_once_with_the_processes_to_look_at(
    group: Group, published: Published, warned: list[str]
) -> None:
    launch = replace(group.launch, config=DwdpConfig(timeout_s=0.3))
    Rendezvous(launch.folder, 0, LIMIT_S).put("identity", {"model": "made up"})
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), name="EngineCore_DP1")
    child.start()
    before = time.monotonic()
    # An API server of several starts no engine, and has none to look at.
    quiet, pages = RankPages(launch, publishing=True), RankPages(launch, publishing=True, starting=True)
    try:
        quiet.start()
        pages.start()
        until(lambda: warned)
        assert time.monotonic() - before > 0.3
        time.sleep(0.5)
    finally:
        child.kill()
        child.join()
        quiet.stop(summarise=False)
        pages.stop(summarise=False)
    [line] = warned
    assert line.startswith("dwdp: nothing heard of rank 1 for 0.3 s (dwdp.timeout_s): see where ")
    assert f"EngineCore_DP1 {child.pid}" in line.split(" stands (py-spy dump --pid), or start again")[0]


@pytest.mark.parametrize(
    ("limit_s", "starting", "children", "told"),
    [
        (0.1, True, ["ApiServer_0", "EngineCore_DP0", "EngineCore_DP1", "mine"], "see where EngineCore_DP1 102 stands"),
        (0.1, True, ["EngineCore", "VLLM_DP_Coordinator"], "see where EngineCore 100 stands"),
        (0.1, True, ["mine"], None),  # of a config alone, or one whose engines are gone
        (0.1, False, ["EngineCore_DP1"], None),
        (LIMIT_S, True, ["EngineCore_DP1"], None),
    ],
)
def test_of_all_children_only_engines_that_are_silent_are_told(
    limit_s: float,
    starting: bool,
    children: list[str],
    told: str | None,
    group: Group,
    published: Published,
    warned: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = [SimpleNamespace(name=name, pid=100 + i) for i, name in enumerate(children)]
    monkeypatch.setattr(multiprocessing, "active_children", lambda: there)
    Rendezvous(group.launch.folder, 0, LIMIT_S).put("identity", {"model": "made up"})
    config: Any = LaunchOwner()
    launch = replace(group.launch, config=DwdpConfig(timeout_s=limit_s))
    rank_pages.watch_ranks(config, launch, publishing=True, summarise=starting)
    if told is None:
        time.sleep(0.5)
    else:
        until(lambda: warned)
    del config  # which ends the thread
    assert len(warned) == (told is not None) and all(
        f" rank 1 for 0.1 s (dwdp.timeout_s): {told} (" in w for w in warned
    )


def test_ranks_that_load_are_not_told_silent(group: Group, published: Published, warned: list[str]) -> None:
    """Loading takes as long as it takes."""
    launch = replace(group.launch, config=DwdpConfig(timeout_s=0.1))
    for rank in range(RANKS):
        Rendezvous(launch.folder, rank, LIMIT_S).put("identity", {"model": "made up"})
    pages = RankPages(launch, publishing=False, starting=True)
    pages.start()
    time.sleep(0.5)
    assert pages.is_alive()
    pages.stop(summarise=False)
    assert warned == []


def test_a_server_of_its_own_publishes_its_rank_only(group: Group, published: Published) -> None:
    group.come_up(0).fields.forwards = 5  # not of this launch
    group.come_up(1).fields.forwards = 7
    pages = RankPages(replace(group.launch, apart=Apart("group", 1, "/made/up")), publishing=True)
    pages.start()
    until(lambda: grown(published, 1) == 7)
    pages.stop(summarise=False)
    assert {rank for rank, _, _ in published} == {1}


def test_the_thread_has_ended_when_it_was_stopped(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that still runs at the end of a program may abort it."""
    monkeypatch.setattr(rank_pages, "PERIOD_S", 0)
    pages, looking = RankPages(group.launch, publishing=False), threading.Event()

    def look(rendezvous: Rendezvous) -> None:
        looking.set()
        time.sleep(0.5)

    monkeypatch.setattr(pages, "_open_pages", look)
    pages.start()
    assert looking.wait(LIMIT_S)
    pages.stop(summarise=False)
    assert not pages.is_alive()
