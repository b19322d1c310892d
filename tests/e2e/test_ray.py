"""Workers launched by Ray: a cluster that is there already is joined, and a worker that dies is named."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import REPO, dwdp, environment, run_job
from tests.e2e.server import dwdp_arguments, start_server

pytestmark = [pytest.mark.e2e, pytest.mark.full]

#: Holds a cluster until its input ends; then prints the names of the actors that are left.
_CLUSTER = """
import sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
print([actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)], len(ray.nodes()), flush=True)
"""


@pytest.fixture
def cluster() -> Iterator[subprocess.Popen[str]]:
    """A Ray cluster of one node that somebody else started."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _CLUSTER],
        cwd=REPO,
        env=environment(RAY_USAGE_STATS_ENABLED="0"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield holder
    finally:
        holder.terminate()
        holder.wait(30)


def _heads() -> int:
    """Ray clusters of this machine."""
    return sum(
        b"gcs_server" in path.read_bytes().split(b"\0", 1)[0]
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if _there(path)
    )


def _there(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def test_a_running_cluster_is_joined_and_left_alone(
    cluster: subprocess.Popen[str], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    assert cluster.stdin is not None and cluster.stdout is not None
    address = cluster.stdout.readline().strip()
    heads = _heads()
    model = checkpoint(family="qwen3_moe", num_experts=16)
    job: dict[str, Any] = run_job(
        tmp_path, model, ["tokens", "counters"], {"RAY_ADDRESS": address}, **dwdp(2, launcher="ray")
    )
    assert [counter["rank"] for counter in job["counters"]] == [0, 1]
    assert all(counter["layers"] > 0 for counter in job["counters"])
    assert _heads() == heads, "a second cluster was started, or the first was stopped"
    cluster.stdin.close()
    names, nodes = cluster.stdout.readline().rsplit(" ", 1)
    assert (json.loads(names.replace("'", '"')), int(nodes)) == ([], 1)


@pytest.mark.parametrize("stopped_first", [False, True])
def test_a_killed_ray_worker_ends_everything_and_is_named(
    stopped_first: bool, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    server = start_server(
        tmp_path,
        checkpoint(family="qwen3_moe", num_experts=16),
        *dwdp_arguments(2, launcher="ray"),
        "--enforce-eager",
        "--api-server-count",
        "1",
    )
    try:
        assert server.complete("No rank waits", rank=1) == server.complete("No rank waits", rank=0)
        worker = _ray_worker(server.log.read_text(), 1)
        if stopped_first:
            os.kill(worker, signal.SIGSTOP)
            assert server.complete("Two slots", rank=0)
        os.kill(worker, signal.SIGKILL)
        started = time.monotonic()
        server.process.wait(90)
        assert time.monotonic() - started < 60
        assert server.left() == []
        assert "RayWorkerProc rank=[1] died unexpectedly" in server.log.read_text()
    finally:
        server.kill()


def _ray_worker(log: str, rank: int) -> int:
    """The process of the Ray actor that is the worker of `rank`, by the line it logs at start."""
    found = re.search(rf"pid=(\d+)[,)][^\n]*dwdp rank {rank}: ", log)
    assert found, log[-4000:]
    return int(found[1])
