"""ci/checks/mutants.py: the list fits this tree, and what a test catches is told from what none does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ci.checks import mutants
from ci.checks.mutants import Mutant

CODE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = """
import code_of_tree

def test_double():
    assert code_of_tree.double(3) == 6
"""
ENTRY = """
[[mutant]]
id = "{id}"
file = "code_of_tree.py"
old = "{old}"
new = "{new}"
tests = ["tests/unit/test_code.py"]
why = "A tree of this test."
"""


def test_the_list_fits_this_tree() -> None:
    listed = mutants.load(mutants.LIST)
    assert listed and mutants.misfits(listed, mutants.ROOT) == []


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project under git, whose test calls one of two functions."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # quicker, and none is needed
    root = tmp_path / "project"
    (root / "tests" / "unit").mkdir(parents=True)
    (root / "code_of_tree.py").write_text(CODE)
    (root / "tests" / "unit" / "test_code.py").write_text(TESTS)
    (root / "untracked.py").write_text("raise SystemExit")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "code_of_tree.py", "tests"], cwd=root, check=True)
    return root


def run(tree: Path, capsys: pytest.CaptureFixture[str], *entries: str, options: str = "") -> tuple[int, list[str]]:
    listed = tree.parent / "list.toml"
    listed.write_text("".join(entries))
    status = mutants.main(options.split(), tree, listed)
    return status, capsys.readouterr().out.splitlines()


def entry(id: str, old: str, new: str) -> str:
    return ENTRY.format(id=id, old=old, new=new)


TRIPLE = entry("triple", "return 2 * x", "return 3 * x")
BROKEN = entry("broken", "def half(x):", "def half(x:")
THIRD = entry("third", "x / 2", "x / 3")


def test_caught_broken_and_surviving_mutants(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(tree, capsys, TRIPLE, BROKEN, THIRD, options="--jobs 2")
    assert status == 1
    unchanged, triple, broken, third, counts = lines
    assert unchanged.split()[0] == "unchanged" and "passed" in unchanged
    assert triple.endswith("caught by tests/unit/test_code.py::test_double")
    assert "caught by: error, tests/unit/test_code.py" in broken
    assert third.endswith("SURVIVED")
    assert counts == "3 mutants: 2 caught (1 by errors, 0 by timeouts), 1 survived, 0 retired"
    assert (tree / "code_of_tree.py").read_text() == CODE
    assert run(tree, capsys, TRIPLE, BROKEN, THIRD, options="--only triple --no-baseline")[0] == 0


def test_which_mutants_are_meant(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = entry("triple-too", "return 2 * x", "return 4 * x")
    for only, ids in (
        ("triple", ["triple"]),
        ("trip", ["triple", "triple-too"]),
        ("triple third", ["triple", "third"]),
    ):
        _, lines = run(tree, capsys, TRIPLE, more, THIRD, options=f"--list --only {only}")
        assert [line.split()[0] for line in lines] == ids


def test_the_rest_of_the_tests(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "tests/unit/test_more.py").write_text(
        "from code_of_tree import half\ndef test_half():\n    assert half(6) == 3"
    )
    # This one, in the place of the real one, fails for every mutant.
    (tree / "tests/unit/test_mutants.py").write_text("def test_list():\n    assert False")
    subprocess.run(["git", "add", "tests"], cwd=tree, check=True)
    status, lines = run(tree, capsys, THIRD, options="--rest")
    assert status == 0 and lines[1].endswith("caught by tests/unit/test_more.py::test_half (not named)")


def test_a_test_that_does_not_end(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants, "NAMED_LIMIT_S", 3)
    endless = Mutant(
        "endless", "code_of_tree.py", "return 2 * x", "while True: pass", ("tests/unit/test_code.py",), "why"
    )
    found = mutants.judge(tree, mutants.tracked(tree), endless, rest=False)
    assert (found.verdict, found.first) == ("timeout", "no end after 3 s")


def test_tests_that_fail_unchanged_are_no_catch(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "code_of_tree.py").write_text(CODE.replace("2 * x", "2 * x + 1"))
    status, lines = run(tree, capsys, TRIPLE)
    assert status == 1 and lines[-1] == "without any mutant: failed, tests/unit/test_code.py::test_double"
    (tree / "tests/unit/test_code.py").write_text("import not_there")
    status, lines = run(tree, capsys, TRIPLE)
    assert status == 1 and lines[-1].startswith("without any mutant: error, ")


def test_a_text_that_is_gone_fails_before_anything_runs(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice, gone = entry("twice", "return", "yield"), entry("gone", "return 4 * x", "return 0")
    status, lines = run(tree, capsys, TRIPLE, twice, gone)
    assert status == 1 and [line.split(",")[0] for line in lines] == [
        "twice: its text is 2 times in code_of_tree.py",
        "gone: its text is 0 times in code_of_tree.py",
    ]
    retired = gone + 'retired = "numbers are doubled elsewhere"\n'
    status, lines = run(tree, capsys, TRIPLE, retired, options="--no-baseline")
    assert status == 0 and lines[-1].endswith("1 retired")
    status, lines = run(tree, capsys, TRIPLE, retired, options="--list")
    assert status == 0 and "numbers are doubled elsewhere" in lines[1]


def test_entries_that_are_wrong(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for entries, words in (
        (TRIPLE + TRIPLE, "triple"),
        (TRIPLE + "more = 1\n", "more"),
        ('[[mutant]]\nid = "a"', "why"),
    ):
        with pytest.raises(ValueError, match=words):
            run(tree, capsys, entries)
    for nowhere in ("test_nothing.py", "test_code.py::test_moved[1]"):
        status, lines = run(tree, capsys, TRIPLE.replace("test_code.py", nowhere))
        assert (status, lines) == (1, [f"triple: there is no tests/unit/{nowhere}"])
