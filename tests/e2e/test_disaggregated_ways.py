"""Disaggregated prefill with other numbers of ranks, views and options; and the example as users run it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.disaggregated import cluster, example, needs_extra
from tests.e2e.engines import as_one_rank, gpus, run_job, start_example
from tests.e2e.job import PROMPTS

pytestmark = [pytest.mark.e2e, pytest.mark.full, needs_extra]

CHUNKS = ("--max-num-batched-tokens", "32", "--no-enable-prefix-caching")
COPYING = "split" if gpus() else "contiguous"


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(family="qwen3_moe", num_experts=16)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Plain vLLM's tokens."""
    return list(run_job(tmp_path_factory.mktemp("plain"), model, ["tokens"], **as_one_rank(2))["tokens"])


@pytest.mark.parametrize(
    ("ranks", "decode_ranks", "view", "words"),
    [
        pytest.param(3, 1, "auto", (), id="three"),
        pytest.param(2, 1, COPYING, CHUNKS, id="two-copying-in-chunks"),
        pytest.param(2, 3, "auto", (), id="two-to-three"),
    ],
)
def test_tokens_are_plain_vllms(
    ranks: int,
    decode_ranks: int,
    view: str,
    words: tuple[str, ...],
    model: Path,
    expected: list[list[int]],
    tmp_path: Path,
) -> None:
    """From every rank of prefill, and where DWDP decodes, on every one of its ranks."""
    with cluster(tmp_path, example.Plan(str(model), ranks, decode_ranks, view, words)) as parts:
        times = ranks * decode_ranks
        through = [parts.ask(prompt) for prompt in PROMPTS for _ in range(times)]
        assert through == [tokens for tokens in expected for _ in range(times)]
        assert parts.transfers() == len(through)
        assert parts.prompts() == [len(through) // ranks] * ranks
        parts.wait_until_quiet()
        assert parts.left() == []


def test_the_example(model: Path, tmp_path: Path) -> None:
    """All of its output; with --keep it ends by Ctrl-C."""
    process, log, before = start_example("disaggregated", tmp_path, "--model", str(model), "--keep")
    try:
        while "stay up until" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
    finally:
        process.kill()
    lines = log.read_text().splitlines()
    assert "disaggregated: 6 of 6 requests have the tokens of plain vLLM" in lines
    for words in ("one at a time: TTFT", "prefill rank 1: ", " in 22 transfers", "3 servers stopped"):
        assert any(words in line for line in lines), words
    assert before.check(process.pid) == []


@pytest.mark.parametrize("seconds", [1, 15])
def test_a_start_that_is_stopped(seconds: int, model: Path, tmp_path: Path) -> None:
    process, log, before = start_example("disaggregated", tmp_path, "--model", str(model))
    try:
        while "starting prefill" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert "Traceback" not in log.read_text()
    assert before.check(process.pid) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--ranks", "1"), "--ranks 1: DWDP takes 2 or more"),
        (("--model", "no/such/model"), "ended with 1: "),
    ],
    ids=["one-rank", "no-model"],
)
def test_a_start_that_fails(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    """One line that says why, and nothing left."""
    process, log, before = start_example("disaggregated", tmp_path, *words)
    try:
        assert process.wait(200) == 1
    finally:
        process.kill()
    lines = log.read_text().splitlines()
    assert any(line.startswith("disaggregated: ") and told in line for line in lines), lines
    assert "Traceback" not in log.read_text()
    assert before.check(process.pid) == []
