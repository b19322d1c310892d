"""Tests that run in other processes are reported as if they had run here (tests/side_by_side.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.side_by_side import PROCESSES

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
from pathlib import Path
from tests.side_by_side import Apart, register

def pytest_configure(config):
    register(config, Apart(Path(__file__).parent / "apart", CHOSEN="there"))
"""
FIRST = """
import os, warnings
import pytest

@pytest.fixture(scope="module")
def place():
    yield os.getpid()
    print("the end of a module")
    raise ValueError("at the end")

def test_right(place):
    assert os.environ["CHOSEN"] == "there" and os.getppid() == int(os.environ["ASKED"])

@pytest.mark.parametrize("given", [1, 2])
def test_one_of_two(given):
    print("printed before")
    assert given == 1

@pytest.mark.skip(reason="not today")
def test_skipped():
    pass

@pytest.mark.timeout(1)
def test_warns():
    warnings.warn("beware", RuntimeWarning)

def test_left_out():
    raise AssertionError

def test_last(place):
    pass
"""
HERE = """
import os

def test_here():
    os.environ["ASKED"] = str(os.getpid())
    assert "CHOSEN" not in os.environ
"""


def run(folder: Path, *words: str, **files: str) -> tuple[int, str]:
    """Status and output of pytest on files in `folder`, those of which the names begin with `apart_` elsewhere."""
    (folder / "apart").mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    for name, text in files.items():
        where = folder / "apart" if name.startswith("apart_") else folder
        (where / f"test_{name}.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-ra",
        "-p",
        "no:cacheprovider",
        *words,
        *(f"test_{n}.py" for n in files if n == "a"),
    ]
    command += [f"apart/test_{name}.py" for name in files if name.startswith("apart_")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_every_outcome_is_reported(tmp_path: Path) -> None:
    code, said = run(tmp_path, "-k", "not left_out", "--durations=0", "-vv", a=HERE, apart_first=FIRST)
    assert code == 1, said
    for told in (
        "1 failed, 5 passed, 1 skipped, 1 deselected, 1 warning, 1 error in",
        "FAILED apart/test_apart_first.py::test_one_of_two[2] - assert 2 == 1",
        "ERROR apart/test_apart_first.py::test_last - ValueError: at the end",
        "test_apart_first.py:19: not today",
        "RuntimeWarning: beware",
        "printed before",
        "teardown apart/test_apart_first.py::test_last",
    ):
        assert told in said, (told, said)


def test_a_process_that_dies_takes_no_other_along(tmp_path: Path) -> None:
    """What it had not told fails, with how it ended; a module is run by the other."""
    dies = "import os\ndef test_told(): pass\ndef test_dies(): os._exit(7)\ndef test_behind(): pass\n"
    fine = "import time\ndef test_fine(): time.sleep(0.1)\ndef test_too(): pass\n"
    code, said = run(tmp_path, apart_a=dies, apart_b=fine, apart_c=fine)
    assert code != 0
    assert f"{'2' if PROCESSES > 1 else '6'} failed, {'5' if PROCESSES > 1 else '1'} passed in" in said, said
    assert "no process gave a report of this test" in said and "exit 7" in said


@pytest.mark.parametrize("status", [3, -9])
def test_an_end_that_is_not_well_fails_the_run(tmp_path: Path, status: int) -> None:
    end = "os._exit(3)" if status > 0 else "os.kill(os.getpid(), 9)"
    code, said = run(tmp_path, apart_a=f"import atexit, os\ndef test_it(): atexit.register(lambda: {end})\n")
    assert code == 3 and "1 passed in" in said and f"ended with {status}" in said, said


def test_each_process_has_other_modules_and_none_runs_twice(tmp_path: Path) -> None:
    """What measures time runs first, in neither of them."""
    text = "import os, time\nfrom pathlib import Path\ndef test_it():\n    log = Path({!r})\n"
    text += "    with log.open('a') as file: file.write(f'{{os.getpid()}}\\n')\n"
    wait = "    for _ in range(1200):  # for the other process to take one\n"
    wait += f"        if len(set(log.read_text().split()[1:])) == {PROCESSES}: break\n"
    wait += "        time.sleep(0.05)\n"
    alone = "import pytest\npytestmark = pytest.mark.alone\n" + text + "    assert 'CHOSEN' not in os.environ\n"
    files = {f"apart_{i}": text.format(str(tmp_path / "log")) + wait for i in range(6)}
    code, said = run(tmp_path, **files, apart_7=alone.format(str(tmp_path / "log")))
    assert code == 0 and "7 passed" in said, said
    first, *pids = (tmp_path / "log").read_text().split()
    assert said.index("apart_7.py") < said.index("apart_0.py") and first not in pids
    assert len(pids) == 6 and len(set(pids)) == PROCESSES
