"""Every check and benchmark on GPUs. `python -m ci.checks.gpu [STAGE ...] [--out FOLDER]`.

One GPU is enough for all stages but "link" and "serve", which need two, and "four"; the others see the first one only.

Stages run in order of value, each as processes of its own with a time limit below eight minutes. What a stage found goes
into FOLDER/gpu_check.json after every step, with its raw results beside it, so that a run that was cut off goes on where it
was: steps that passed are left out unless --again is given. Exits with 1 if a step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ci.checks.gpu_stages import STAGES, Step
from ci.root import ROOT


@dataclass
class Found:
    """How a step ended."""

    step: str
    code: int | None  # None: not done in time
    seconds: float
    last: str  # the last line it printed

    @property
    def passed(self) -> bool:
        return self.code == 0


def command(step: Step, out: Path, cpu: bool) -> list[str]:
    """Its words on this machine; raises ValueError where there are none without a GPU."""
    words = step.trial if cpu else step.words
    if words is None:
        raise ValueError(f"{step.name} needs a GPU")
    return [sys.executable if word == "python" else word.format(out=out) for word in words]


def run_step(step: Step, name: str, out: Path, cpu: bool) -> Found:
    """Run a step; what it prints goes to a file and, line by line, on."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **step.env}
    if not cpu:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible()[: step.gpus])
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    log = out / f"{name.replace('/', '-').replace(' ', '_')}.log"
    begun, last = time.monotonic(), ""
    with log.open("wb") as stream:
        try:
            process = subprocess.Popen(
                command(step, out, cpu),
                cwd=ROOT,
                env=env,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Found(name, 127, 0.0, str(error))
        code: int | None
        try:
            code = process.wait(step.limit_s)
        except subprocess.TimeoutExpired:
            code = None
            last = f"not done after {step.limit_s:.0f} s"
        finally:
            # What it started may still run: engines are in its session.
            _end(process.pid)
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    print("\n".join(lines[-60:]), flush=True)
    return Found(name, code, time.monotonic() - begun, last or (lines[-1][:200] if lines else ""))


def _end(session: int) -> None:
    """Kill what a step started, servers in sessions of their own too; of a step that has ended, its own session alone."""
    started = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(session).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def visible() -> list[str]:
    """The GPUs of this process as CUDA_VISIBLE_DEVICES names them; none where the driver's tool lists none."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def steps(stages: list[str], gpus: int) -> Iterator[tuple[str, Step]]:
    """Those of `stages` for which `gpus` are enough, by full name; without a GPU those that can be tried there."""
    for stage in stages:
        for step in STAGES[stage]:
            if step.gpus <= gpus or (gpus == 0 and step.trial is not None):
                yield f"{stage}/{step.name}", step


def load(path: Path) -> dict[str, Found]:
    """What earlier runs found; nothing where there is no such file."""
    if not path.exists():
        return {}
    return {item["step"]: Found(**item) for item in json.loads(path.read_text())}


def main() -> int:
    """Run what has not passed yet and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (all)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / ".cache" / "gpu_check", help="folder of results (%(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="also steps that passed")
    parser.add_argument("--cpu", action="store_true", help="what can be tried without a GPU: figures mean nothing")
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin no step after this many seconds")
    args = parser.parse_args()
    if unknown := [stage for stage in args.stages if stage not in STAGES]:
        parser.error(f"no stage {', '.join(unknown)}: there are {', '.join(STAGES)}")
    out: Path = args.out.resolve()
    (out / "tables").mkdir(parents=True, exist_ok=True)
    results = out / "gpu_check.json"
    found, begun = load(results), time.monotonic()
    gpus = 0 if args.cpu else len(visible())
    if not gpus and not args.cpu:
        parser.error(
            "no GPU is visible (nvidia-smi -L, CUDA_VISIBLE_DEVICES): --cpu tries what can be tried without one"
        )
    wanted = dict(steps(args.stages or list(STAGES), gpus))
    for name, step in wanted.items():
        if name in found and found[name].passed and not args.again:
            print(f"gpu check: {name} passed earlier", flush=True)
            continue
        if time.monotonic() - begun > args.limit_s:
            print(f"gpu check: {name} not run: out of time", flush=True)
            continue
        print(f"gpu check: {name}, at most {step.limit_s:.0f} s", flush=True)
        found[name] = run_step(step, name, out, args.cpu)
        results.write_text(json.dumps([asdict(item) for item in found.values()], indent=1))
    print(f"\n{'step':30} {'result':12} {'s':>6}  last line")
    for name in wanted:
        item = found.get(name)
        result = (
            "not run" if item is None else "passed" if item.passed else "too slow" if item.code is None else "FAILED"
        )
        print(f"{name:30} {result:12} {item.seconds if item else 0:6.0f}  {item.last[:90] if item else ''}")
    return int(any(name not in found or not found[name].passed for name in wanted))


if __name__ == "__main__":
    sys.exit(main())
