"""Hits counted by real engines, and a second launch that places experts by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import as_one_rank, default_view, dwdp, gpus, run_job
from tests.e2e.job import TOKENS
from vllm_dwdp.hits_file import read_hits
from vllm_dwdp.hot_placement import missing_hits, place_hot
from vllm_dwdp.placement import place

pytestmark = [pytest.mark.e2e, pytest.mark.full]

EXPERTS, LAYERS, TOP_K, SHARE = 16, 4, 2, 12
EXPERT_BYTES = 3 * 128 * 128 * 2
VIEW = "split" if gpus() else "contiguous"
STEPS = ["watch_routing", "tokens", "routed", "hits", "counters", "digests"]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    """A quarter of the experts gets most tokens, another one in each layer."""
    return checkpoint(num_experts=EXPERTS, num_layers=LAYERS, top_k=TOP_K, router_skew=3.0)


def missing(job: dict[str, Any]) -> int:
    """Hits of experts that the rank lacked where they were asked for."""
    return sum(of["total"] - of["local"] for counter in job["counters"] for of in counter["hits"].values())


def test_hits_of_one_launch_place_the_experts_of_the_next(model: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    plain = run_job(tmp_path, model, ["digests", "watch_routing", "tokens", "routed"], **as_one_rank(2))
    settings: dict[str, Any] = {"weight_view": VIEW, "experts_per_rank": SHARE}
    counted = run_job(tmp_path, model, STEPS, **dwdp(2, **settings, hits=str(first)))
    placed = run_job(tmp_path, model, STEPS, **dwdp(2, **settings, hits=str(second), popularity=str(first)))
    [expected] = plain["routed"]
    for job, file in ((counted, first), (placed, second)):
        assert job["tokens"] == plain["tokens"]
        assert job["digests"] == [plain["digests"][0]] * 2
        assert job["hits"]["layers"] == expected
        # Written by both ranks.
        assert {name: list(counts) for name, counts in read_hits(str(file)).layers.items()} == expected
        assert [counter["read_expert_bytes"] for counter in job["counters"]] == [LAYERS * SHARE * EXPERT_BYTES] * 2
        assert job["left"] == []
    for job, placements in (
        (counted, {name: place(EXPERTS, 2, SHARE) for name in expected}),
        (placed, {name: place_hot(EXPERTS, 2, SHARE, counts) for name, counts in expected.items()}),
    ):
        predicted = sum(
            missing_hits(placements[name], rank, counts)
            for rank, routed in enumerate(job["routed"])
            for name, counts in routed.items()
        )
        assert missing(job) == predicted
    assert 2 * missing(placed) < missing(counted)


@pytest.mark.skipif(gpus() > 0, reason="CPU only: on GPUs layers are behind vLLM's own op, which is not compiled")
def test_compiled_code_counts_every_token(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "hits.json"
    job = run_job(
        tmp_path,
        model,
        ["tokens", "hits", "counters"],
        enforce_eager=False,
        **dwdp(2, weight_view=default_view(), hits=str(file)),
    )
    hits = read_hits(str(file))
    # The last token that a request gets goes through no layer.
    assert hits.tokens >= len(job["tokens"]) * TOKENS
    assert {sum(counts) for counts in hits.layers.values()} == {hits.tokens * TOP_K}
    totals = [sum(counter["hits"][name]["total"] for counter in job["counters"]) for name in hits.layers]
    assert totals == [hits.tokens * TOP_K] * LAYERS
