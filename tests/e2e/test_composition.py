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
