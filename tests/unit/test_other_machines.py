"""Ranks that find each other in a folder, and cannot share memory: on several machines, or in several PID namespaces."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.unit.helpers import LIMIT_S
from tests.unit.leftovers import check_message, refusal
from tests.unit.member import Members
from vllm_dwdp.errors import DwdpTimeout
from vllm_dwdp.group import meeting
from vllm_dwdp.group.meeting import Meeting, check_free
from vllm_dwdp.transport.memfd import Host, create_file, this_host

pytestmark = pytest.mark.usefixtures("public")

AWAY = Host("away", "01234567-89ab", "pid:[4026531836]")

JOIN = """
import sys
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.group.meeting import Meeting, check_free
try:
    check_free(sys.argv[1], int(sys.argv[2]), wait_s=0.2)
    print(Meeting(sys.argv[1]).join(int(sys.argv[2]), 5), flush=True)
    sys.stdin.read()
except DwdpError as error:
    print(error, flush=True)
"""

MAP = """
import json, socket, sys
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.memfd import map_handle
socket.sethostname("another-name")
print(map_handle(Handle.from_dict(json.loads(sys.argv[1])), "a slab").nbytes)
"""


@functools.cache
def unshare(*kinds: str) -> list[str]:
    """The command that runs a program in namespaces of its own."""
    command = ["unshare", "--user", "--map-root-user", *kinds]
    for words in (command[:1] + command[3:], command):  # without a user namespace where that is allowed
        if not subprocess.run([*words, "true"], capture_output=True).returncode:
            return words
    pytest.skip(f"{command} is not allowed here")


@pytest.fixture
def contained(group_path: str) -> Iterator[subprocess.Popen[str]]:
    """A process that wants position 1, in a PID namespace of its own, as in a container."""
    command = [*unshare("--pid", "--fork", "--kill-child", "--mount-proc"), sys.executable, "-c", JOIN, group_path, "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_rank_in_another_pid_namespace_is_refused(two_members: Members, group_path: str) -> None:
    assert two_members.start(0).ask("join") == 1
    # Rank 0 as well: what is wrong is not that the position is taken.
    for rank in (1, 0):
        command = [
            *unshare("--pid", "--fork", "--kill-child", "--mount-proc"),
            sys.executable,
            "-c",
            JOIN,
            group_path,
            str(rank),
        ]
        told = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S).stdout.strip()
        check_message(told, [f"rank 0 of the group in {group_path} runs in PID namespace", this_host().pid_namespace])
        check_message(told, ["this server in pid:[", "in one container, or share its PID namespace"])
    assert Meeting(group_path).positions() == [0]


def test_who_came_first_may_be_in_the_other_namespace(
    contained: subprocess.Popen[str], two_members: Members, group_path: str
) -> None:
    assert contained.stdout is not None and contained.stdout.readline() == "1\n"
    words = [
        f"rank 1 of the group in {group_path} runs in PID namespace",
        f"this server in {this_host().pid_namespace}",
    ]
    check_message(refusal(lambda: two_members.start(0).ask("join")), words)
    for rank in range(2):
        check_message(refusal(lambda rank=rank: check_free(group_path, rank, wait_s=0)), words)  # type: ignore[misc]
    contained.kill()
    contained.wait(LIMIT_S)
    # It is gone, and nobody else is there.
    deadline = time.monotonic() + LIMIT_S
    while Meeting(group_path).holder(1) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert two_members.start(0).ask("join") == 1


def test_a_rank_on_another_machine_is_refused(
    two_members: Members, group_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a shared file system shows locks of both."""
    assert two_members.start(0).ask("join") == 1
    monkeypatch.setattr(meeting, "this_host", lambda: AWAY)
    words = [
        f"rank 0 of the group in {group_path} runs on {this_host().machine}",
        "this server on away (boot 01234567)",
    ]
    words += ["share memory of one machine", "another dwdp.group, or dwdp.meet"]
    check_message(refusal(lambda: check_free(group_path, 1, wait_s=0)), words)
    check_message(refusal(lambda: meeting.join(group_path, 1, LIMIT_S)), words)
    assert Meeting(group_path).positions() == [0]


def test_where_a_rank_was_that_is_waited_for_in_vain(
    two_members: Members, group_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a shared file system shows files of another machine, but no locks; or after this machine was booted."""
    with monkeypatch.context() as there:
        there.setattr(meeting, "this_host", lambda: AWAY)
        folder, _ = meeting.join(group_path, 1, LIMIT_S)
    os.close(folder._held.pop(1)[0])
    alone = two_members.start(0, timeout_s=0.3)
    assert alone.ask("join") == 1
    message = refusal(lambda: alone.ask("start"), DwdpTimeout)
    check_message(message, ["rank 0 waited 0.3 s for rank 1", f"which ran on {AWAY.machine}", this_host().machine])


def test_a_container_with_a_name_of_its_own_reads_memory() -> None:
    """Which shares the PID namespace of the group."""
    file = create_file(4096, "a slab")
    handle = json.dumps(file.handle.to_dict())
    command = [*unshare("--uts"), sys.executable, "-c", MAP, handle]
    found = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert (found.stdout, found.stderr) == ("4096\n", "")
    file.close()
