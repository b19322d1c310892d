"""Kernels are compiled ahead in threads, and they are those that forwards of these sizes launch: no fewer, no more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.timeout(200)
def test_what_is_compiled_ahead_is_what_is_launched() -> None:
    """In a process of its own, in which Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.layers_ahead"]
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=190)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    assert found["launched"] == found["compiled"] == found["calls"] > 30
    assert found["again"] == 0 == found["in_main"]
    assert (found["missing"], found["promises"]) == (1, 0), "a kernel that failed took others with it"
    if len(os.sched_getaffinity(0)) > 1:
        assert found["threads"] > 1
