"""Messages of a launch: whole or not there, written or refused with the reason, and waited for with a limit."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.unit.helpers import LIMIT_S, LaunchOwner
from tests.unit.leftovers import check_message, refusal
from vllm_dwdp.errors import DwdpTimeout
from vllm_dwdp.group import launch_folder
from vllm_dwdp.group.launch_folder import make_folder
from vllm_dwdp.group.rendezvous import Rendezvous

pytestmark = pytest.mark.usefixtures("public")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


def test_a_stopped_front_end_keeps_nobody(front_end: tuple[subprocess.Popen[str], str]) -> None:
    process, path = front_end
    process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    rank = Rendezvous(path, 0, LIMIT_S)
    rank.put("slabs", [1])
    assert Rendezvous(path, 1, LIMIT_S).get(0, "slabs") == [1] and rank.peek(1, "slabs") is None
    message = refusal(lambda: rank.get(1, "slabs", timeout_s=1.0), DwdpTimeout)
    check_message(message, ["rank 0 waited 1 s for rank 1 (slabs)"])
    assert 1.0 <= time.monotonic() - started < LIMIT_S / 2


def test_a_wait_without_time_looks_once(folder: str) -> None:
    rank = Rendezvous(folder, 0, LIMIT_S)
    with pytest.raises(DwdpTimeout):
        rank.get(1, "slabs", timeout_s=0)
    with pytest.raises(DwdpTimeout, match=r"waited 0\.05 s for rank 1"):
        rank.get(1, "slabs", timeout_s=0.05)
    Rendezvous(folder, 1, LIMIT_S).put("slabs", [1])
    assert rank.get(1, "slabs", timeout_s=0) == [1]


def _overwrite(path: str) -> None:
    rank, count = Rendezvous(path, 1, LIMIT_S), 0
    until = time.monotonic() + 4 * LIMIT_S  # a busy machine reads 77 of them in LIMIT_S
    while rank.peek(0, "enough") is None and time.monotonic() < until:
        count += 1
        rank.put("slabs", [count] * 50_000)  # many pages
    rank.put("written", count)


def test_no_message_is_read_before_it_is_whole(folder: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_overwrite, args=(folder,), daemon=True)
    process.start()
    rank, seen = Rendezvous(folder, 0, LIMIT_S), set()
    while process.is_alive():
        if (found := rank.peek(1, "slabs")) is not None:
            assert len(found) == 50_000 and len(set(found)) == 1
            seen.add(found[0])
        if len(seen) == 100:
            rank.put("enough", True)
    process.join(LIMIT_S)
    # They did run at the same time.
    assert process.exitcode == 0 and len(seen) >= 100 and rank.peek(1, "written") >= 100
    assert sorted(os.listdir(folder)) == ["0-enough.json", "1-slabs.json", "1-written.json", "front-end.json"]


def test_a_message_that_cannot_be_written(folder: str) -> None:
    rank = Rendezvous(folder, 1, LIMIT_S)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the kernel refuses it, as on a full disk
    try:
        message = refusal(lambda: rank.put("slabs", "x" * 2000))
        rank.fail(RuntimeError("x" * 2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_message(message, [f"writing 1-slabs.json in {folder} failed", "(File too large): raise ulimit -f"])
    assert os.listdir(folder) == ["front-end.json"]
    assert Rendezvous(folder, 0, LIMIT_S).peek(1, "slabs") is None


def test_no_folder_can_be_made(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a temporary folder, on a full one, or where its file system has no permissions; nothing stays."""
    owner = LaunchOwner()
    monkeypatch.setattr(launch_folder, "_OTHER_PLACES", ())
    monkeypatch.setattr(tempfile, "tempdir", str(public / "nothing"))
    message = refusal(lambda: make_folder(owner))
    check_message(message, ["making a folder for the ranks to meet in failed", "No such file", "set TMPDIR"])
    monkeypatch.setattr(tempfile, "tempdir", str(public))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        message = refusal(lambda: make_folder(owner))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_message(message, ["writing front-end.json in", "File too large", "raise ulimit -f"])
    mkdtemp = tempfile.mkdtemp

    def without_permissions(prefix: str, dir: str) -> str:
        made = mkdtemp(prefix=prefix, dir=dir)
        os.chmod(made, 0o777)
        return made

    monkeypatch.setattr(tempfile, "mkdtemp", without_permissions)
    check_message(refusal(lambda: make_folder(owner)), ["mode 0777", "a local file system with owners and permissions"])
    assert list(public.iterdir()) == []


@as_root
def test_a_full_file_system(public: Path) -> None:
    """A real one, in a mount namespace of its own."""
    code = """
import os, sys, tempfile
from vllm_dwdp.group.launch_folder import make_folder
from vllm_dwdp.group.rendezvous import Rendezvous
class Owner: pass
owner, tempfile.tempdir = Owner(), sys.argv[1]
folder = make_folder(owner)
rank = Rendezvous(folder, 1, 1.0)
rank.put("slabs", [1])
try:
    rank.put("slabs", "x" * 2_000_000)
except ValueError as error:
    print(error)
print(rank.peek(1, "slabs"), sorted(os.listdir(folder)))
"""
    unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    script = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1"'
    command = [*unshare, script, "sh", str(public), sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if "permitted" in done.stderr or "denied" in done.stderr:
        pytest.skip("this container may not mount")
    message, rest = done.stdout.splitlines()
    check_message(message, ["writing 1-slabs.json in", "(No space left on device): free space there, or set TMPDIR"])
    assert rest == "[1] ['1-slabs.json', 'front-end.json']"


def test_no_descriptor_is_left(folder: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(folder, os.O_RDONLY) for _ in range(3)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, limits[1]))
    try:
        message = refusal(lambda: Rendezvous(folder, 0, LIMIT_S))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)
    check_message(message, [f"opening the launch's folder {folder} failed", "(Too many open files): raise ulimit -n"])


def test_a_front_end_is_not_called_gone_for_want_of_descriptors(folder: str) -> None:
    rank = Rendezvous(folder, 1, LIMIT_S)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(folder, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, limits[1]))
    try:
        message = refusal(lambda: rank.put("slabs", [1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(taken[0])
    check_message(message, ["writing 1-slabs.json in", "(Too many open files): raise ulimit -n"])
