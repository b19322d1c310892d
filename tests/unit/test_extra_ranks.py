"""Ranks beyond those that a group needs: they have the share of another, come and go, and keep experts in memory."""

from __future__ import annotations

import time

import pytest

from tests.unit.helpers import LIMIT_S
from tests.unit.leftovers import check_message, refusal
from tests.unit.member import Member, Members, contents
from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.group.meeting import Meeting

pytestmark = pytest.mark.usefixtures("public")

ALL = {rank: contents(rank) for rank in range(2)}


def joined(group: Members, rank: int, life: int = 1, adopts: bool = True) -> Member:
    """A member that has started beside those that have."""
    member = group.start(rank)
    assert member.ask("join") == life
    assert member.ask("start") is adopts
    assert member.ask("bytes") == ALL
    return member


def test_an_extra_rank_has_the_very_memory_of_its_share_and_leaves(two_members: Members, group_path: str) -> None:
    first, second = two_members.start_all()
    inodes = first.ask("inodes")
    extra, other = joined(two_members, 2), joined(two_members, 4)  # both with the share of rank 0
    assert extra.ask("inodes") == other.ask("inodes") == inodes
    assert Meeting(group_path).positions() == [0, 1, 2, 4]
    extra.ask("leave")
    other.kill()
    assert first.ask("bytes") == second.ask("bytes") == ALL
    joined(two_members, 2, life=2)


def test_a_group_that_starts_does_not_wait_for_an_extra_rank_that_waits_for_it(two_members: Members) -> None:
    extra = two_members.start(3)
    extra.send("join")
    first = two_members.start(0)
    # Nor does it count its memory: it takes none.
    assert first.ask("join") == 1 and first.ask("loading", False) == (2, 2)
    second = two_members.start(1)
    assert second.ask("join") == 1
    for member in (first, second):
        member.send("start")
    assert [first.answer(), second.answer(), extra.answer()] == [False, False, 1]
    assert extra.ask("loading", True) == (1, 0) and extra.ask("start") is True
    assert extra.ask("bytes") == ALL and extra.ask("inodes") == first.ask("inodes") == second.ask("inodes")


def test_an_extra_rank_joins_while_the_owner_of_its_share_is_dead(two_members: Members) -> None:
    first, second = two_members.start_all()
    inodes = first.ask("inodes")
    first.kill()
    extra = joined(two_members, 2)
    assert extra.ask("inodes") == inodes
    again = joined(two_members, 0, life=2)
    assert again.ask("inodes") == inodes == second.ask("inodes")


def test_ranks_return_from_an_extra_one_alone(two_members: Members) -> None:
    inodes = two_members.start_all()[0].ask("inodes")
    extra = joined(two_members, 2)
    for member in two_members.alive[:2]:
        member.kill()
    assert extra.ask("bytes") == ALL
    # The second does not wait for the first: all that it needs is there.
    second = joined(two_members, 1, life=2)
    another = joined(two_members, 5)
    extra.kill()
    first = joined(two_members, 0, life=2)
    assert first.ask("inodes") == second.ask("inodes") == another.ask("inodes") == inodes


def test_an_extra_rank_of_a_group_that_nobody_starts_ends_with_one_line(two_members: Members, group_path: str) -> None:
    began = time.monotonic()
    message = refusal(lambda: two_members.start(2, timeout_s=0.5).ask("join"), DwdpTimeout)
    check_message(
        message, [f"rank 2 waited 0.5 s for rank 0 of the group in {group_path}", "nobody holds it", "start it"]
    )
    assert time.monotonic() - began < LIMIT_S / 2


def test_an_extra_rank_that_differs_is_refused_and_nobody_else(two_members: Members) -> None:
    first, second = two_members.start_all()
    for member in (first, second):
        member.ask("put", "checkpoint", {"sampled bytes": "1a"})
    extra = two_members.start(2)
    extra.ask("join")
    message = refusal(lambda: extra.ask("check_same", "checkpoint", {"sampled bytes": "2b"}, [0, 1], "use one"))
    check_message(message, ["ranks 2 and 0 cannot share experts (sampled bytes: 2b here, 1a there): use one"])
    # It is still there, and has said its own, but holds nothing.
    assert first.ask("check_same", "checkpoint", {"sampled bytes": "1a"}, [0, 1], "use one") is None


def test_a_rank_that_returns_is_compared_with_an_extra_one(two_members: Members) -> None:
    """Which is all that is left of the group."""
    two_members.start_all()
    joined(two_members, 2).ask("put", "checkpoint", {"sampled bytes": "1a"})
    for member in two_members.alive[:2]:
        member.kill()
    first = two_members.start(0)
    first.ask("join")
    message = refusal(lambda: first.ask("check_same", "checkpoint", {"sampled bytes": "2b"}, [0, 1], "use one"))
    check_message(message, ["ranks 0 and 2 cannot share experts (sampled bytes: 2b here, 1a there): use one"])


def test_an_extra_rank_that_is_not_there_is_not_waited_for(two_members: Members) -> None:
    """Not by another one either, which asks whoever is before it on its GPU; one that is there may be."""
    two_members.start_all()
    third = two_members.start(3)
    assert third.ask("join") == 1
    started = time.monotonic()
    assert third.ask("get", 2, "profiled") is None and time.monotonic() - started < LIMIT_S / 2
    second = two_members.start(2)
    assert second.ask("join") == 1
    third.send("get", 2, "profiled")
    second.ask("put", "profiled", True)
    assert third.answer() is True


def test_a_position_of_an_extra_rank_has_one_holder(two_members: Members) -> None:
    two_members.start_all()
    joined(two_members, 2)
    message = refusal(lambda: two_members.start(2).ask("join"), DwdpError)
    check_message(message, ["rank 2 of the group", "life 1", "end it first, or give this server another rank"])
