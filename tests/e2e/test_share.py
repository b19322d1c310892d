"""Each rank allocates, reads and keeps its share: measured on a checkpoint whose experts dwarf everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import default_view, dwdp, gpus, run_job

pytestmark = pytest.mark.e2e

EXPERTS, LAYERS, HIDDEN, INNER = 32, 6, 512, 512
EXPERT_BYTES = 3 * HIDDEN * INNER * 2
#: Modules that are imported to build the model, and torch's own allocations, in bytes.
NOISE = 15e6


@pytest.fixture(scope="module", params=["contiguous", pytest.param(default_view(), marks=pytest.mark.full)])
def seen(
    request: pytest.FixtureRequest, checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """300 MB of experts, in fused tensors for the in-place case."""
    view = request.param
    model = checkpoint(
        family="qwen3_moe",
        num_experts=EXPERTS,
        num_layers=LAYERS,
        hidden=HIDDEN,
        intermediate=INNER,
        fused=view == "inplace",
    )
    job = run_job(tmp_path_factory.mktemp(view), model, ["memory", "counters", "maps"], **dwdp(2, weight_view=view))
    return {"view": view, **job}


def test_resident_experts_are_the_share_and_the_slots(seen: dict[str, Any]) -> None:
    share = EXPERTS // 2 * LAYERS * EXPERT_BYTES
    slots = 2 * {"contiguous": EXPERTS, "split": EXPERTS // 2, "inplace": 0}[seen["view"]] * EXPERT_BYTES
    for counter, memory, maps in zip(seen["counters"], seen["memory"], seen["maps"], strict=True):
        assert counter["slab_bytes"] + counter["slot_bytes"] <= 1.01 * (share + slots)
        # The originals are gone: parameters have no storage but slots (or ranges of mapped slabs).
        if seen["view"] == "contiguous":
            assert memory["storages"] <= 1.01 * slots
        writable = sum(size for protection, size in maps.items() if "w" in protection)
        assert writable <= 1.01 * share


def test_only_the_share_is_read(seen: dict[str, Any]) -> None:
    share = EXPERTS // 2 * LAYERS * EXPERT_BYTES
    for counter, memory in zip(seen["counters"], seen["memory"], strict=True):
        read = counter["read_expert_bytes"] + counter["read_other_bytes"]
        assert counter["read_expert_bytes"] >= share
        assert read <= 1.05 * (share + memory["replicated"])


@pytest.mark.skipif(gpus() > 0, reason="CPU only: it is the host's memory that is measured")
def test_the_peak_of_loading_is_bounded(seen: dict[str, Any]) -> None:
    share = EXPERTS // 2 * LAYERS * EXPERT_BYTES
    for counter, memory in zip(seen["counters"], seen["memory"], strict=True):
        bound = share + memory["replicated"] + 2 * share / LAYERS + counter["read_largest"]
        assert share < memory["load_peak"] - memory["load_before"] <= bound + NOISE
