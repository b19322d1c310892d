"""ci/bench/prefill.py: engines take turns, one that fails leaves the others alone, ratios compare turns; step_times.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ci.bench import prefill as gpu_prefill
from ci.bench import step_times
from ci.bench import turns as gpu_turns
from ci.bench.engine import EngineFailed

JOBS = [
    gpu_turns.Job("plain", None, {}, ("prefill", "pairs", "decode")),
    gpu_turns.Job("plain again", None, {}, ("prefill", "pairs")),
    gpu_turns.Job("split 64 link", {}, {}, ("prefill", "pairs", "decode")),
]
SECONDS = {"plain": 0.01, "plain-again": 0.03, "split-64-link": 0.04}


class Fake:
    """Answers at once; `fails` names an engine and the answer in place of which it fails, or, below 0, the order."""

    fails: tuple[str, int] = ("", 0)
    asked: list[tuple[str, str, int]]

    def __init__(self, options: dict[str, Any], env: dict[str, str], log: Path) -> None:
        self._name, self._answers, self._words = log.stem, 0, {}
        self.options = options

    def ask(self, step: str, **words: Any) -> None:
        if Fake.fails == (self._name, -self._answers - 1):
            raise EngineFailed("has ended: ")
        self._words = {"step": step, **words}
        Fake.asked.append((self._name, step, words.get("prompts", 1)))

    def answer(self, limit_s: float) -> dict[str, Any]:
        self._answers += 1
        if Fake.fails == (self._name, self._answers):
            raise EngineFailed("has ended: ")
        if not self._words:
            return {"start_s": 1.0}
        if self._words["step"] == "decode":
            return {"tokens_per_s": 1 / SECONDS[self._name]}
        dwdp = {"exposed_s": 0.01, "waits": 1, "pulled_bytes": 8} if "split" in self._name else {}
        return {"seconds": SECONDS[self._name], "steps": [{"host_s": 0.002, "device_s": 0.001}] * 2, **dwdp}

    def leave(self) -> None:
        pass

    def stop(self, limit_s: float = 30) -> None:
        pass


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> gpu_turns.Group:
    monkeypatch.setattr(gpu_turns, "Engine", Fake)
    Fake.fails, Fake.asked = ("", 0), []
    made = gpu_turns.Group(JOBS, lambda rows: None, 1.0)
    made.start(lambda job: {}, lambda job: {}, tmp_path)
    return made


def test_a_ratio_is_that_of_a_turn_to_the_mean_of_the_plain_engines(
    group: gpu_turns.Group, capsys: pytest.CaptureFixture[str]
) -> None:
    group.prefill([256], 3)
    group.decode([4], 2)
    rows = group.rows
    cell = rows["split 64 link"]["prefill"]["256"]
    assert cell["seconds"] == [0.04] * 3 and cell["median_s"] == 0.04
    assert cell["exposed_s"] == pytest.approx(0.03) and cell["pulled_bytes"] == 24
    assert cell["steps_device_s"] == pytest.approx([0.002] * 3)
    assert "exposed_s" not in rows["plain"]["prefill"]["256"] and "decode" not in rows["plain again"]
    base = [rows[name]["prefill"]["256"]["seconds"] for name in gpu_turns.PLAIN]
    assert gpu_turns.ratios(base, cell["seconds"]) == pytest.approx([0.5] * 3)
    gpu_prefill.table(rows)
    told = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("split 64 link")]
    # Milliseconds, of which on the device, the ratio, the share exposed; of decode the tokens and their ratio.
    assert [line.strip() for line in told] == [
        "40.00 (2.00) 0.500 [0.500 0.500] 25.0%", "25 tok/s 0.250 [0.250 0.250]",
    ]  # fmt: skip
    # Every engine once a turn, the turns to warm up included.
    prefills = [name for name, step, _ in Fake.asked if step == "prefill"]
    assert {name: prefills.count(name) for name in SECONDS} == dict.fromkeys(SECONDS, gpu_turns.WARM + 3)


def test_pairs_are_two_prompts_of_one_launch_or_one_of_two_plain_engines(group: gpu_turns.Group) -> None:
    group.pairs([256], 2)
    assert {(name, prompts) for name, _, prompts in Fake.asked} == {
        ("plain", 1), ("plain-again", 1), ("split-64-link", 2),
    }  # fmt: skip
    # Of the plain two the slower one counts.
    assert group.rows["plain"]["pairs"]["256"]["seconds"] == [0.03] * 2
    assert "pairs" not in group.rows["plain again"]


@pytest.mark.parametrize("when", [gpu_turns.WARM + 3, -gpu_turns.WARM - 3], ids=["answering", "asked"])
def test_an_engine_that_fails_leaves_the_others_alone(group: gpu_turns.Group, when: int) -> None:
    Fake.fails = ("split-64-link", when)
    group.prefill([256, 512], 3)
    group.decode([1], 1)
    assert group.rows["split 64 link"]["error"].startswith("has ended")
    done = len(group.rows["split 64 link"]["prefill"]["256"]["seconds"])
    # The turn in which it failed is left out for all, so that turns of two engines are the same ones.
    assert done in (1, 2) and len(group.rows["plain"]["prefill"]["256"]["seconds"]) == 2
    assert len(group.rows["plain"]["prefill"]["512"]["seconds"]) == 3
    assert group.rows["plain"]["decode"]["1"]["all"] == [100.0]
    group.profile(256)
    gpu_prefill.table(group.rows)


def test_pairs_without_two_plain_engines_are_compared_with_none(group: gpu_turns.Group) -> None:
    Fake.fails = ("plain-again", 2)
    group.pairs([256], 2)
    assert "pairs" not in group.rows["plain"]
    assert len(group.rows["split 64 link"]["pairs"]["256"]["seconds"]) == 2


def test_bounds_hold_the_median_of_turns() -> None:
    middle, low, high = gpu_turns.bounds([1.0, 1.1, 0.9, 1.05, 0.95, 3.0])
    assert middle == pytest.approx(1.025) and low < middle < high < 3.0
    assert gpu_turns.bounds([2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("words", [["--only", "splt 64"], ["--only", "plain"], ["--steps", "prefil"]])
def test_a_wrong_word_is_refused(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["ci/bench/prefill.py", "--cpu", *words])
    with pytest.raises(SystemExit) as ended:
        gpu_prefill.main()
    assert ended.value.code == 2
    assert words[1] in capsys.readouterr().err


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_each_group_has_plain_vllm_to_compare_with(gpus: int) -> None:
    for jobs in gpu_prefill.groups(gpus, gpu_prefill.GRAPHS):
        names = [job.name for job in jobs]
        assert names[0] == gpu_turns.PLAIN[0] and len(set(names)) == len(names)
        assert not any("," in name for name in names)  # --only splits there
        for job in jobs:
            options = gpu_prefill.options_of(job, Path("model"), gpus == 0, 8192)
            assert options["max_num_batched_tokens"] == 8192 and ("additional_config" in options) == (
                job.dwdp is not None
            )


class Worker(step_times.StepTimes):
    def execute_model(self) -> str:
        time.sleep(0.01)
        return "model"

    def sample_tokens(self) -> str:
        time.sleep(0.005)
        return "tokens"


def test_a_step_ends_with_its_last_call() -> None:
    worker = Worker()
    worker.begin_step_times(device=False)
    for _ in range(2):
        assert (worker.execute_model(), worker.sample_tokens()) == ("model", "tokens")
    steps = worker.read_step_times()
    assert len(steps) == 2 and all(step["host_s"] >= 0.015 for step in steps)
    assert worker.read_step_times() == []


def test_busy_time_counts_what_overlaps_once() -> None:
    assert step_times._covered([(0, 2), (1, 3), (5, 6), (5.5, 5.6)]) == 4
    assert step_times._covered([]) == 0
