"""Tests of a folder in processes of their own, one for each of two cores, while the run that was asked for reports them.

Each process takes the next test, or module of tests, that no other has. Reports travel whole: outcome, text, captured
output, seconds, and warnings. A test whose process gave no report fails with the last lines of all of them.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

#: In such a process: the folder of its run, and its number.
RUN = "DWDP_TESTS_SIDE_BY_SIDE"
PROCESSES = min(2, len(os.sched_getaffinity(0)))
#: Without a test that ends, all processes are given up; the limits of single tests hold in their processes.
LIMIT_S = 900.0
#: For the end of a process that has no test left, or was told to end.
END_S = 60.0


class Told(NamedTuple):
    """What a process tells of a test: pytest's reports, and warnings as (kind, text, file, line)."""

    reports: list[dict[str, Any]]
    warnings: list[tuple[str, str, str, int]]


class Apart:
    """A plugin of the run that was asked for. `modules`: a process takes a whole module, whose fixtures its tests share."""

    def __init__(self, folder: Path, modules: bool = True, **environment: str) -> None:
        self.folder, self.modules, self.environment = folder, modules, environment
        self.told: dict[str, Told] = {}
        self.run: Path | None = None
        self.processes: list[subprocess.Popen[bytes]] = []
        self.read: list[int] = []

    def _has(self, item: pytest.Item) -> bool:
        return self.folder in item.path.parents and item.get_closest_marker("alone") is None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Tests that measure time go first: they run here, while no process runs others."""
        places = [place for place, item in enumerate(items) if self.folder in item.path.parents]
        ordered = sorted((items[place] for place in places), key=self._has)
        for place, item in zip(places, ordered, strict=True):
            items[place] = item

    def _start(self, session: pytest.Session) -> Path:
        items = [item for item in session.items if self._has(item)]
        batches = (
            [[item.nodeid for item in group] for _, group in itertools.groupby(items, key=lambda item: item.path)]
            if self.modules
            else [[item.nodeid] for item in items]
        )
        run = Path(tempfile.mkdtemp(prefix="pytest-side-by-side-"))
        (run / "batches").write_text(json.dumps(batches))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += dict.fromkeys(str(item.path) for item in items)
        for number in range(PROCESSES):
            environment = os.environ | self.environment | {RUN: f"{run}:{number}"}
            with (run / f"log{number}").open("w") as log:
                started = subprocess.Popen(
                    command, cwd=session.config.rootpath, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            self.processes.append(started)
            self.read.append(0)
        return run

    def _read(self, run: Path) -> None:
        for number in range(len(self.processes)):
            with contextlib.suppress(FileNotFoundError), (run / f"told{number}").open("rb") as file:
                file.seek(self.read[number])
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self.read[number] += len(line)
                    nodeid, *told = json.loads(line)
                    self.told[nodeid] = Told(*told)

    def _wait(self, run: Path, nodeid: str) -> Told | None:
        last, heard = time.monotonic(), list(self.read)
        while nodeid not in self.told:
            ended = all(process.poll() is not None for process in self.processes)
            self._read(run)
            if heard != self.read:
                last, heard = time.monotonic(), list(self.read)
            if ended:
                break
            if time.monotonic() > last + LIMIT_S:
                for process in self.processes:
                    process.kill()
            time.sleep(0.02)
        return self.told.pop(nodeid, None)

    def _lost(self, run: Path) -> str:
        said = [
            f"exit {process.poll()}: {(run / f'log{i}').read_text()[-4000:]}"
            for i, process in enumerate(self.processes)
        ]
        return "no process gave a report of this test; " + "; ".join(said)

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Report what another process found, instead of running the test."""
        if not self._has(item):
            return None
        if self.run is None:
            self.run = self._start(item.session)
        if item.config.pluginmanager.hasplugin("timeout"):
            item.config.hook.pytest_timeout_cancel_timer(item=item)  # there the same limit holds
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        if told := self._wait(self.run, item.nodeid):
            for data in told.reports:
                if isinstance(data["longrepr"], list):
                    data["longrepr"] = tuple(data["longrepr"])  # of a skipped one; JSON has no tuples
                report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
                hook.pytest_runtest_logreport(report=report)
            for kind, text, file, line in told.warnings:
                warnings.warn_explicit(text, getattr(builtins, kind, UserWarning), file, line)
        else:
            lost = pytest.TestReport(item.nodeid, item.location, {}, "failed", self._lost(self.run), "call")
            hook.pytest_runtest_logreport(report=lost)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Iterator[None]:
        """A process that does not end well fails the run, whatever its tests said."""
        if self.run is not None:
            early = bool(session.shouldstop or session.shouldfail) or exitstatus not in (0, 1)
            for number, process in enumerate(self.processes):
                if early:
                    process.send_signal(signal.SIGINT)  # pytest then tears down
                try:
                    code = process.wait(END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    code = process.wait()
                if code not in (0, 1) and not early:
                    session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
                    print(f"\n{process.args} ended with {code}: {(self.run / f'log{number}').read_text()[-4000:]}")
            shutil.rmtree(self.run, ignore_errors=True)
        return (yield)


class Taking:
    """A plugin of each process: runs what no other has taken, and tells it."""

    def __init__(self, run: Path, number: str) -> None:
        self.run, self.file, self.parent = run, run / f"told{number}", os.getppid()
        self.reports: list[dict[str, Any]] = []
        self.warnings: list[tuple[str, str, str, int]] = []

    def _taken(self, session: pytest.Session) -> Iterator[pytest.Item]:
        items = {item.nodeid: item for item in session.items}
        for number, batch in enumerate(json.loads((self.run / "batches").read_text())):
            if os.getppid() != self.parent:
                return  # nobody reads
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                (self.run / f"taken{number}").touch(exist_ok=False)
                yield from (items[nodeid] for nodeid in batch)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """As pytest's, of those."""
        taken = self._taken(session)
        item = next(taken, None)
        while item is not None:
            following = next(taken, None)
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            told = json.dumps([item.nodeid, self.reports, self.warnings])
            with self.file.open("a") as file:
                file.write(told + "\n")
            self.reports, self.warnings = [], []
            item = following
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """Note each phase's report."""
        report = yield
        self.reports.append(item.config.hook.pytest_report_to_serializable(config=item.config, report=report))
        return report

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage) -> None:
        """Note it for the test that is told next."""
        about = warning_message
        self.warnings.append((about.category.__name__, str(about.message), about.filename, about.lineno))


def register(config: pytest.Config, *apart: Apart) -> None:
    """`apart` in the run that was asked for; in their processes, what takes tests."""
    # Taken out: tests start pytest too.
    if run := os.environ.pop(RUN, None):
        folder, number = run.rsplit(":", 1)
        config.pluginmanager.register(Taking(Path(folder), number))
        return
    for plugin in apart:
        config.pluginmanager.register(plugin)
