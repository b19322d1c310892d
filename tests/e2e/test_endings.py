"""How offline programs end, and what several LLMs of one program do to each other."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import REPO, Leftovers, dwdp, engine_options, environment, listen_to_ctrl_c, rank_cores

pytestmark = [pytest.mark.e2e, pytest.mark.full]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(family="qwen3_moe", num_experts=16)


class Program:
    """`tests.e2e.program` in a session of its own; `log` is what it prints."""

    def __init__(self, folder: Path, env: dict[str, str], **spec: Any) -> None:
        self.path = folder / "program.log"
        self.before = Leftovers()
        with self.path.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.program", json.dumps(spec)],
                cwd=REPO,
                env=environment(TMPDIR=str(self.before.tmp), **env),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=listen_to_ctrl_c,
            )

    @property
    def log(self) -> str:
        """All it printed so far."""
        return self.path.read_text()

    def tokens(self) -> list[Any]:
        """Tokens of every LLM."""
        return [json.loads(line.split(" ", 1)[1]) for line in self.log.splitlines() if line.startswith("tokens ")]

    def wait(self, timeout_s: float) -> int:
        """Its exit code; raises AssertionError with its log after `timeout_s`."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {timeout_s} s:\n{self.log[-6000:]}") from None

    def left(self) -> list[str]:
        """What stayed after the end."""
        return self.before.check(self.process.pid)

    def left_but_sockets(self) -> list[str]:
        """The same without the socket files, named by UUIDs, that plain vLLM leaves in the temporary folder."""
        return [name for name in self.left() if not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name)]


@pytest.mark.parametrize(
    ("launcher", "end", "status"), [("mp", "return", 0), ("uni", "return", 0), ("mp", "exit", 3), ("mp", "raise", 1)]
)
def test_a_program_that_simply_ends(launcher: str, end: str, status: int, model: Path, tmp_path: Path) -> None:
    program = Program(tmp_path, {}, model=str(model), options=[dwdp(2, launcher=launcher)], end=end)
    assert program.wait(300) == status, program.log[-6000:]
    assert "Processed prompts: 100%" in program.log
    for failure in ("its engine was killed", "exited unexpectedly", "terminate called"):
        assert failure not in program.log
    assert program.left() == []


@pytest.mark.parametrize("launcher", ["mp", "uni"])
def test_ctrl_c(launcher: str, model: Path, tmp_path: Path) -> None:
    """A terminal sends SIGINT to every process of the program."""
    program = Program(tmp_path, {}, model=str(model), options=[dwdp(2, launcher=launcher)], repeats=100, tokens=400)
    deadline = time.monotonic() + 240
    while "Processed prompts:" not in program.log:
        assert program.process.poll() is None and time.monotonic() < deadline, program.log[-6000:]
        time.sleep(0.2)
    time.sleep(2)
    os.killpg(program.process.pid, signal.SIGINT)
    started = time.monotonic()
    assert program.wait(60) != 0
    assert time.monotonic() - started < 10
    assert "KeyboardInterrupt" in program.log and "its engine was killed" not in program.log
    assert program.left() == []


def test_dwdp_then_plain_then_dwdp(model: Path, tmp_path: Path) -> None:
    bind = "|".join(",".join(map(str, cores)) for cores in rank_cores(2))
    program = Program(
        tmp_path, {"VLLM_CPU_OMP_THREADS_BIND": bind}, model=str(model), options=[dwdp(2), engine_options(), dwdp(2)]
    )
    assert program.wait(420) == 0, program.log[-6000:]
    first, plain, last = program.tokens()
    assert first == plain == last
    assert program.left_but_sockets() == []


def test_programs_that_run_beside_a_launch(model: Path, tmp_path: Path) -> None:
    """Children of a program whose LLM is alive, three ranks and plain vLLM: nothing of the launch is theirs."""
    inside = [{"options": [dwdp(3)]}, {"options": [engine_options()]}]
    program = Program(tmp_path, {}, model=str(model), options=[dwdp(2)], inside=inside)
    assert program.wait(420) == 0, program.log[-6000:]
    assert program.log.count("inside ended with 0") == 2, program.log[-6000:]
    # vLLM's line about each worker's cores: only those of dwdp are given lists.
    bound = re.findall(r"VLLM_CPU_OMP_THREADS_BIND='(.*?)'", program.log)
    assert len(bound) == 6 and bound.count("auto") == 1
    assert program.left_but_sockets() == []
