"""The folder in which a launch meets: whose it is, who can read and write it, and when it goes."""

from __future__ import annotations

import gc
import json
import os
import pickle
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests.unit.helpers import LIMIT_S, LaunchOwner
from tests.unit.leftovers import check_message, refusal
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpTimeout, PeerLost
from vllm_dwdp.group import launch_folder
from vllm_dwdp.group.launch import DwdpLaunch
from vllm_dwdp.group.launch_folder import make_folder, remove_orphaned
from vllm_dwdp.group.rendezvous import Rendezvous

#: An ordinary user's id; `nobody` on most systems.
ANOTHER_USER = 65534
pytestmark = pytest.mark.usefixtures("public")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


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
        check_message(
            message, [f"opening the launch's folder {public / name} failed for user {os.geteuid()}", "set TMPDIR"]
        )
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


def test_a_folder_goes_while_ranks_still_write(public: Path) -> None:
    owner, stopping = LaunchOwner(), threading.Event()
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
    owner = LaunchOwner()
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
    rank.fail(RuntimeError("too late to tell anybody"))
    check_message(refusal(lambda: rank.peek(1, "counters"), PeerLost), ["front end is gone", str(process.pid)])
    check_message(refusal(lambda: Rendezvous(path, 1, 1.0), PeerLost), ["rank 1 lost", path, "front end is gone"])
    assert os.path.isdir(path)
    remove_orphaned(path)
    assert not os.path.lexists(path)
    check_message(refusal(lambda: Rendezvous(path, 1, 1.0), PeerLost), [path, "is gone", "front end has ended"])
    remove_orphaned(path)
    remove_orphaned("")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_next_launch_removes_folders_that_nobody_was_left_to_remove(
    elsewhere: bool, front_end: tuple[subprocess.Popen[str], str], public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, path = front_end
    if elsewhere:  # where its own did not do
        (mine := public / "mine").mkdir()
        monkeypatch.setattr(launch_folder, "_OTHER_PLACES", (str(public),))
        monkeypatch.setattr(tempfile, "tempdir", str(mine))
    owner, other = LaunchOwner(), LaunchOwner()
    alive = make_folder(owner)
    assert os.path.isdir(path)
    process.kill()
    process.wait()
    make_folder(other)
    assert not os.path.lexists(path) and os.path.isdir(alive)


def test_a_process_that_outlives_its_front_end_removes_the_folder(public: Path) -> None:
    code = (
        "import multiprocessing, os, sys, time\nfrom vllm_dwdp.group.launch import RENDEZVOUS_ENV\n"
        "from vllm_dwdp.group.launch_folder import make_folder\n"
        "from vllm_dwdp.engine.orphans import end_with_parent\nclass Owner: pass\nowner = Owner()\n"
        "def engine(pipe):\n    end_with_parent()\n    pipe.send(os.getpid())\n    time.sleep(60)\n"
        "folder = make_folder(owner)\nos.environ[RENDEZVOUS_ENV] = f'{os.getpid()}:{folder}'\n"
        "here, there = multiprocessing.Pipe()\n"
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
    first, second = LaunchOwner(), LaunchOwner()
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
        "import sys; import vllm_dwdp.group.rendezvous; "
        "print([name for name in ('torch', 'numpy', 'vllm', 'socket') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=LIMIT_S, text=True, check=True)
    assert done.stdout.strip() == "[]"


#: What was there before the folder was opened ends after it.
_READS_AT_THE_END = """
import sys, weakref
from vllm_dwdp.group.launch_folder import PrivateFolder
class Owner: pass
owner = Owner()
weakref.finalize(owner, lambda: print(folder.read("a.json")))
folder = PrivateFolder(sys.argv[1])
folder.write("a.json", 7)
"""


def test_a_folder_can_be_read_until_the_program_has_ended() -> None:
    """Its descriptor is not closed under a thread that another finalizer stops."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _READS_AT_THE_END, folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")
