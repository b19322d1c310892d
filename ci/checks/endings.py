"""How programs with two ranks end, many times and with a busy core beside them: exit status, words in the output, leftovers.

    python -m ci.checks.endings --count 50

Each program (tests/e2e/program.py) builds an `LLM`, generates and ends in one way: at its last line, by `sys.exit`, by an
exception, or after `del llm`. Ends with 1 where a status, a line or something left behind is not as it should be.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path

from ci.root import ROOT
from examples.checkpoints import CheckpointSpec, write_checkpoint
from tests.e2e.engines import Leftovers, dwdp, environment

#: The status that each way has to end with.
WAYS = {"return": 0, "exit": 3, "raise": 1, "del": 0}
BAD = ("terminate called", "exited unexpectedly", "was killed by", "Fatal Python error", "Exception ignored")
LIMIT_S = 300


def burn() -> None:
    """Keep a core busy."""
    while True:
        pass


def run(model: Path, way: str, log: Path) -> tuple[int, list[str]]:
    """Status of one program, or -1 where it did not end, and every line of it that only failures write, with what stayed."""
    before = Leftovers()
    spec = {"model": str(model), "options": [dwdp(2)], "end": way, "tokens": 2}
    with log.open("w") as stream:
        program = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.program", json.dumps(spec)],
            cwd=ROOT,
            env=environment(TMPDIR=str(before.tmp)),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        status = program.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        program.kill()
        status = -1
    bad = [line for line in log.read_text().splitlines() if any(word in line for word in BAD)]
    return status, bad + [f"left: {name}" for name in before.check(program.pid)]


def main() -> int:
    """Count the endings; 1 where one was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--no-load", action="store_true", help="without the busy core")
    args = parser.parse_args()
    busy = [] if args.no_load else [multiprocessing.Process(target=burn, daemon=True)]
    for process in busy:
        process.start()
    counts: collections.Counter[str] = collections.Counter()
    lines: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(CheckpointSpec(num_layers=1, num_experts=4), Path(folder) / "model")
        for number, way in zip(range(args.count), itertools.cycle(WAYS), strict=False):
            status, bad = run(model, way, Path(folder) / f"{number}.log")
            right = status == WAYS[way]
            counts[f"{way}: status {status}, {'as it should be' if right else f'not {WAYS[way]}'}"] += 1
            lines.update(bad)
            print(f"{number + 1} of {args.count}: {way} ended with {status}, {len(bad)} bad lines", *bad, flush=True)
    print(*(f"{count} x {what}" for what, count in sorted(counts.items())), sep="\n")
    print(f"bad lines: {sum(lines.values())}", *(f"{count} x {line}" for line, count in lines.items()), sep="\n")
    return int(bool(lines) or any("not" in what for what in counts))


if __name__ == "__main__":
    sys.exit(main())
