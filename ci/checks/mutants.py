"""Would a test notice? Breaks one line after the other, each in a copy: `.venv/bin/python -m ci.checks.mutants`.

mutants.toml lists the mutants: a text of one file, what it is replaced by, the tests that should fail then, and why
it matters. Copies hold the files that git tracks. The named tests run first, once unchanged, when they have to pass; with
`--rest` all other unit tests follow where they let a mutant live. Whoever changes a line that a mutant names moves the
mutant with it, or retires it with a reason (`retired = "..."`).

Exit status 1: a mutant survived, the tests failed without any, or a text is no longer there exactly once, which is said
before anything runs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Literal, NamedTuple

import tomllib

from ci.root import ROOT

LIST: Final = Path(__file__).with_suffix(".toml")
REST: Final = ("tests/unit",)
#: Compares the list with the tree, and so fails for every mutant.
ABOUT_MUTANTS: Final = "tests/unit/test_mutants.py"
NAMED_LIMIT_S: Final = 300
REST_LIMIT_S: Final = 1200

#: failed: a test failed. error: tests could not be collected, or set up. timeout: they did not end.
Verdict = Literal["passed", "failed", "error", "timeout"]
_FIRST = re.compile(r"^(FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """`old`, which `file` has exactly once, replaced by `new`. tests: files or node ids. retired: why it is kept only as a
    record."""

    id: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str
    retired: str = ""


class Run(NamedTuple):
    """One run of tests; first: the test that failed, or what could not be run."""

    verdict: Verdict
    first: str
    seconds: float


def load(path: Path) -> list[Mutant]:
    """The list; raises ValueError for entries that are incomplete, unknown keys and ids that are there twice."""
    known = {field.name for field in fields(Mutant)}
    found = []
    for entry in tomllib.loads(path.read_text())["mutant"]:
        name = entry.get("id", "?")
        lacking = known - {"retired"} - set(entry)
        if lacking or set(entry) - known:
            raise ValueError(f"mutant {name}: lacks {sorted(lacking)}, has {sorted(set(entry) - known)} too much")
        found.append(Mutant(**{**entry, "tests": tuple(entry["tests"])}))
    if twice := [name for name, count in Counter(mutant.id for mutant in found).items() if count > 1]:
        raise ValueError(f"ids that are there twice: {twice}")
    return found


def misfits(mutants: Iterable[Mutant], root: Path) -> list[str]:
    """One line for each mutant that does not fit the tree; retired ones always do."""
    lines = []
    for mutant in mutants:
        if mutant.retired:
            continue
        path = root / mutant.file
        times = path.read_text().count(mutant.old) if path.is_file() else 0
        if times != 1:
            lines.append(f"{mutant.id}: its text is {times} times in {mutant.file}, not once: move it, or retire it")
        if mutant.old == mutant.new or not mutant.tests or not mutant.why:
            lines.append(f"{mutant.id}: changes nothing, names no test or gives no reason")
        for test in mutant.tests:
            name, _, function = test.partition("::")
            path = root / name
            # Pytest's error about a test that was moved would count as a catch.
            definition = f"def {function.partition('[')[0]}(" if function else ""
            if not path.is_file() or definition not in path.read_text():
                lines.append(f"{mutant.id}: there is no {test}")
    return lines


@contextmanager
def copied(root: Path, files: Sequence[str], mutant: Mutant | None = None) -> Iterator[Path]:
    """A folder with `files` of `root`, one of them changed; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        # Tests with another user have to get through.
        os.chmod(folder, 0o711)
        tree = Path(folder) / "tree"
        for name in files:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name)
        if mutant is not None:
            path = tree / mutant.file
            path.write_text(path.read_text().replace(mutant.old, mutant.new))
        yield tree


