"""What a worker foresees of waits, with rates that it measures, and the one line where compute waited otherwise.

Two ranks as threads share a model over shared memory, by copies: slabs, slots, copy threads, rates and counters are real.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

pytest.importorskip("vllm")

from tests.unit.meeting import Meeting
from tests.unit.whole_model import expert_layers, load, vllm_groups
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import waits
from vllm_dwdp.engine.waits import STEPS, Waits, watch_waits
from vllm_dwdp.group.launch import DwdpLaunch
from vllm_dwdp.layers.sharing import ExpertSharing
from vllm_dwdp.predict.startup import FullStep
from vllm_dwdp.predict.strategies import Step
from vllm_dwdp.prefetch.counters import CounterPage

RANKS, LAYERS, FULL = 2, 4, 1000
LAUNCH = DwdpLaunch(DwdpConfig(weight_view="contiguous"), RANKS, "/made/up", ())
HIDDEN = FullStep(FULL, Step("DWDP", RANKS, FULL, 0.0, 1.0, 0.0, 0.0))
EXPOSED = FullStep(FULL, Step("DWDP", RANKS, FULL, 0.0, 1.0, 0.0, 0.0, exposed=1.0), 2 * FULL)


class Rank(NamedTuple):
    """A rank that has not pulled yet, and vLLM's config of its model."""

    sharing: ExpertSharing
    modules: list[Any]
    vllm_config: Any

    def watch(self, tokens: int) -> Waits:
        """As the worker, with this many tokens of a step at most."""
        model, cache = self.vllm_config.model_config, self.vllm_config.cache_config
        given: Any = SimpleNamespace(
            model_config=model, cache_config=cache, scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens)
        )
        return watch_waits(given, LAUNCH, 1, self.sharing)

    def forwards(self, count: int, tokens: int, watch: Waits, compute_s: float) -> None:
        """Forwards whose layers each compute for so long."""
        for _ in range(count):
            watch.add(tokens)
            for module in self.modules:
                module.dwdp_gate.acquire(module.dwdp_layer, tokens)
                if compute_s:  # sleeping for nothing gives the core away, for as long as others like
                    time.sleep(compute_s)
                module.dwdp_gate.release(module.dwdp_layer, tokens)


@pytest.fixture
def rank(checkpoint: Callable[..., Path]) -> Iterator[Rank]:
    folder = checkpoint(num_experts=8, num_layers=LAYERS, hidden=256, intermediate=256)
    with vllm_groups():
        loaded = [load(folder, number, RANKS, {"weight_view": "contiguous"}) for number in range(RANKS)]
        meeting = Meeting()
        with ThreadPoolExecutor(RANKS) as pool:
            shared = pool.map(lambda n: ExpertSharing(loaded[n].build, meeting.of(n), LAUNCH), range(RANKS))
            first, second = shared
        yield Rank(first, list(expert_layers(loaded[0].model).values()), loaded[0].vllm_config)
        first.close()
        second.close()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            waits.logger, level, lambda text, *values, level=level: lines.append((level, text % values))
        )
    return lines


def test_a_wait_that_was_foreseen_and_did_not_come(rank: Rank, said: list[tuple[str, str]]) -> None:
    # On a busy machine products may be slow enough to hide even this.
    vars(rank.sharing)["product_rate"] = 1e13
    watch = rank.watch(tokens=2)
    ((level, line),) = said
    assert level == "warning" and line.startswith("dwdp rank 1: copies of a forward take about ") and "\n" not in line
    assert "max_num_batched_tokens=2 gives about " in line and "compute will wait; use about " in line
    assert "tokens per step, more experts_per_rank, or the view inplace" in line
    assert rank.sharing.copies_s == pytest.approx(
        sum(program.pulled_bytes + program.merged_bytes for program in rank.sharing.programs) / rank.sharing.link_rate
    )
    rank.sharing.start()
    # Of a step foreseen as a fraction of a millisecond, a copy thread that gets no core at once would take more than a part.
    watch._foreseen_s = 1.0
    rank.forwards(STEPS + 1, 2, watch, compute_s=0.005)
    ((level, line),) = said[1:]
    assert level == "info" and "dwdp rank 1: pulls are hidden after all: " in line and "of 2 tokens on average" in line


def test_a_wait_that_was_not_foreseen(rank: Rank, said: list[tuple[str, str]]) -> None:
    watch = rank.watch(tokens=65536)
    assert said == []
    rank.sharing.start()
    rank.forwards(STEPS, 65536, watch, compute_s=0.0)
    assert said == []
    rank.forwards(2 * STEPS, 65536, watch, compute_s=0.0)
    ((level, line),) = said
    assert level == "warning" and f"in {STEPS} forwards that pull, of 65536 tokens on average" in line
    assert "use more tokens per step, more experts_per_rank, or the view inplace" in line
    assert float(line.split("waited ")[1].split(" %")[0]) > 5


def test_nothing_is_asked_where_nothing_is_pulled(rank: Rank, said: list[tuple[str, str]]) -> None:
    for changed in ({"refilled": []}, {"direct_tokens": None}, {"direct_tokens": 16}):
        sharing: Any = SimpleNamespace(**{"refilled": [1], "direct_tokens": 0, **changed})
        # No rate is there: one that is asked for raises.
        sharing.counters, sharing.build = rank.sharing.counters, rank.sharing.build
        watch = rank._replace(sharing=sharing).watch(tokens=16)
        for _ in range(3 * STEPS):
            watch.add(16)
            rank.sharing.counters.fields.exposed_wait_ns += 10**12
    assert said == []


class Clock:
    """A watch whose time is told: forwards take `seconds`, of which compute waits `waited`."""

    def __init__(self, step: FullStep | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.page, self.now = CounterPage.create(), 100.0
        self.watch = Waits(1, self.page, 8, FULL, step, "")
        monkeypatch.setattr(waits, "time", SimpleNamespace(monotonic=lambda: self.now))

    def run(self, seconds: float, waited: float, count: int = STEPS, tokens: int = FULL) -> None:
        for _ in range(count):
            self.watch.add(tokens)
            self.now += seconds
            self.page.fields.exposed_wait_ns += int(waited * 1e9)


@pytest.mark.parametrize("step", [HIDDEN, None])
def test_waits_are_told_of_the_first_period_that_has_them(
    step: FullStep | None, monkeypatch: pytest.MonkeyPatch, said: list[tuple[str, str]]
) -> None:
    clock = Clock(step, monkeypatch)
    clock.run(1.0, 0.04, 3 * STEPS)
    # Forwards that read directly wait for nothing, and are not counted.
    clock.run(1.0, 0.0, 1000, tokens=8)
    clock.run(1.0, 0.04)
    assert said == []
    clock.run(1.0, 0.25, 2 * STEPS, tokens=FULL // 2)
    clock.run(1.0, 0.25)
    ((level, line),) = said
    assert (
        level == "warning" and "waited 25.0 % of the time, in 64 forwards that pull, of 500 tokens on average" in line
    )


def test_an_idle_rank_has_not_hidden_its_waits(monkeypatch: pytest.MonkeyPatch, said: list[tuple[str, str]]) -> None:
    clock = Clock(EXPOSED, monkeypatch)
    clock.run(100.0, 0.5, 2 * STEPS)
    assert said == []
    clock.run(1.0, 0.01, 3 * STEPS)
    ((level, line),) = said
    assert level == "info" and "hidden after all: 1.0 % of the time was spent waiting, in 32 forwards" in line
