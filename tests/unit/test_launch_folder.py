"""The folder in which a launch meets: whose it is, who can read it, that its messages are whole, and when it goes."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.helpers import LIMIT_S, descriptors
from tests.unit.leftovers import check_message, refusal
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine.launch import DwdpLaunch
from vllm_dwdp.engine.launch_folder import make_folder, remove_orphaned
from vllm_dwdp.engine.rendezvous import Rendezvous
from vllm_dwdp.errors import DwdpTimeout, PeerLost

#: An ordinary user's id; `nobody` on most systems.
ANOTHER_USER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

#: A front end that makes a folder, says where, and waits.
FRONT_END = (
    "import sys\nfrom vllm_dwdp.engine.launch_folder import make_folder\n"
    "class Owner: pass\nowner = Owner()\nprint(make_folder(owner), flush=True)\nsys.stdin.read()\n"
)


class Owner:
    """Whose life is that of a folder."""


@pytest.fixture(autouse=True)
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder that every user can enter and write to, as /tmp; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="dwdp-test-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o1777)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def folder(quick_collections: None) -> Iterator[str]:
    """The folder of a launch whose front end is this process; the test fails where it, or a descriptor, stays."""
    owner = Owner()
    gc.collect()
    before = descriptors()
    made = make_folder(owner)
    yield made
    del owner
    gc.collect()
    assert not os.path.lexists(made)
    assert descriptors() == before


@pytest.fixture
def front_end(public: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A front end in a process of its own, and its folder."""
    environment = {**os.environ, "TMPDIR": str(public)}
    process = subprocess.Popen(
        [sys.executable, "-c", FRONT_END], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def as_another_user(code: str, *arguments: str) -> dict[str, str]:
    """Run `code`, which may use `attempt(name, call)`, as another user; returns what came of each attempt."""
    head = (
        "import json, os, sys\nos.setgroups([])\n"
        f"os.setgid({ANOTHER_USER})\nos.setuid({ANOTHER_USER})\nfound = {{}}\n"
        "def attempt(name, call):\n"
        "    try:\n        call()\n        found[name] = 'done'\n"
        "    except OSError as error:\n        found[name] = type(error).__name__\n"
    )
    command = [sys.executable, "-c", f"{head}{code}\nprint(json.dumps(found))", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


@as_root
def test_another_user_can_neither_read_nor_forge_nor_delete(folder: str, public: Path) -> None:
    rank = Rendezvous(folder, 1, LIMIT_S)
    rank.put("slabs", ["secret"])
    code = """
folder = sys.argv[1]
message = os.path.join(folder, "1-slabs.json")
attempt("reach the folder", lambda: os.stat(folder))
attempt("list", lambda: os.listdir(folder))
attempt("read", lambda: open(message).read())
attempt("overwrite", lambda: open(message, "w").write("[]"))
attempt("say failed", lambda: open(os.path.join(folder, "1-failed.json"), "x"))
attempt("delete", lambda: os.unlink(message))
open(folder + "-mine", "w").write('["forged"]')
attempt("put in its place", lambda: os.replace(folder + "-mine", message))
attempt("move the folder", lambda: os.rename(folder, folder + "-moved"))
attempt("open it up", lambda: os.chmod(folder, 0o777))
"""
    found = as_another_user(code, folder)
    assert found.pop("reach the folder") == "done"  # so that it is the folder that refuses
    assert set(found.values()) == {"PermissionError"} and len(found) == 8, found
    peer = Rendezvous(folder, 0, LIMIT_S)
    assert peer.get(1, "slabs") == ["secret"] and peer.peek(1, "failed") is None


@as_root
def test_another_users_folder_is_refused(public: Path) -> None:
    path = public / "dwdp-theirs"
    as_another_user("os.mkdir(sys.argv[1], 0o700)\nopen(sys.argv[1] + '/1-slabs.json', 'w').write('[]')", str(path))
    message = refusal(lambda: Rendezvous(str(path), 0, LIMIT_S))
    check_message(message, [f"{path} belongs to user {ANOTHER_USER}", "not to user 0", "run all ranks as one user"])


@as_root
def test_a_folder_that_is_put_in_the_place_of_ours_is_not_read(folder: str, public: Path) -> None:
    """As another user could in a temporary folder without the sticky bit."""
    os.chmod(public, 0o777)
    rank = Rendezvous(folder, 0, LIMIT_S)
    code = """
attempt("swap", lambda: os.rename(sys.argv[1], sys.argv[1] + "-old"))
os.mkdir(sys.argv[1], 0o777)
open(sys.argv[1] + "/1-slabs.json", "w").write('["forged"]')
open(sys.argv[1] + "/1-failed.json", "w").write('"forged"')
"""
    assert as_another_user(code, folder) == {"swap": "done"}
    with pytest.raises(DwdpTimeout):
        rank.get(1, "slabs", timeout_s=0.2)
    check_message(refusal(lambda: Rendezvous(folder, 1, LIMIT_S)), [f"belongs to user {ANOTHER_USER}"])
    Path(f"{folder}/1-slabs.json").unlink()
    Path(f"{folder}/1-failed.json").unlink()
    os.rmdir(folder)
    os.rename(f"{folder}-old", folder)


def test_the_folder_is_of_its_owner_only(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Rendezvous(folder, 1, LIMIT_S).put("slabs", [1])
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in Path(folder).iterdir()} == {0o600}
    for mode in (0o750, 0o701, 0o777, 0o500):
        os.chmod(folder, mode)
        words = [folder, f"mode {mode:04o}", "with mode 0700", "set TMPDIR"]
        check_message(refusal(lambda: Rendezvous(folder, 0, LIMIT_S)), words)
    os.chmod(folder, 0o2700)  # as in a temporary folder whose group is inherited
    assert Rendezvous(folder, 0, LIMIT_S).get(1, "slabs") == [1]
    me = os.geteuid()
    with monkeypatch.context() as other:
        other.setattr(os, "geteuid", lambda: me + 1)
        words = [f"belongs to user {me} with mode", f"not to user {me + 1}", "run all ranks as one user"]
        check_message(refusal(lambda: Rendezvous(folder, 0, LIMIT_S)), words)


def test_what_is_no_folder_is_refused(folder: str, public: Path) -> None:
    (public / "link").symlink_to(folder)
    (public / "file").write_text("")
    for name in ("link", "file"):
        message = refusal(lambda name=name: Rendezvous(str(public / name), 0, LIMIT_S))
        check_message(message, [f"{public / name} is no folder of a launch of user {os.geteuid()}"])
    (public / "empty").mkdir(mode=0o700)
    for path in (str(public / "nothing"), str(public / "empty"), ""):
        message = refusal(lambda path=path: Rendezvous(path, 0, LIMIT_S), PeerLost)
        check_message(message, [f"the folder {path} of this launch is gone", "front end has ended"])


def test_what_is_no_message_is_refused(folder: str, public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what would block whoever opens it."""
    rank = Rendezvous(folder, 0, LIMIT_S)
    (public / "elsewhere").write_text('"forged"')
    os.symlink(public / "elsewhere", f"{folder}/1-link.json")
    os.mkfifo(f"{folder}/1-pipe.json")
    os.mkdir(f"{folder}/1-folder.json")
    for name in ("link", "pipe", "folder"):
        check_message(refusal(lambda name=name: rank.peek(1, name)), [f"1-{name}.json", folder])
    rank.put("mine", 7)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    check_message(refusal(lambda: rank.peek(0, "mine")), [f"no file of user {me + 1}", f"user {me})"])


def test_a_stopped_front_end_keeps_nobody(front_end: tuple[subprocess.Popen[str], str]) -> None:
    process, path = front_end
    process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    rank = Rendezvous(path, 0, LIMIT_S)
    rank.put("slabs", [1])
    assert Rendezvous(path, 1, LIMIT_S).get(0, "slabs") == [1] and rank.peek(1, "slabs") is None
    assert time.monotonic() - started < 0.5
    message = refusal(lambda: rank.get(1, "slabs", timeout_s=1.0), DwdpTimeout)
    check_message(message, ["rank 0 waited 1 s for rank 1 (slabs)"])
    assert 1.0 <= time.monotonic() - started < 2.5


def test_a_wait_without_time_looks_once(folder: str) -> None:
    rank = Rendezvous(folder, 0, LIMIT_S)
    with pytest.raises(DwdpTimeout):
        rank.get(1, "slabs", timeout_s=0)
    Rendezvous(folder, 1, LIMIT_S).put("slabs", [1])
    assert rank.get(1, "slabs", timeout_s=0) == [1]


def _overwrite(path: str, seconds: float) -> None:
    rank, count = Rendezvous(path, 1, LIMIT_S), 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        count += 1
        rank.put("slabs", [count] * 50_000)  # many pages
    rank.put("written", count)


def test_no_message_is_read_before_it_is_whole(folder: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_overwrite, args=(folder, 1.5), daemon=True)
    process.start()
    rank, seen = Rendezvous(folder, 0, LIMIT_S), set()
    while rank.peek(1, "written") is None:
        if (found := rank.peek(1, "slabs")) is not None:
            assert len(found) == 50_000 and len(set(found)) == 1
            seen.add(found[0])
    process.join(LIMIT_S)
    # They did run at the same time.
    assert process.exitcode == 0 and len(seen) > 10 and rank.peek(1, "written") > 10
    assert sorted(os.listdir(folder)) == ["1-slabs.json", "1-written.json", "front-end.json"]


def test_a_message_that_cannot_be_written(folder: str) -> None:
    rank = Rendezvous(folder, 1, LIMIT_S)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the kernel refuses it, as on a full disk
    try:
        message = refusal(lambda: rank.put("slabs", "x" * 2000))
        rank.fail(RuntimeError("x" * 2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_message(
        message, [f"writing 1-slabs.json in {folder} failed (File too large)", "free space there", "set TMPDIR"]
    )
    assert os.listdir(folder) == ["front-end.json"]
    assert Rendezvous(folder, 0, LIMIT_S).peek(1, "slabs") is None


def test_no_folder_can_be_made(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a temporary folder, on a full one, or where its file system has no permissions; nothing stays."""
    owner = Owner()
    monkeypatch.setattr(tempfile, "tempdir", str(public / "nothing"))
    message = refusal(lambda: make_folder(owner))
    check_message(message, ["no folder for the ranks to meet in could be made", "No such file", "set TMPDIR"])
    monkeypatch.setattr(tempfile, "tempdir", str(public))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        message = refusal(lambda: make_folder(owner))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_message(message, ["writing front-end.json in", "File too large", "free space there"])
    mkdtemp = tempfile.mkdtemp

    def without_permissions(prefix: str) -> str:
        made = mkdtemp(prefix=prefix)
        os.chmod(made, 0o777)
        return made

    monkeypatch.setattr(tempfile, "mkdtemp", without_permissions)
    check_message(refusal(lambda: make_folder(owner)), ["mode 0777", "a local file system with owners and permissions"])
    assert list(public.iterdir()) == []


def test_a_folder_goes_while_ranks_still_write(public: Path) -> None:
    owner, stopping = Owner(), threading.Event()
    path = make_folder(owner)
    rank = Rendezvous(path, 1, LIMIT_S)

    def write() -> None:
        while not stopping.is_set():
            rank.fail(RuntimeError("again"))

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    del owner
    gc.collect()
    stopping.set()
    for writer in writers:
        writer.join(LIMIT_S)
    assert list(public.iterdir()) == []
    with pytest.raises(PeerLost, match=r"the folder .* is gone: its front end has ended"):
        rank.put("slabs", [])


def test_a_forked_child_leaves_its_parents_folder(folder: str) -> None:
    owner = Owner()
    path = make_folder(owner)
    if (child := os.fork()) == 0:
        del owner
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.path.isdir(path)
    del owner
    gc.collect()
    assert not os.path.lexists(path)


def test_the_folder_of_a_killed_front_end(front_end: tuple[subprocess.Popen[str], str]) -> None:
    """A watcher removes it, and nobody who joins or waits takes it for one of a launch that lives."""
    process, path = front_end
    remove_orphaned(path)
    rank = Rendezvous(path, 0, LIMIT_S)
    assert os.path.isdir(path)
    timer = threading.Timer(0.3, process.kill)
    timer.start()
    message = refusal(lambda: rank.get(1, "slabs"), PeerLost)
    check_message(message, [f"rank 0 lost {path}", f"the front end is gone (process {process.pid})"])
    timer.join()
    check_message(refusal(lambda: Rendezvous(path, 1, 1.0), PeerLost), ["rank 1 lost", "front end is gone"])
    assert os.path.isdir(path)
    remove_orphaned(path)
    assert not os.path.lexists(path)
    remove_orphaned(path)
    remove_orphaned("")


def test_a_process_that_outlives_its_front_end_removes_the_folder(public: Path) -> None:
    code = (
        "import multiprocessing, os, sys, time\nfrom vllm_dwdp.engine.launch import RENDEZVOUS_ENV\n"
        "from vllm_dwdp.engine.launch_folder import make_folder\n"
        "from vllm_dwdp.engine.orphans import end_with_parent\nclass Owner: pass\nowner = Owner()\n"
        "def engine(pipe):\n    end_with_parent()\n    pipe.send(os.getpid())\n    time.sleep(60)\n"
        "os.environ[RENDEZVOUS_ENV] = folder = make_folder(owner)\nhere, there = multiprocessing.Pipe()\n"
        "multiprocessing.get_context('fork').Process(target=engine, args=(there,)).start()\n"
        "print(folder, here.recv(), flush=True)\nsys.stdin.read()\n"
    )
    environment = {**os.environ, "TMPDIR": str(public)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        folder, engine = process.stdout.readline().split()
        assert os.path.isdir(folder)
        process.kill()
    deadline = time.monotonic() + LIMIT_S
    while os.path.lexists(folder) or os.path.exists(f"/proc/{engine}"):
        assert time.monotonic() < deadline, "the folder, or the engine, stays"
        time.sleep(0.05)


def test_a_watcher_leaves_folders_alone_that_are_no_launchs(public: Path) -> None:
    other = public / "dwdp-other"
    other.mkdir(mode=0o700)
    (other / "precious").write_text("")
    remove_orphaned(str(other))
    assert (other / "precious").exists()


def test_the_folders_of_two_launches_are_two(public: Path) -> None:
    first, second = Owner(), Owner()
    paths = [make_folder(first), make_folder(second)]
    Rendezvous(paths[0], 1, LIMIT_S).put("slabs", [1])
    assert Rendezvous(paths[1], 0, LIMIT_S).peek(1, "slabs") is None
    del first
    gc.collect()
    assert [path.name for path in public.iterdir()] == [os.path.basename(paths[1])]


def test_a_launch_travels(folder: str) -> None:
    launch = DwdpLaunch(DwdpConfig(), 2, folder, (0,))
    assert pickle.loads(pickle.dumps(launch)) == launch


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; import vllm_dwdp.engine.rendezvous; "
        "print([name for name in ('torch', 'numpy', 'vllm', 'socket') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=LIMIT_S, text=True, check=True)
    assert done.stdout.strip() == "[]"