def tracked(root: Path) -> list[str]:
    """Files that git tracks and that are there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (root / name).is_file()]


def environment(tree: Path) -> dict[str, str]:
    """Python imports from `tree`, also where this project is installed, and leaves nothing there that could go stale."""
    base = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    temporary = tree.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    return {**base, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(temporary)}


def imported_from(tree: Path) -> Path:
    """Where a Python of `tree` finds the project."""
    code = "import vllm_dwdp; print(vllm_dwdp.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment(tree), capture_output=True, text=True)
    return Path(done.stdout.strip())


def run_tests(tree: Path, tests: Sequence[str], limit_s: float, *more: str) -> Run:
    """Run `tests` of `tree` up to the first that fails; all their processes are ended after `limit_s`."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    started = time.monotonic()
    with (tree.parent / "out").open("w+") as out:
        process = subprocess.Popen(
            [*command, *more, *tests],
            cwd=tree,
            env=environment(tree),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return Run("timeout", f"no end after {limit_s:.0f} s", time.monotonic() - started)
        finally:
            _end(process)
        out.seek(0)
        text = out.read()
    seconds = time.monotonic() - started
    found = _FIRST.search(text)
    first = found[2] if found else " ".join(text.split())[-200:]
    if code == 0:
        return Run("passed", "", seconds)
    # 1: tests ran and some failed; anything else, and errors in fixtures: they could not run.
    failed = code == 1 and found is not None and found[1] == "FAILED"
    return Run("failed" if failed else "error", first, seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a run."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def judge(root: Path, files: Sequence[str], mutant: Mutant, rest: bool) -> Run:
    """The run that caught `mutant`, or the last one that did not."""
    with copied(root, files, mutant) as tree:
        run = run_tests(tree, mutant.tests, NAMED_LIMIT_S)
        if run.verdict == "passed" and rest:
            after = run_tests(tree, REST, REST_LIMIT_S, f"--ignore={ABOUT_MUTANTS}", *_but(mutant.tests))
            run = after._replace(first=f"{after.first} (not named)", seconds=run.seconds + after.seconds)
    return run


def _but(tests: Iterable[str]) -> list[str]:
    return [f"--deselect={test}" for test in tests]


def baseline(root: Path, files: Sequence[str], mutants: Iterable[Mutant]) -> str | None:
    """What is wrong without any mutant; None where the named tests pass, and are those of the copy."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    tests = [test for test in tests if test.split("::")[0] == test or test.split("::")[0] not in tests]
    with copied(root, files) as tree:
        if (tree / "vllm_dwdp").is_dir() and not imported_from(tree).is_relative_to(tree):
            return f"the project is imported from {imported_from(tree)} and not from the copy"
        run = run_tests(tree, tests, REST_LIMIT_S)
    print(f"{'unchanged':<40} {run.seconds:6.1f} s  {run.verdict} {run.first}", flush=True)
    return None if run.verdict == "passed" else f"without any mutant: {run.verdict}, {run.first}"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, listed: Path = LIST) -> int:
    """One line per mutant, then the counts; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="ID", help="these mutants; of an id that no mutant has, those whose ids begin so"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time")
    parser.add_argument("--rest", action="store_true", help="all unit tests where the named ones let a mutant live")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the named tests unchanged first")
    parser.add_argument("--list", action="store_true", help="say what there is and run nothing")
    args = parser.parse_args(arguments)

    mutants = load(listed)
    if args.only:
        known = {mutant.id for mutant in mutants}
        begins = tuple(id for id in args.only if id not in known)
        mutants = [m for m in mutants if m.id in args.only or m.id.startswith(begins)]
    alive = [mutant for mutant in mutants if not mutant.retired]
    if args.list:
        for mutant in mutants:
            state = f" (retired: {mutant.retired})" if mutant.retired else ""
            print(f"{mutant.id:<40} {mutant.file}: {mutant.why}{state}")
        return 0
    if wrong := misfits(mutants, root):
        print(*wrong, sep="\n")
        return 1
    if not alive:
        print("no mutant has such an id")
        return 1
    files = tracked(root)
    if not args.no_baseline and (wrong_now := baseline(root, files, alive)):
        print(wrong_now)
        return 1
    counts: Counter[str] = Counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = pool.map(lambda mutant: judge(root, files, mutant, args.rest), alive)
        for mutant, run in zip(alive, runs, strict=True):
            counts[run.verdict] += 1
            verdict = "SURVIVED" if run.verdict == "passed" else f"caught by: {run.verdict}, {run.first}"
            if run.verdict == "failed":
                verdict = f"caught by {run.first}"
            print(f"{mutant.id:<40} {run.seconds:6.1f} s  {verdict}", flush=True)
    caught = len(alive) - counts["passed"]
    print(
        f"{len(alive)} mutants: {caught} caught ({counts['error']} by errors, {counts['timeout']} by timeouts), "
        f"{counts['passed']} survived, {len(mutants) - len(alive)} retired"
    )
    return 1 if counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
