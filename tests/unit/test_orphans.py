"""Who ends with whom: processes of a launch with the one that started them, others not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.unit.helpers import LIMIT_S
from vllm_dwdp.engine import orphans

REPO = Path(__file__).resolve().parents[2]

#: Starts a child by multiprocessing, as vLLM starts an engine; it looks for its parent while it is still being unpickled.
CHILD = """
import multiprocessing, os, sys, time
class Late:
    def __reduce__(self): return (unpickle, ())
def unpickle():
    import vllm_dwdp.engine.orphans as orphans
    open(sys.argv[1] + "/unpickling", "w").write(str(os.getpid()))
    time.sleep({gone_first})
    if orphans.launcher() is not None: orphans.end_with_parent()
    time.sleep({unpickling})
def work(_):
    open(sys.argv[1] + "/working", "w").close()
    time.sleep(60)
if __name__ == "__main__":
    os.environ["DWDP_RENDEZVOUS"] = "{mark}:x" if "{mark}" else f"{{os.getpid()}}:x"
    context = multiprocessing.get_context("spawn")
    context.Process(target=work, args=(Late(),), name="{name}").start()
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("name", "mark", "gone_first", "unpickling", "ends"),
    [
        pytest.param("EngineCore_DP1", "", 0, 8, True, id="parent-dies-while-it-imports"),
        pytest.param("EngineCore_DP1", "", 2, 2, True, id="parent-gone-before-it-looks"),
        pytest.param("EngineCore_DP1", str(os.getpid()), 2, 2, False, id="plain-vllm-below-a-program-with-a-launch"),
        pytest.param("mine", "", 0, 0, False, id="a-users-own-child"),
    ],
)
def test_a_child_of_a_killed_process(
    name: str, mark: str, gone_first: int, unpickling: int, ends: bool, tmp_path: Path
) -> None:
    script = tmp_path / "parent.py"
    script.write_text(CHILD.format(name=name, mark=mark, gone_first=gone_first, unpickling=unpickling))
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}
    )
    child = 0
    try:
        deadline = time.monotonic() + 60
        while not (started := tmp_path / "unpickling").exists() or not started.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child = int(started.read_text())
        time.sleep(0 if gone_first else 1)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + LIMIT_S
        while _runs(child) and (ends or not (tmp_path / "working").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if not ends:
            time.sleep(3)  # time in which one that ends would
        assert _runs(child) is not ends
    finally:
        parent.kill()
        if child and _runs(child):
            os.kill(child, signal.SIGKILL)


#: A front end that forks, as vLLM does on CUDA, while it is watched itself.
FORKING = """
import multiprocessing, os, sys, time
from vllm_dwdp.engine import orphans
os.environ["DWDP_RENDEZVOUS"] = f"{os.getpid()}:x"
orphans.watch_forked()
orphans.end_with_parent()
context = multiprocessing.get_context("fork")
children = [context.Process(target=time.sleep, args=(60,), name=name) for name in ("VLLM_DP_Coordinator", "mine")]
for child in children: child.start()
print(*(child.pid for child in children), flush=True)
time.sleep(60)
"""


def test_forked_processes_of_a_launch_watch_it_and_others_do_not() -> None:
    with subprocess.Popen([sys.executable, "-c", FORKING], cwd=REPO, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        coordinator, other = map(int, parent.stdout.readline().split())
        parent.kill()
    try:
        until = time.monotonic() + LIMIT_S
        while _runs(coordinator) and time.monotonic() < until:
            time.sleep(0.05)
        assert not _runs(coordinator) and _runs(other)
    finally:
        os.kill(other, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_whose_engine_was_gone_before_it_asked_the_kernel_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dwdp.engine.worker import die_with_parent

    for engine, code in ((1, -signal.SIGKILL), (os.getpid(), 7)):
        if (child := os.fork()) == 0:
            monkeypatch.setattr(orphans, "started_by", lambda engine=engine: engine)
            die_with_parent()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
