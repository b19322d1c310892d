"""Ranks that are servers of their own behind vllm-router, at the hands of chance: see ci/checks/chaos.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.e2e.engines import REPO, gpus

#: How long, and with which seed.
MINUTES = float(os.environ.get("DWDP_CHAOS_MINUTES", "30"))
SEED = os.environ.get("DWDP_CHAOS_SEED", "1")
#: Starts before and after, and what the last events take.
MORE_S = 900

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.full,
    pytest.mark.skipif(gpus() > 0, reason="CPU only: servers on cores of their own"),
    pytest.mark.skipif(importlib.util.find_spec("vllm_router") is None, reason="needs the extra disaggregated"),
]


@pytest.mark.timeout(60 * MINUTES + MORE_S + 60)
def test_no_request_is_lost_whatever_happens_to_servers() -> None:
    command = [sys.executable, "-m", "ci.checks.chaos", "--minutes", str(MINUTES), "--seed", SEED]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60 * MINUTES + MORE_S)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
