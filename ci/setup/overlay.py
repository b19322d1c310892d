"""An environment for an older release of vLLM on top of one for the newest: installs only what their locks differ in."""

from __future__ import annotations

import sys
from pathlib import Path

PTH = "dwdp-below.pth"


def only_in(lock: Path, below: Path) -> list[str]:
    """Pins of `lock` that `below` lacks, or has at another version."""
    known = below.read_text().splitlines()
    return [line for line in lock.read_text().splitlines() if line not in known and not line.startswith("#")]


def site_packages(venv: Path) -> Path:
    """That of the running Python's version, there or not."""
    return venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def set_apart(venv: Path) -> None:
    """Undo `lay_over`: pip would take what is below for installed here."""
    (site_packages(venv) / PTH).unlink(missing_ok=True)


def lay_over(venv: Path, below: Path) -> None:
    """What `venv` lacks it takes from `below`, editable installations too; what both have is its own."""
    line = f"import site; site.addsitedir({str(site_packages(below.resolve()))!r})\n"
    (site_packages(venv) / PTH).write_text(line)
