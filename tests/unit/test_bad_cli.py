"""What a user sees of a refused `vllm serve`: the last line of the error is ours, soon, and nothing stays."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("vllm")

from tests.e2e.engines import environment, free_port, processes
from tests.unit.leftovers import WAIT_S

VLLM = Path(sys.executable).parent / "vllm"

#: An import of vLLM takes 10 s; vLLM's supervisor of several ports, and each of its servers, do one after the other.
LIMIT_S = 120
OURS = "vllm_dwdp.errors.DwdpError: "

CASES: dict[str, tuple[list[str], list[str]]] = {
    "one-rank": ([], [OURS, "--data-parallel-size is 1", "raise it"]),
    "headless": (["--data-parallel-size", "2", "--headless"], [OURS, "--headless", "start one `vllm serve`"]),
    "multi-port": (
        ["--data-parallel-size", "2", "--data-parallel-size-local", "2", "--data-parallel-multi-port-external-lb"],
        [OURS, "multi-port load balancing", "leave it out"],
    ),
    # vLLM's own, before anything of ours.
    "port-taken": (["--data-parallel-size", "2"], ["OSError", "Address already in use"]),
}


class Run(NamedTuple):
    process: subprocess.Popen[bytes]
    log: Path
    folder: Path


@pytest.fixture(scope="module")
def runs(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """All of them at once, as most of the time is vLLM's import."""
    found = {}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, (arguments, _) in CASES.items():
            folder = tmp_path_factory.mktemp(name)
            log = folder.parent / f"{name}.log"
            port = taken.getsockname()[1] if name == "port-taken" else free_port()
            command = [str(VLLM), "serve", str(tiny_moe), "--port", str(port)]
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    [*command, "--distributed-executor-backend", "dwdp", *arguments],
                    env=environment(TMPDIR=str(folder)),
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            found[name] = Run(process, log, folder)
        yield found
    for run in found.values():
        for line in processes(run.process.pid):
            os.kill(int(line.split()[0]), signal.SIGKILL)
        run.process.wait()


@pytest.mark.parametrize("name", CASES)
def test_last_line(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    code = run.process.wait(LIMIT_S)
    log = run.log.read_text()
    # The supervisor of several ports forwards no exit status.
    assert code == (0 if name == "multi-port" else 1), log
    errors = [line for line in log.splitlines() if "Error: " in line]
    missing = [word for word in CASES[name][1] if not errors or word not in errors[-1]]
    assert not missing, f"{missing} not in the last of {errors}"
    # Python's resource trackers end a moment after what they track.
    deadline = time.monotonic() + WAIT_S
    while left := [*processes(run.process.pid), *run.folder.iterdir()]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)
