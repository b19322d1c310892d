"""A worker that dies and a rank that fails during start: one error that names it, and nothing left."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.engines import Leftovers, dwdp, run_job, unused
from tests.e2e.server import dwdp_arguments, start_server

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
