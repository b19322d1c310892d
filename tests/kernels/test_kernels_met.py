"""No request is the first to launch a kernel: whatever its number of tokens, a size of the warm-up has launched it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def looked(word: str, timeout_s: float) -> dict[str, int]:
    """In a process of its own, in which Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.kernels_met", word]
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(300)
def test_layers_of_any_shape_and_tiles() -> None:
    found = looked("odd", 290)
    assert found["layers"] > 60 and found["kernels"] > 300


@pytest.mark.timeout(300)
@pytest.mark.full
def test_every_shape_of_the_shipped_tables_and_vllms_tiles() -> None:
    found = looked("300", 290)
    assert found["layers"] >= 24 and found["kernels"] < found["launches"] / 10


@pytest.mark.full
@pytest.mark.timeout(600)
def test_up_to_the_largest_steps() -> None:
    assert looked("16384", 590)["launches"] > 24 * 2 * 16000
