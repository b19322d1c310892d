"""Shared by all tests: made checkpoints, kept between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from examples.checkpoints import CheckpointSpec, write_checkpoint

# No test is timed: this machine may be busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "checkpoints"


@pytest.fixture(scope="session")
def checkpoint() -> Callable[..., Path]:
    """`checkpoint(family="mixtral", num_experts=12)` is the folder of that checkpoint, made once and kept."""

    def make(**fields: object) -> Path:
        spec = CheckpointSpec(**fields)  # type: ignore[arg-type]
        name = hashlib.sha256(json.dumps(spec.as_json(), sort_keys=True).encode()).hexdigest()[:12]
        return write_checkpoint(spec, CACHE / f"{spec.family}-{name}")

    return make
