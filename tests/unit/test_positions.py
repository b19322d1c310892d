"""Ranks that are servers of their own: positions and lives, waits for who is there, and experts that outlive their rank."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from tests.unit.helpers import LIMIT_S
from tests.unit.leftovers import check_message, refusal
from tests.unit.member import Members, contents, members
from vllm_dwdp.errors import DwdpError, DwdpTimeout, PeerLost
from vllm_dwdp.group.apart import SLABS
from vllm_dwdp.group.meeting import Holder, Meeting, check_free

pytestmark = pytest.mark.usefixtures("public")


def test_a_position_has_one_holder_and_lives_that_are_counted(two_members: Members, group_path: str) -> None:
    first = two_members.start(0)
    assert first.ask("join") == 1
    meeting = Meeting(group_path)
    assert meeting.holder(0) == Holder(first.process.pid or 0, 1) and meeting.holder(1) is None
    second = two_members.start(0)
    words = [f"rank 0 of the group in {group_path} is process {first.process.pid} (life 1)", "end it first"]
    check_message(refusal(lambda: second.ask("join")), words)
    # A holder that is stopped is none that is gone: it would wake up.
    os.kill(first.process.pid or 0, signal.SIGSTOP)
    check_message(refusal(lambda: second.ask("join")), words)
    check_message(refusal(lambda: check_free(group_path, 0, wait_s=0.1)), words)
    check_free(group_path, 1, wait_s=0)
    first.kill()
    assert meeting.holder(0) is None
    check_free(group_path, 0, wait_s=0)
    assert second.ask("join") == 2
    assert meeting.holder(0) == Holder(second.process.pid or 0, 2)


def test_of_many_that_come_at_once_one_gets_the_position(two_members: Members) -> None:
    many = [two_members.start(0) for _ in range(6)]
    for member in many:
        member.send("bytes")
    assert [member.answer() for member in many] == [{}] * len(many)  # all are up
    for member in many:
        member.send("join")
    found = []
    for member in many:
        try:
            found.append(member.answer())
        except DwdpError as error:
            assert "end it first" in str(error)
    assert found == [1]


def test_nobody_joins_while_another_does(group_path: str) -> None:
    """Between asking whether a position is free and taking it."""
    code = (
        "import sys\nfrom vllm_dwdp.group.meeting import Meeting\n"
        "with Meeting(sys.argv[1])._door(5):\n    print('in', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, group_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as joining:
        assert joining.stdout is not None and joining.stdout.readline() == "in\n"
        message = refusal(lambda: Meeting(group_path).join(0, timeout_s=0.3), DwdpTimeout)
        check_message(message, [f"process {joining.pid} has kept door.lock in {group_path} for 0.3 s", "end it"])
        joining.kill()
    meeting = Meeting(group_path)
    assert meeting.join(0, LIMIT_S) == 1
    meeting.leave()


def test_what_was_said_in_an_earlier_life_is_not_heard(two_members: Members, group_path: str) -> None:
    first, other = two_members.start(0), two_members.start(1)
    first.ask("join"), other.ask("join")
    first.ask("put", "memory", "of life 1")
    assert other.ask("get", 0, "memory") == "of life 1"
    first.kill()
    # The file is still there, and nobody is.
    assert (
        any("0.1-memory" in name for name in os.listdir(group_path)) and Meeting(group_path).said(0, "memory") is None
    )
    again = two_members.start(0)
    assert again.ask("join") == 2
    assert (
        not any(name.startswith("0.1-") for name in os.listdir(group_path))
        and Meeting(group_path).said(0, "memory") is None
    )
    other.send("get", 0, "memory")
    again.ask("put", "memory", "of life 2")
    assert other.answer() == "of life 2"


def test_a_group_starts_in_any_order(two_members: Members, group_path: str) -> None:
    started = two_members.start_all()
    for member in started:
        assert member.ask("bytes") == {rank: contents(rank) for rank in range(2)}


def test_a_rank_that_nobody_starts_ends_the_wait_for_it(two_members: Members, group_path: str) -> None:
    alone = two_members.start(0, timeout_s=0.5)
    alone.ask("join")
    began = time.monotonic()
    message = refusal(lambda: alone.ask("start"), DwdpTimeout)
    check_message(
        message, [f"rank 0 waited 0.5 s for rank 1 of the group in {group_path}", "nobody holds it", "start it"]
    )
    assert time.monotonic() - began < LIMIT_S / 2


def test_a_failure_of_another_rank_ends_no_start(two_members: Members) -> None:
    first, second = two_members.start(0), two_members.start(1)
    first.ask("join"), second.ask("join")
    first.send("start")
    second.ask("fail", RuntimeError("no memory"))
    time.sleep(0.2)
    second.kill()
    again = two_members.start(1)
    assert again.ask("join") == 2
    assert again.ask("start") is False and first.answer() is False


def test_the_last_failure_is_told_when_nobody_comes(two_members: Members) -> None:
    first, second = two_members.start(0, timeout_s=1.5), two_members.start(1)
    first.ask("join"), second.ask("join")
    first.send("start")
    second.ask("fail", RuntimeError("no memory"))
    time.sleep(0.3)
    second.kill()
    check_message(refusal(first.answer, DwdpTimeout), ["rank 1", "which failed: RuntimeError: no memory"])


def test_a_dead_ranks_experts_stay_and_its_next_life_adopts_them(two_members: Members) -> None:
    first, second = two_members.start_all()
    inodes = second.ask("inodes")
    for life in (2, 3):
        second.kill()
        assert first.ask("bytes") == {rank: contents(rank) for rank in range(2)}
        second = two_members.start(1)
        assert second.ask("join") == life
        assert second.ask("start") is True
        # The very memory, so that peers need not change anything.
        assert second.ask("inodes") == inodes == first.ask("inodes")
        assert second.ask("bytes") == first.ask("bytes") == {rank: contents(rank) for rank in range(2)}
    # By now the second rank has life 1 of the first, which it passes on.
    first.kill()
    first = two_members.start(0)
    assert first.ask("join") == 2 and first.ask("start") is True and first.ask("inodes") == inodes


def test_what_a_rank_adopts_stays_from_the_first_moment(two_members: Members) -> None:
    """Whoever had it may die while the rank loads, and is then waited for."""
    first, second = two_members.start_all()
    inode = second.ask("inodes")[1]
    second.kill()
    second = two_members.start(1)
    second.ask("join")
    first.kill()
    second.send("start")
    first = two_members.start(0)
    first.ask("join")
    assert first.ask("start") is False and second.answer() is True
    assert second.ask("inodes")[1] == first.ask("inodes")[1] == inode
    assert first.ask("bytes") == second.ask("bytes") == {rank: contents(rank) for rank in range(2)}


def test_what_somebody_says_to_have_and_has_not_is_not_waited_for_for_ever(two_members: Members) -> None:
    first, second = two_members.start_all()
    handle = second.ask("get", 1, SLABS)[0]
    second.kill()
    first.ask("hold", {1: [{**handle, "payload": {**handle["payload"], "pid": first.process.pid, "fd": 1 << 20}}]})
    began = time.monotonic()
    check_message(refusal(lambda: two_members.start(1, timeout_s=0.5).ask("join"), PeerLost), ["the owner of a slab"])
    assert 0.5 <= time.monotonic() - began < LIMIT_S / 2


def test_experts_that_nobody_has_any_more_are_read_again(two_members: Members) -> None:
    first, second = two_members.start_all()
    before = first.ask("inodes")
    first.kill(), second.kill()
    again = [two_members.start(rank) for rank in range(2)]
    assert [member.ask("join") for member in again] == [2, 2]
    for member in again:
        member.send("start")
    assert [member.answer() for member in again] == [False, False]
    assert set(again[0].ask("inodes").values()).isdisjoint(before.values())


def test_a_rank_returns_while_another_is_dead(group_path: str) -> None:
    """What the dead one held is had from the third, and the dead one finds its own when it comes."""
    with members(group_path, 3) as three:
        first, second, third = three.start_all()
        inodes = first.ask("inodes")
        second.kill(), third.kill()
        second = three.start(1)
        assert second.ask("join") == 2 and second.ask("start") is True
        first.kill()
        assert second.ask("bytes") == {rank: contents(rank) for rank in range(3)}
        # Of all that began, nobody is left: what they held is had from one who came later.
        third = three.start(2)
        assert third.ask("join") == 2 and third.ask("start") is True
        assert third.ask("inodes") == second.ask("inodes") == inodes


def test_memory_is_asked_for_by_those_who_have_yet_to_load(two_members: Members) -> None:
    first, second = two_members.start(0), two_members.start(1)
    first.ask("join")
    assert first.ask("loading", False) == (2, 2)
    second.ask("join")
    first.send("start")
    second.send("start")
    first.answer(), second.answer()
    second.kill()
    second = two_members.start(1)
    second.ask("join")
    assert second.ask("loading", True) == (1, 0)


def test_other_checkpoints_are_named(two_members: Members) -> None:
    first, second = two_members.start(0), two_members.start(1)
    first.ask("join"), second.ask("join")
    for member, found in ((first, "1a"), (second, "2b")):
        member.send("check_same", "checkpoint", {"headers": "h", "sampled bytes": found}, [0, 1], "use one")
    told = ["ranks 0 and 1 cannot share experts (sampled bytes: 1a here, 2b there): use one"]
    check_message(refusal(first.answer), told)


def test_the_last_one_takes_the_folder_along(two_members: Members, group_path: str) -> None:
    first, second = two_members.start_all()
    assert stat.S_IMODE(os.stat(group_path).st_mode) == 0o700
    first.ask("leave")
    assert Meeting(group_path).holder(0) is None and Meeting(group_path).holder(1) is not None
    second.ask("leave")
    assert not os.path.exists(group_path)
    again = two_members.start(0)
    assert again.ask("join") == 1


def test_a_forked_child_does_not_keep_the_position(group_path: str) -> None:
    """A child that outlives its worker, say of a compiler, holds nothing."""
    code = (
        "import os, sys, time\nfrom vllm_dwdp.group.meeting import Meeting\n"
        "meeting = Meeting(sys.argv[1])\nmeeting.join(0, 5)\n"
        "if os.fork() == 0:\n    time.sleep(30)\n    os._exit(0)\n"
        "print('up', flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, group_path], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "up\n"
        parent.wait(LIMIT_S)
        try:
            assert Meeting(group_path).holder(0) is None
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
