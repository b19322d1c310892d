"""Shared by all tests: made checkpoints, kept between runs; and which tests run in processes of their own.

Those of tests/kernels run under Triton's interpreter, which must be chosen before Triton is first imported, and other tests
of the same run may have imported it (vLLM does). `TRITON_INTERPRET=1 pytest tests/kernels` runs them directly, which is
what to debug with. Unit tests run side by side where `--side-by-side` says so, as `make test` does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from examples.checkpoints import CheckpointSpec, write_checkpoint
from tests.side_by_side import Apart, register

# No test is timed: this machine may be busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "checkpoints"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--side-by-side", action="store_true", help="unit tests in two processes, a module at a time")


def pytest_configure(config: pytest.Config) -> None:
    apart = []
    if os.environ.get("TRITON_INTERPRET") != "1":
        apart.append(Apart(HERE / "kernels", modules=False, TRITON_INTERPRET="1"))
    # Tests on GPUs may count their memory.
    if config.getoption("--side-by-side") and not os.path.exists("/dev/nvidiactl"):
        apart.append(Apart(HERE / "unit"))
    register(config, *apart)


@pytest.fixture(scope="session")
def checkpoint() -> Callable[..., Path]:
    """`checkpoint(family="mixtral", num_experts=12)` is the folder of that checkpoint, made once and kept."""

    def make(**fields: object) -> Path:
        spec = CheckpointSpec(**fields)  # type: ignore[arg-type]
        name = hashlib.sha256(json.dumps(spec.as_json(), sort_keys=True).encode()).hexdigest()[:12]
        return write_checkpoint(spec, CACHE / f"{spec.family}-{name}")

    return make
