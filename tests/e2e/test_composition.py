"""Features of vLLM that change the forward or the KV cache, on top of dwdp: the same tokens as plain vLLM without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import as_one_rank, dwdp, run_job

pytestmark = [pytest.mark.e2e, pytest.mark.full]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(family="qwen3_moe", num_experts=16)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Plain vLLM's tokens."""
    folder = tmp_path_factory.mktemp("plain")
    return list(run_job(folder, model, ["tokens"], **as_one_rank(2))["tokens"])


@pytest.mark.parametrize("feature", ["ngram", "kv_transfer"])
def test_tokens_stay_the_same(feature: str, model: Path, expected: list[list[int]], tmp_path: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        "ngram": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "kv_transfer": {
            "kv_transfer_config": {
                "kv_connector": "ExampleConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "kv")},
            }
        },
    }
    job = run_job(tmp_path, model, ["tokens_each_rank"], **options[feature], **dwdp(2, weight_view="contiguous"))
    assert job["tokens_each_rank"] == [[tokens] * 2 for tokens in expected]
    assert job["left"] == []


def test_embeddings_are_plain_vllms_on_every_rank(model: Path, tmp_path: Path) -> None:
    """A model that generates, asked for embeddings; a rank's prompt alone in its batch, as plain vLLM's."""
    asked = {"runner": "pooling", "convert": "embed"}
    plain = run_job(tmp_path, model, ["embeddings_each_rank"], **asked, **as_one_rank(2))["embeddings_each_rank"]
    steps = ["embeddings_each_rank", "counters"]
    job = run_job(tmp_path, model, steps, **asked, **dwdp(2, weight_view="contiguous"))
    assert len({tuple(each[0]) for each in plain}) == len(plain)
    for found, expected in zip(job["embeddings_each_rank"], plain, strict=True):
        for rank in range(2):
            assert found[rank] == pytest.approx(expected[0], abs=1e-3)
    assert all(counted["forwards"] >= len(plain) for counted in job["counters"])
    assert job["left"] == []


def test_prompts_of_embeddings_give_plain_vllms_tokens(model: Path, tmp_path: Path) -> None:
    steps, asked = ["tokens_of_embeddings"], {"enable_prompt_embeds": True}
    plain = run_job(tmp_path, model, steps, **asked, **as_one_rank(2))["tokens_of_embeddings"]
    job = run_job(tmp_path, model, steps, **asked, **dwdp(2, weight_view="contiguous"))
    assert len({tuple(each[0]) for each in plain}) == len(plain)
    assert job["tokens_of_embeddings"] == plain
    assert job["left"] == []
