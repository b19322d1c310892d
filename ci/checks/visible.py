"""GPUs that a script of this folder sees, and which of its cases or jobs are wanted."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


def visible_gpus() -> int:
    """Told without making a context on one."""
    import torch

    return int(torch.cuda.device_count())


def gpus_for(parser: argparse.ArgumentParser, without: bool, tries: str = "--cpu tries this without one") -> int:
    """How many can be seen, 0 where the script runs `without`. Where it needs one and there is none, the program ends;
    `tries`: what to do then."""
    gpus = 0 if without else visible_gpus()
    if not (gpus or without):
        parser.error(f"there is no GPU here: {tries}")
    return gpus


def wanted(names: Iterable[str], only: str, skip: str = "") -> list[str]:
    """Those of `names` that `only` means, words between commas: a name, or what names contain; without those of `skip`."""
    known, words, skipped = list(names), only.split(","), skip.split(",")
    parts = [word for word in words if word not in known]
    return [name for name in known if name not in skipped and (name in words or any(part in name for part in parts))]
