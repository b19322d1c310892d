"""Runs the tests of this folder under Triton's interpreter, which must be chosen before Triton is first imported.

Other tests of the same run may have imported Triton (vLLM does). So, unless TRITON_INTERPRET=1 was set from outside, the
set-up of the first test here runs all that were selected, in other processes with it set, one for each of two cores, of
which each takes the next test that the other has not; every test then reports what it did there, and how long.
`TRITON_INTERPRET=1 pytest tests/kernels` runs them directly, which is what to debug with.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RESULTS = "DWDP_KERNEL_RESULTS"
#: A folder in which a process makes a file for each test that it takes.
TAKEN = "DWDP_KERNEL_TAKEN"

#: The interpreter computes on one core.
PROCESSES = min(2, len(os.sched_getaffinity(0)))


class Found(NamedTuple):
    """What became of a test in its process."""

    outcome: str
    text: str
    seconds: float = 0.0


#: By node id; empty until they have run.
_found: dict[str, Found] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In another process: write down what became of a test."""
    path = os.environ.get(RESULTS)
    if path and (report.when == "call" or report.outcome != "passed"):
        found = Found(report.outcome, report.longreprtext or str(report.longrepr), report.duration)
        with open(path, "a") as file:
            file.write(json.dumps([report.nodeid, *found]) + "\n")


def _taken(items: list[pytest.Item], folder: Path) -> Iterator[pytest.Item]:
    for number, item in enumerate(items):
        with contextlib.suppress(FileExistsError):
            (folder / str(number)).touch(exist_ok=False)
            yield item


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """In another process: run those that no other has taken."""
    if not (folder := os.environ.get(TAKEN)):
        return None
    taken = _taken(session.items, Path(folder))
    item = next(taken, None)
    while item is not None:
        following = next(taken, None)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following
    return True


def _run(items: list[Any], taken: str) -> tuple[dict[str, Found], str]:
    """Those of them that another process leaves, in one process; what it did, and how it ended."""
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        results, chosen = Path(folder) / "results", Path(folder) / "chosen"
        chosen.write_text("\n".join(item.nodeid for item in items))
        environment = os.environ | {"TRITON_INTERPRET": "1", RESULTS: str(results), TAKEN: taken}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{chosen}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if results.exists():
            for line in results.read_text().splitlines():
                nodeid, *told = json.loads(line)
                found[nodeid] = Found(*told)
    return found, f"exit {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Run all of them before the first."""
    if INTERPRETED or _found:
        return
    items = [other for other in item.session.items if HERE in other.path.parents]
    with tempfile.TemporaryDirectory() as taken, ThreadPoolExecutor(PROCESSES) as pool:
        ended = list(pool.map(lambda _: _run(items, taken), range(PROCESSES)))
    lost = Found("failed", "no interpreter's process gave a result; " + "; ".join(said for _, said in ended))
    _found.update({other.nodeid: lost for other in items})
    for found, _ in ended:
        _found.update(found)


def pytest_pyfunc_call(pyfuncitem: Any) -> bool | None:
    """Report what the other process found, instead of calling the test."""
    if INTERPRETED:
        return None
    found = _found[pyfuncitem.nodeid]
    if found.outcome == "skipped":
        pytest.skip(found.text)
    if found.outcome == "failed":
        pytest.fail(found.text, pytrace=False)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """For `--durations`: the time that the test took there."""
    report = yield
    if not INTERPRETED and call.when == "call" and item.nodeid in _found:
        report.duration = _found[item.nodeid].seconds
    return report
