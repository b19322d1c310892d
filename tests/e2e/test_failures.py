"""A worker that dies and a rank that fails during start: one error that names it, and nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ci.checks.soak_processes import unused
from tests.e2e.engines import REPO, Leftovers, dwdp, environment, free_port, processes, run_job
from tests.e2e.server import VLLM, dwdp_arguments, start_server

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("launcher", ["mp", "uni"])
def test_a_killed_worker_ends_everything_and_names_its_rank(
    launcher: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    server = start_server(
        tmp_path,
        checkpoint(family="qwen3_moe", num_experts=16),
        *dwdp_arguments(2, launcher=launcher),
        "--enforce-eager",
        "--api-server-count",
        "1",
    )
    try:
        assert server.complete("No rank waits", rank=1)
        found = server.rank_pids(1)
        assert len(found) == (2 if launcher == "mp" else 1)
        os.kill(found[-1], signal.SIGKILL)
        started = time.monotonic()
        server.process.wait(60)
        assert time.monotonic() - started < 30
        assert server.left() == []
        named = re.findall(r"ERROR .*DWDP rank (\d) \(pid \d+\) died", server.log.read_text())
        assert named == ["1"]
    finally:
        server.kill()


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["mp", "uni"])
def test_a_rank_that_cannot_load_ends_all_at_once(
    launcher: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A tensor of rank 1's share is too large: rank 0 says so instead of waiting for its time limit of 300 s."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    model = tmp_path / "broken"
    shutil.copytree(checkpoint(family="qwen3_moe", num_experts=16), model)
    [file] = model.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if ".experts.15." in name)
    tensors[name] = torch.cat([tensors[name]] * 2)  # one that is too small vLLM takes for one to be padded
    save_file(tensors, file, {"format": "pt"})
    before, started = Leftovers(), time.monotonic()
    with pytest.raises(AssertionError, match="job ended with 1"):
        run_job(tmp_path, model, ["tokens"], **dwdp(2, timeout_s=300, launcher=launcher))
    [log] = tmp_path.glob("job-*.log")
    assert "PeerLost: rank 1 failed during start: RuntimeError: The size of tensor" in log.read_text()
    assert time.monotonic() - started < 150
    assert unused(set(os.listdir("/dev/shm")) - before.shm) == []


@pytest.mark.full
@pytest.mark.parametrize("servers", ["1", "2"])
def test_nothing_outlives_a_killed_front_end(servers: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    server = start_server(
        tmp_path,
        checkpoint(family="qwen3_moe", num_experts=16),
        *dwdp_arguments(2),
        "--enforce-eager",
        "--api-server-count",
        servers,
    )
    try:
        server.stop(signal.SIGKILL)
        # vLLM's folder for Prometheus stays: only the killed process would have removed it.
        assert [name for name in server.before.check(server.process.pid, wait_s=20) if not name.startswith("tmp")] == []
    finally:
        server.kill()


#: When a front end is killed: seconds after so many of its processes were started. The first is vLLM's coordinator, the
#: second an engine; what follows is imports, handshakes, and building the model.
KILLED = ((1, 0.5), (2, 0.5), (2, 2), (2, 5))


@pytest.mark.full
@pytest.mark.parametrize("way", ["offline", "serving"])
@pytest.mark.parametrize(("processes", "seconds"), KILLED)
def test_nothing_outlives_a_front_end_that_is_killed_while_it_starts(
    way: str, processes: int, seconds: float, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoint(family="qwen3_moe", num_experts=16)
    offline = [sys.executable, "-m", "tests.e2e.program", json.dumps({"model": str(model), "options": [dwdp(2)]})]
    served = [*VLLM, "serve", str(model), "--port", str(free_port()), *dwdp_arguments(2), "--max-model-len", "512"]
    start = Start(served if way == "serving" else offline, tmp_path / "log")
    try:
        start.kill_after(processes, seconds)
        assert start.killed.is_set(), start.log.read_text()[-6000:]
        # vLLM's folder for Prometheus stays: only the killed process would have removed it. A process that was just started
        # looks for its front end once it has imported vLLM, for which two busy cores take 20 s.
        assert [name for name in start.before.check(start.pid, 30) if not name.startswith("tmp")] == []
    finally:
        start.end()


class Start:
    """A program that starts engines, in a session of its own."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.before, self.log, self.killed = Leftovers(), log, threading.Event()
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=REPO,
                env=environment(TMPDIR=str(self.before.tmp)),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def kill_after(self, started: int, seconds: float) -> None:
        """SIGKILL the front end, so long after vLLM has started so many processes."""
        while self.process.poll() is None:
            others = [line for line in processes(self.pid) if not line.startswith(f"{self.pid} ")]
            # By their command lines, until they have titles.
            if sum("multiprocessing.spawn" in line or "VLLM::" in line for line in others) >= started:
                time.sleep(seconds)
                self.process.kill()
                self.process.wait()
                self.killed.set()
                return
            time.sleep(0.05)

    def end(self) -> None:
        """End what is left."""
        for line in processes(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGKILL)
