"""ci.checks.gpu_e2e, of four ranks: whose batches are compared with which of plain vLLM's."""

from __future__ import annotations

import argparse
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ci.checks import gpu_e2e
from ci.checks.gpu_cases import CASES, Case
from tests.e2e import job

ARGS = argparse.Namespace(cpu=True, gpus=0, job_s=1.0, parallel=1)


def row(logprob: float) -> dict[str, Any]:
    return {"first": 1, "logprob": logprob, "likely": [[1, logprob]]}


def checked(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: float, plain: gpu_e2e.Plain
) -> dict[str, Any]:
    """The row of a case whose ranks say `found`; plain vLLM says -1 of a batch as a whole and -2 of its parts."""
    monkeypatch.setattr(gpu_e2e, "checkpoint", lambda case: (tmp_path, "m"))
    monkeypatch.setattr(gpu_e2e, "settings", lambda case, gpus: {})

    def run(_: Path, __: Path, steps: list[str], *more: Any, **options: Any) -> dict[str, Any]:
        both = {"digests": ["d"], "tokens": [[1]], "batch": [row(-1.0)], "batch_of_four": [row(-2.0)]}
        if "data_parallel_size" not in options:
            return {step: both[step] for step in steps}
        counted = {"kernels_compiled_after_start": 0, **dict.fromkeys(gpu_e2e.SHOWN, 0)}
        mine = {"digests": ["d"], "tokens_each_rank": [[[1]]], "batch": [row(found)], "counters": [counted]}
        return {**mine, "left": [], "start_s": 0.0}

    monkeypatch.setattr(gpu_e2e, "run_job", run)
    return gpu_e2e.check(case, tmp_path, plain, ARGS)


@pytest.mark.parametrize(
    ("name", "found", "wrong", "apart"),
    [
        ("four-deepseek", -1.0, [], 1.0),
        ("four-deepseek", -2.0, [], 1.0),
        ("four-deepseek", -1.5, ["logprobs"], 1.0),
        ("qwen3-split", -1.0, [], 0.0),
        ("qwen3-split", -2.0, ["logprobs"], 0.0),
    ],
)
def test_four_ranks_may_have_a_prompt_in_the_cache_or_not(
    name: str, found: float, wrong: list[str], apart: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checked(CASES[name], tmp_path, monkeypatch, found, gpu_e2e.Plain())
    assert (made["wrong"], made["plain_apart"]) == (wrong, apart)


def test_plain_vllm_is_asked_again_where_four_ranks_need_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though two ranks with the same model and options have asked before."""
    four, plain = CASES["four-deepseek"], gpu_e2e.Plain()
    for ranks, wrong in ((2, ["logprobs"]), (4, [])):
        case = four._replace(ranks=ranks)
        assert checked(case, tmp_path, monkeypatch, -2.0, plain)["wrong"] == wrong


def test_plain_vllm_that_compiles_is_asked_twice_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one has compiled, the other does not find: both might round alike."""
    both, caches, inside = threading.Barrier(2, timeout=20), list[str](), gpu_e2e.Plain()
    real = gpu_e2e.Plain.get

    def get(self: gpu_e2e.Plain, key: str, find: Any) -> Any:
        both.wait()
        return real(self, key, find)

    monkeypatch.setattr(gpu_e2e.Plain, "get", get)
    monkeypatch.setattr(gpu_e2e, "environ", lambda cache: caches.append(cache.name) or {})
    case = CASES["qwen3-split"]._replace(options={"enforce_eager": False})
    assert checked(case, tmp_path, monkeypatch, -1.0, inside)["wrong"] == []
    assert sorted(caches[:2]) == ["cache-again", "cache-plain"] and caches[2:] == ["cache-dwdp"]


def test_models_are_written_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing: list[str] = []

    def write(spec: Any, folder: Path) -> Path:
        writing.append("begins")
        time.sleep(0.05)
        writing.append("ends")
        return folder

    monkeypatch.setattr(gpu_e2e, "write_checkpoint", write)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(gpu_e2e.checkpoint, list(CASES.values())[:3]))
    assert writing == ["begins", "ends"] * 3


def test_a_batch_of_four_is_in_parts_without_what_the_parts_before_have_left() -> None:
    asked: list[list[str]] = []

    class Engine:
        def __init__(self) -> None:
            self.cached: set[str] = set()

        def reset_prefix_cache(self) -> bool:
            self.cached = set()
            return True

        def generate(self, prompts: list[str], params: Any, use_tqdm: bool) -> list[Any]:
            assert not self.cached & set(prompts)
            self.cached |= set(prompts)
            asked.append(prompts)
            likely = [{7: SimpleNamespace(logprob=-1.0)}]
            output = SimpleNamespace(token_ids=[7], logprobs=likely)
            return [SimpleNamespace(prompt=prompt, outputs=[output]) for prompt in prompts]

    engine = Engine()
    job._greedy(engine, job.PROMPTS)  # as the steps before
    asked.clear()
    found = job.batch_of_four(engine)
    assert [each["prompt"] for each in found] == job.PROMPTS * 4
    assert asked == [(job.PROMPTS * 4)[rank::4] for rank in range(4)]
