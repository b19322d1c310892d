"""Tokens and bytes of DWDP against plain vLLM, for one model family, dtype, view and number of ranks at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.engines import as_one_rank, default_view, dwdp, gpus, run_job, side_by_side
from vllm_dwdp.prefetch.ring import Ring

#: Largest difference of a token's logprob between batches of different composition, by dtype.
LOGPROB_TOLERANCE = {"bfloat16": 0.1, "float16": 0.02, "float32": 1e-3}


class Case(NamedTuple):
    """One model under one configuration."""

    family: str
    dtype: str
    ranks: int
    view: str
    fields: dict[str, Any]
    config: dict[str, Any]


CASES = {
    # Three MoE layers on two slots: L % slots != 0, where the obvious ring overwrites weights in use.
    "deepseek_v3-fp32-contiguous": Case("deepseek_v3", "float32", 2, "contiguous", {"num_layers": 4}, {"trace": True}),
    # 7 experts on 3 ranks: uneven shares; workers in their engines.
    "mixtral-fp16-inplace": Case("mixtral", "float16", 3, "inplace", {"num_experts": 7}, {"launcher": "uni"}),
}
FULL = {
    # Fused expert tensors, biases, its own RoutedExperts subclass; overlapping shares.
    "gpt_oss-bf16-contiguous": Case(
        "gpt_oss", "bfloat16", 2, "contiguous", {"num_experts": 8}, {"experts_per_rank": 5, "num_slots": 3}
    ),
    "qwen3_moe-bf16-inplace": Case("qwen3_moe", "bfloat16", 2, "inplace", {"num_experts": 16}, {}),
    "deepseek_v3-bf16-inplace": Case("deepseek_v3", "bfloat16", 2, "inplace", {"num_layers": 5}, {}),
    "gpt_oss-fp32-inplace": Case("gpt_oss", "float32", 3, "inplace", {"num_experts": 12}, {}),
    "mixtral-bf16-contiguous": Case("mixtral", "bfloat16", 2, "contiguous", {"num_layers": 1}, {}),
    "qwen3_moe-fused-fp16-contiguous": Case(
        "qwen3_moe", "float16", 3, "contiguous", {"fused": True, "num_layers": 2}, {"slice_bytes": 4096}
    ),
    "qwen2_moe-fp16-auto": Case("qwen2_moe", "float16", 2, "auto", {}, {}),
    "olmoe-bf16-contiguous": Case("olmoe", "bfloat16", 2, "contiguous", {"num_layers": 5}, {"num_slots": 4}),
    "granitemoe-bf16-auto": Case("granitemoe", "bfloat16", 2, "auto", {}, {}),
    "qwen3_moe-groups": Case("qwen3_moe", "bfloat16", 4, "contiguous", {"num_experts": 9}, {"group_size": 2}),
}
#: On GPUs: BF16, and sizes that vLLM's kernels there know.
GPU_CASES = {
    "qwen3_moe-contiguous": Case("qwen3_moe", "bfloat16", 2, "contiguous", {"num_experts": 16}, {}),
    "mixtral-split": Case("mixtral", "bfloat16", 3, "split", {"num_experts": 7}, {}),
    "gpt_oss-split": Case(
        "gpt_oss", "bfloat16", 2, "split", {"num_experts": 8}, {"experts_per_rank": 5, "num_slots": 3}
    ),
}
GPU_FULL = {
    "qwen3_moe-auto": Case("qwen3_moe", "bfloat16", 2, "auto", {"num_experts": 16}, {}),
    "deepseek_v3-split": Case(
        "deepseek_v3",
        "bfloat16",
        2,
        "split",
        {"num_layers": 4, "hidden": 256, "intermediate": 256, "head_dim": 128},
        {},
    ),
    "qwen3_moe-groups": Case("qwen3_moe", "bfloat16", 4, "split", {"num_experts": 9}, {"group_size": 2}),
}

STEPS = ["digests", "tokens_each_rank", "batch", "counters", "maps", "trace"]


class Seen(NamedTuple):
    """What plain vLLM and dwdp showed."""

    case: Case
    plain: dict[str, Any]
    dwdp: dict[str, Any]


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(case, id=name) for name, case in (GPU_CASES if gpus() else CASES).items()),
        *(pytest.param(case, id=name, marks=pytest.mark.full) for name, case in (GPU_FULL if gpus() else FULL).items()),
    ],
)
def seen(
    request: pytest.FixtureRequest, checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Seen:
    """Plain vLLM on one rank and dwdp, on the same checkpoint."""
    case: Case = request.param
    folder = tmp_path_factory.mktemp("engines")
    model = checkpoint(family=case.family, dtype=case.dtype, **case.fields)
    alone, shared = as_one_rank(case.ranks), dwdp(case.ranks, weight_view=case.view, **case.config)
    if case.family == "deepseek_v3":
        for options in (alone, shared):
            options.pop("attention_backend", None)  # MLA has backends of its own
    return Seen(
        case,
        *side_by_side(
            lambda: run_job(folder, model, ["digests", "tokens", "batch"], dtype=case.dtype, **alone),
            lambda: run_job(folder, model, STEPS, dtype=case.dtype, **shared),
        ),
    )


pytestmark = pytest.mark.e2e


def test_every_byte_of_every_expert_is_plain_vllms(seen: Seen) -> None:
    [whole] = seen.plain["digests"]
    assert len(seen.dwdp["digests"]) == seen.case.ranks
    for rank, digests in enumerate(seen.dwdp["digests"]):
        assert digests == whole, f"rank {rank}"
    # A digest that did not depend on the bytes would compare equal as well.
    rows = [row for tensor in whole.values() for row in tensor]
    assert len(set(rows)) == len(rows)


def test_tokens_are_plain_vllms_on_every_rank(seen: Seen) -> None:
    for expected, served in zip(seen.plain["tokens"], seen.dwdp["tokens_each_rank"], strict=True):
        assert served == [expected] * len(served)
    assert len({tuple(tokens) for tokens in seen.plain["tokens"]}) > 1


def test_logprobs_of_batches_are_close(seen: Seen) -> None:
    plain, shared = seen.plain["batch"], seen.dwdp["batch"]
    assert [output["prompt"] for output in shared] == [output["prompt"] for output in plain], "order of results"
    same = [(a, b) for a, b in zip(plain, shared, strict=True) if a["first"] == b["first"]]
    assert len(same) >= 0.9 * len(plain)
    assert max(abs(a["logprob"] - b["logprob"]) for a, b in same) < LOGPROB_TOLERANCE[seen.case.dtype]


def test_requests_are_balanced_and_counted(seen: Seen) -> None:
    counters = seen.dwdp["counters"]
    served = [counter["requests"] for counter in counters]
    assert max(served) - min(served) <= 1
    expected_view = seen.case.view if seen.case.view != "auto" else default_view()
    for rank, counter in enumerate(counters):
        assert counter["rank"] == rank and counter["view"] == expected_view
        layers = len({key.rsplit(".", 1)[0] for key in seen.plain["digests"][0]})
        # Layers are counted in vLLM's warm-up and by the digests too, forwards are not.
        direct = {"inplace": counter["forwards"], "contiguous": 0}.get(expected_view, counter["direct_forwards"])
        assert counter["direct_forwards"] == direct <= counter["forwards"]
        pulled = counter["forwards"] - (direct if expected_view == "split" else 0)
        assert counter["layers"] > layers * pulled >= 0 < counter["forwards"]
        if expected_view != "inplace":
            ring = Ring(layers, seen.case.config.get("num_slots", 2))
            refilled = sum(ring.next_layer(layer) is not None for layer in range(layers))
            assert counter["pulls"] == ring.used_slots + counter["layers"] * refilled // layers
            assert counter["on_demand_fetches"] == 0
        else:
            assert counter["pulled_bytes"] == counter["slot_bytes"] == 0


@pytest.mark.skipif(gpus() > 0, reason="CPU only: shares on GPUs are no memory files")
def test_peers_are_mapped_read_only(seen: Seen) -> None:
    for counter, maps in zip(seen.dwdp["counters"], seen.dwdp["maps"], strict=True):
        assert sum(size for protection, size in maps.items() if "r--" in protection) > 0
        writable = sum(size for protection, size in maps.items() if "w" in protection)
        # The own slabs and the counter page, each rounded up to pages.
        assert counter["slab_bytes"] <= writable <= counter["slab_bytes"] + 4096 * 64


def test_workers_run_where_the_launcher_says(seen: Seen) -> None:
    inside = gpus() or seen.case.config.get("launcher") == "uni"
    place = f"worker in {'its engine' if inside else 'a process of its own'}, view "
    ranks = range(seen.case.ranks)
    assert [len(re.findall(f"dwdp rank {rank}: .*, {place}", seen.dwdp["log"])) for rank in ranks] == [1] * len(ranks)


def test_nothing_stays(seen: Seen) -> None:
    assert seen.dwdp["children_after_del"] == []
    assert seen.dwdp["left"] == []
    assert "dwdp rank 1 stops:" in seen.dwdp["log"]


def test_ring_follows_the_trace(seen: Seen) -> None:
    if not seen.case.config.get("trace"):
        pytest.skip("traced in one case only: the trace grows with every layer")
    for trace in seen.dwdp["trace"]:
        using: dict[int, int] = {}
        for _, kind, layer, slot in trace:
            if kind == "ready":
                using[slot] = layer
            elif kind == "release":
                assert using.pop(slot) == layer
            elif kind == "copy_begin":
                assert slot not in using, f"slot {slot} refilled with layer {layer} while {using.get(slot)} is read"
