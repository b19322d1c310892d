"""Words of a command line that could not measure anything, or would lose what was measured: told before servers start."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection
from pathlib import Path


def check_numbers(args: argparse.Namespace, zero: Collection[str] = ()) -> None:
    """Raise ValueError for the first number of `args` that is not above 0, or, of one named in `zero`, below it."""
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or value < 0 or (not value and name not in zero):
            least = "0 or more" if name in zero else "1 or more" if isinstance(value, int) else "more than 0"
            raise ValueError(f"{flag(name)} {value:g}: write {least}")


def check_places(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError where a file of this name could not be written, since its folder is not there; or, of --logs where
    `args` has them, that folder not be made."""
    logs: Path | None = getattr(args, "logs", None)
    if logs is not None and (file := next((each for each in (logs, *logs.parents) if each.is_file()), None)):
        raise ValueError(f"--logs {logs}: {file} is a file: name a folder")
    for name in names:
        path: Path | None = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{flag(name)} {path}: there is no folder {path.parent}: make it, or name another one")
        if path is not None and path.is_dir():
            raise ValueError(f"{flag(name)} {path} is a folder: name a file")


def flag(name: str) -> str:
    """As it is written."""
    return f"--{name.replace('_', '-')}"
