"""pip with a heartbeat instead of its usual flood: silent while all is well, everything it said when it fails."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Said many times over where wheels lie in local folders, and harmless.
NOISE = ("is ignored: it is either a non-existing path", "[notice]")
UNPACKING = "Installing collected packages:"
HEARTBEAT_S = 15.0


class PipFailed(Exception):
    """pip ended with an error: the message holds its own words."""


class Found(NamedTuple):
    version: str
    needs: tuple[str, ...]  # what it depends on

    @property
    def is_gpu_build(self) -> bool:
        suffix = self.version.partition("+")[2]
        return suffix not in ("", "cpu") or any(name.startswith(("nvidia-", "cuda-")) for name in self.needs)


def _command(python: Path, args: list[str]) -> list[str]:
    return [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *args]


def _worth_showing(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not any(noise in line for noise in NOISE)]


def pip_would_install(python: Path, spec: str) -> Found | None:
    """What pip would take for `spec`, or None if nothing here matches it."""
    args = ["install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-", spec]
    result = subprocess.run(_command(python, args), capture_output=True, text=True)
    if result.returncode != 0:
        if "No matching distribution" in result.stderr:
            return None
        raise PipFailed("pip could not look for " + spec + ": " + " / ".join(_worth_showing(result.stderr)[-3:]))
    metadata = json.loads(result.stdout)["install"][0]["metadata"]
    return Found(metadata["version"], tuple(need.lower() for need in metadata.get("requires_dist", [])))


def _stage(lines: list[str]) -> str:
    for line in reversed(lines):
        if line.startswith(UNPACKING):
            return f"unpacking {line.count(',') + 1} packages"
    found = sum(line.startswith(("Collecting ", "Processing ")) for line in lines)
    return f"fetching, {found} packages so far"


def pip_install(python: Path, args: list[str], say: Callable[[str], None]) -> None:
    process = subprocess.Popen(
        _command(python, ["install", "--progress-bar", "off", *args]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    began = time.monotonic()
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            say(f"  ... {_stage(lines)}, {time.monotonic() - began:.0f} s")

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
        code = process.wait()
    finally:
        done.set()
    if code != 0:
        said = _worth_showing("\n".join(lines))
        errors = [line for line in said if line.startswith("ERROR")]
        shown = "\n".join(said[-25:])
        raise PipFailed(f"pip install {' '.join(args)}: {errors[-1] if errors else 'see below'}\n{shown}")
