"""The folder of a group while ranks come and the last one goes, and what others do to it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.unit.helpers import LIMIT_S
from tests.unit.leftovers import check_message, refusal
from tests.unit.member import Member, Members
from vllm_dwdp.errors import PeerLost
from vllm_dwdp.group.meeting import Holder, Meeting, check_free, meeting_place

pytestmark = pytest.mark.usefixtures("public")


def _target(folder: str, name: str) -> str:
    try:
        return os.readlink(os.path.join(folder, name))
    except OSError:  # closed meanwhile
        return ""


def _wait_at_the_door(other: Member, group_path: str) -> None:
    opened = f"/proc/{other.process.pid}/fd"
    deadline = time.monotonic() + LIMIT_S
    while not any(_target(opened, fd) == f"{group_path}/door.lock" for fd in os.listdir(opened)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_joins_while_the_last_one_leaves_meets_others(two_members: Members, group_path: str) -> None:
    """In a folder that has just gone: the next is made."""
    other = two_members.start(0)
    other.ask("bytes")  # it is up
    with Meeting(group_path)._door(LIMIT_S):
        other.send("join")
        _wait_at_the_door(other, group_path)
        shutil.rmtree(group_path)
    assert other.answer() == 1 and Meeting(group_path).holder(0) == Holder(other.process.pid or 0, 1)


def test_who_waited_at_a_door_that_was_removed_goes_to_the_next(two_members: Members, group_path: str) -> None:
    """Where somebody joins, and makes it, before the last one has removed the folder."""
    other = two_members.start(0)
    other.ask("bytes")
    with ExitStack() as after:
        with Meeting(group_path)._door(LIMIT_S):
            other.send("join")
            _wait_at_the_door(other, group_path)
            os.unlink(os.path.join(group_path, "door.lock"))
            after.enter_context(Meeting(group_path)._door(LIMIT_S))
        _wait_at_the_door(other, group_path)
        assert Meeting(group_path).holder(0) is None
    assert other.answer() == 1


def test_a_folder_that_is_joined_while_the_last_one_leaves_stays(
    two_members: Members, group_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, remove, joined = two_members.start(0), os.rmdir, []

    def removing(folder: str) -> None:
        joined.append(other.ask("join"))
        remove(folder)

    meeting = Meeting(group_path)
    meeting.join(0, LIMIT_S)
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", removing)
        meeting.leave()
    assert joined == [1] and Meeting(group_path).holder(0) == Holder(other.process.pid or 0, 1)


@pytest.mark.parametrize("removed", range(4))
def test_what_a_killed_last_one_leaves_is_a_folder_for_the_next(
    two_members: Members, group_path: str, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """Killed after so many files; vLLM kills a worker that takes its time to end."""
    meeting, unlink, gone = Meeting(group_path), os.unlink, []
    meeting.join(0, LIMIT_S)
    meeting.say(0, "slabs", [])

    def killed(name: str, **where: Any) -> None:
        if len(gone) == removed:
            raise OSError(errno.EINTR, "killed")
        gone.append(name)
        unlink(name, **where)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", killed)
        meeting.leave()
    assert len(gone) == removed
    assert os.listdir(os.path.dirname(group_path)) == [os.path.basename(group_path)]
    other = two_members.start(0)
    assert other.ask("join") in (1, 2)
    assert other.ask("leave") is None
    assert os.listdir(os.path.dirname(group_path)) == []


def test_a_folder_in_use_is_not_tidied_up(two_members: Members, group_path: str) -> None:
    """systemd-tmpfiles asks for this lock."""
    first = two_members.start(0)
    first.ask("join")
    fd = os.open(group_path, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        first.kill()
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)


def test_a_file_that_lost_its_bytes_is_told(group_path: str) -> None:
    meeting = Meeting(group_path)
    Path(group_path, "0-life.json").touch()
    told = [f"0-life.json in {group_path} cannot be read", "end all ranks and remove the folder"]
    check_message(refusal(lambda: meeting.join(0, LIMIT_S)), told)


def test_a_place_where_no_folder_can_be_made_is_told_at_once(public: Path) -> None:
    gone = str(public / "none")
    check_message(
        refusal(lambda: check_free(f"{gone}/group", 0, wait_s=0)),
        [f"a group cannot meet in {gone}: user {os.geteuid()} finds no such folder", "set dwdp.meet"],
    )


def test_a_folder_that_was_removed_is_not_joined(group_path: str) -> None:
    """Nobody would meet there: the next one makes another."""
    moved, removed = Meeting(group_path), Meeting(group_path)
    told = [f"{group_path} was removed", "start it again"]
    os.rename(group_path, f"{group_path}-moved")
    check_message(refusal(lambda: moved.join(0, LIMIT_S), PeerLost), told)
    os.mkdir(group_path, 0o700)
    check_message(refusal(lambda: moved.join(0, LIMIT_S), PeerLost), told)
    shutil.rmtree(f"{group_path}-moved")
    check_message(refusal(lambda: removed.join(0, LIMIT_S), PeerLost), told)


def test_a_folder_without_descriptors_left(group_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(group_path)

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    # Not until the end of the test: the folder would not be removed.
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        for ask in (lambda: meeting.holder(1), lambda: meeting.join(0, LIMIT_S)):
            check_message(refusal(ask), [f".lock in {group_path} failed", "Too many open files", "raise ulimit -n"])


@pytest.mark.parametrize(
    ("call", "first", "told"),
    [
        ("lockf", 0, "locking door.lock"),
        ("lockf", 1, "locking 0.lock"),
        ("fcntl", 0, "asking who has locked 0.lock"),
    ],
)
def test_a_file_system_without_locks_is_told(
    call: str, first: int, told: str, group_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as NFS whose server has no lock daemon: one line, and no descriptor stays."""
    meeting, lock, calls = Meeting(group_path), getattr(fcntl, call), iter(range(9))
    Path(group_path, "0.lock").touch()

    def no_locks(*arguments: Any) -> Any:
        if next(calls) < first:
            return lock(*arguments)
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(fcntl, call, no_locks)
    check_message(
        refusal(lambda: meeting.join(0, LIMIT_S)), [f"{told} in {group_path} failed", "No locks", "set dwdp.meet"]
    )
    assert os.listdir("/proc/self/fd") == before


def test_a_folder_that_is_not_this_users_alone_is_refused(public: Path, group_path: str) -> None:
    os.mkdir(group_path)
    os.chmod(group_path, 0o755)
    check_message(
        refusal(lambda: Meeting(group_path)), [f"{group_path} belongs to user", "with mode 0755", "set dwdp.meet"]
    )
    gone = str(public / "none" / "group")
    check_message(refusal(lambda: Meeting(gone)), [f"making {gone} for a group to meet in failed", "set dwdp.meet"])


def test_where_a_group_meets(monkeypatch: pytest.MonkeyPatch, public: Path) -> None:
    name = f"dwdp-group-{os.geteuid()}-g"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(public))
    assert meeting_place("g", None) == str(public / name)
    assert meeting_place("g", "/somewhere") == f"/somewhere/{name}"
    for unusable in ("/no/such/folder", ""):
        monkeypatch.setenv("XDG_RUNTIME_DIR", unusable)
        monkeypatch.setenv("TMPDIR", str(public))  # which two servers may have set differently
        assert meeting_place("g", None) == f"/tmp/{name}"
