"""Runs the tests of this folder under Triton's interpreter, which must be chosen before Triton is first imported.

Other tests of the same run may have imported Triton (vLLM does). So, unless TRITON_INTERPRET=1 was set from outside, the
first test here runs all that were selected in one other process with it set, and every test then reports what it did
there. `TRITON_INTERPRET=1 pytest tests/kernels` runs them directly, which is what to debug with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RESULTS = "DWDP_KERNEL_RESULTS"

#: Node id -> (outcome, text), of the other process; empty until it has run.
_found: dict[str, tuple[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the other process: write down what became of a test."""
    path = os.environ.get(RESULTS)
    if path and (report.when == "call" or report.outcome != "passed"):
        with open(path, "a") as file:
            file.write(json.dumps([report.nodeid, report.outcome, report.longreprtext or str(report.longrepr)]) + "\n")


def _run_all(items: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results, chosen = Path(folder) / "results", Path(folder) / "chosen"
        chosen.write_text("\n".join(item.nodeid for item in items))
        environment = os.environ | {"TRITON_INTERPRET": "1", RESULTS: str(results)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{chosen}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if results.exists():
            for line in results.read_text().splitlines():
                nodeid, outcome, text = json.loads(line)
                _found[nodeid] = (outcome, text)
        said = done.stdout[-2000:] + done.stderr[-2000:]
        lost = f"the interpreter's process gave no result (exit {done.returncode}): {said}"
        for item in items:
            _found.setdefault(item.nodeid, ("failed", lost))


def pytest_pyfunc_call(pyfuncitem: Any) -> bool | None:
    """Report what the other process found, instead of calling the test."""
    if INTERPRETED:
        return None
    if not _found:
        _run_all([item for item in pyfuncitem.session.items if HERE in item.path.parents])
    outcome, text = _found[pyfuncitem.nodeid]
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True
