"""ci/bench/contention.py: ranks over shared memory and simulated CUDA, what it makes of their rates, its patterns."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ci.bench import contention, contention_rank
from ci.bench.contention import Ranks, measure
from ci.bench.contention_rank import Order, Pulled, Shape
from ci.bench.contention_ways import (
    ALL,
    IN_STEP,
    ONE_READER,
    ONE_SOURCE,
    ONE_WAY,
    PAIRS,
    RING,
    WAYS,
    Pattern,
    Way,
    chosen,
)
from tests.unit.pulling import group
from vllm_dwdp.errors import DwdpError

ENGINES = chosen("", gpus=False)


@pytest.mark.parametrize(("kind", "num_ranks"), [("shm", 4), ("shm", 3), ("cupy_ipc", 4), ("vmm", 3)])
def test_every_way_brings_the_bytes_of_its_sources_and_no_others(kind: str, num_ranks: int) -> None:
    ways = ENGINES if kind == "shm" else chosen("whole ranges", gpus=False)
    assert {way.pattern for way in ways} == {ALL, RING, PAIRS, ONE_WAY, ONE_SOURCE, ONE_READER, IN_STEP}
    made = group(kind, num_ranks, ways)
    try:
        for number, way in enumerate(ways):
            assert made.wrong(number) == [0] * num_ranks, way.name
    finally:
        made.close()


def test_wrong_bytes_are_told_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    bind = contention_rank.bind_plan

    def swapped(engine: Any, plan: Any, slabs: dict[int, int], slot: int) -> Any:
        return bind(engine, plan, dict(zip(slabs, reversed(slabs.values()), strict=True)), slot)

    monkeypatch.setattr(contention_rank, "bind_plan", swapped)
    with pytest.raises(DwdpError, match=r"ring: whole ranges, rotated: .* bytes of rank 0 are wrong"):
        group("shm", 3, [Way(None, pattern=RING)])


PULLS: dict[str, tuple[Pattern, dict[int, str]]] = {
    "all": (ALL, {0: "123", 1: "230", 2: "301", 3: "012"}),
    "ring": (RING, {0: "1", 1: "2", 2: "3", 3: "0"}),
    "pairs": (PAIRS, {0: "1", 1: "0", 2: "3", 3: "2"}),
    "one way": (ONE_WAY, {0: "1", 2: "3"}),
    "one source": (ONE_SOURCE, {1: "0", 2: "0", 3: "0"}),
    "one reader": (ONE_READER, {0: "123"}),
    "in step": (IN_STEP, {0: "123", 1: "230", 2: "301", 3: "012"}),
}


@pytest.mark.parametrize("name", PULLS)
def test_who_pulls_from_whom(name: str) -> None:
    pattern, right = PULLS[name]
    assert pattern.name == name
    assert pattern.readers(4) == tuple(right)
    for rank in range(4):
        sources = tuple(map(int, right.get(rank, "")))
        assert pattern.sources(rank, 4) == sources
        parts = [(source,) for source in sources] if pattern is IN_STEP else [sources] if sources else []
        assert list(pattern.phases(rank, 4)) == parts


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_in_step_no_source_is_shared_at_any_time(ranks: int) -> None:
    for at_once in zip(*(IN_STEP.phases(rank, ranks) for rank in range(ranks)), strict=True):
        assert sorted(at_once) == [(source,) for source in range(ranks)]
    for pattern in (RING, PAIRS, ONE_WAY):
        sources = [source for rank in range(ranks) for source in pattern.sources(rank, ranks)]
        assert len(set(sources)) == len(sources), pattern.name


class Logged:
    """A barrier at which nobody else is late by less than 20 ms."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def wait(self, timeout: float | None = None) -> int:
        assert timeout
        self.log.append("wait")
        time.sleep(0.02)
        return 0


def test_ranks_in_step_wait_for_each_other_before_every_phase_and_that_time_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    barrier, run = Logged(), contention_rank._run
    made = group("shm", 3, [Way(None, pattern=IN_STEP)], barrier)

    def logged(parts: Any, repeats: int) -> None:
        barrier.log.append(f"run {repeats}")
        run(parts, repeats)

    monkeypatch.setattr(contention_rank, "_run", logged)
    try:
        begun = time.perf_counter()
        found = made.ranks[1].pull(Order(0, 1.0, rounds=2))
        took = time.perf_counter() - begun
    finally:
        made.close()
    assert barrier.log == ["run 1"] * 2 + ["wait", "run 2"] * 4
    assert found.rounds == 2 and took - found.seconds >= 4 * 0.02


def test_every_wait_is_for_as_many_bytes_as_one_of_all() -> None:
    made = group("shm", 4, ENGINES)
    share = 2 * (128 + 64) << 10
    try:
        for number, way in enumerate(ENGINES):
            for rank in way.pattern.readers(4):
                found = made.ranks[rank].pull(Order(number, 1e-9))
                phases = len(way.pattern.phases(rank, 4))
                assert (found.rounds, found.nbytes) == (1, phases * 3 * share), way.name
    finally:
        made.close()


class Made:
    """Ranks with made-up rates: rank r does so many times 1 GB/s alone, and half of it at once. ends: turns."""

    turns = 99

    def __init__(self, shape: Shape, ways: Any) -> None:
        self.shape, self.ways, self.orders = shape, tuple(ways), 0
        self.asked: list[tuple[int, tuple[int, ...], int | None]] = []

    def pull(self, readers: Any, order: Order) -> list[Pulled]:
        if len(self.asked) >= self.turns:
            raise SystemExit("cut off")
        self.asked.append((order.way, tuple(readers), order.rounds))
        part = 1 if len(readers) == 1 else 2
        return [Pulled(int((rank + 1) * 1e9), part * 0.5, 10) for rank in readers]

    def close(self) -> None:
        pass


def test_rows_tell_rates_alone_and_at_once() -> None:
    ways = [Way(None), Way(None, pattern=ONE_SOURCE), Way(None, "together", ONE_READER), Way(None, pattern=IN_STEP)]
    ranks: Any = Made(Shape(4), ways)
    *_, rows = measure(ranks, 0.3, 2)
    assert rows[0] == {
        "name": "whole ranges, rotated", "pattern": "all", "copies": "whole ranges, rotated", "alone": 2.0, "all": 2.5,
        "slowest": 1.0, "per_rank": [1.0, 2.0, 3.0, 4.0], "ratio": 1.25,
    }  # fmt: skip
    assert (rows[1]["alone"], rows[1]["all"], rows[1]["per_rank"]) == (4.0, 3.0, [None, 2.0, 3.0, 4.0])
    assert (rows[2]["alone"], rows[2]["all"], rows[2]["ratio"]) == (None, 2.0, None)
    everybody = (0, 1, 2, 3)
    right = [(0, (0,), None), (0, everybody, None), (1, (1,), None), (1, (1, 2, 3), None), (2, (0,), None),
             (3, (0,), None), (3, everybody, 6)]  # fmt: skip
    assert ranks.asked == 2 * right  # 6: as many as take 0.3 s alone


def test_a_run_that_is_cut_off_leaves_the_turns_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(contention, "Ranks", Made)
    monkeypatch.setattr(Made, "turns", 7)
    path = tmp_path / "found.json"
    words = ["program", "--cpu", "--ranks", "4", "--only", "ring,in step", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="cut off"):
        contention.main()
    found = json.loads(path.read_text())
    assert found["turns"] == 1 and [row["pattern"] for row in found["rows"]] == ["ring", "in step"]


def test_names_of_ways_are_as_published_and_choose_them() -> None:
    assert [way.name for way in WAYS[:9]] == [
        "27 MiB, rotated", "whole ranges, rotated", "16 MiB, rotated", "4 MiB, rotated", "1 MiB, rotated",
        "whole ranges, in order", "4 MiB, in order", "whole ranges, together", "16 MiB, together",
    ]  # fmt: skip
    assert len({way.name for way in WAYS}) == len(WAYS)
    kernels = ["8 programs", "16 programs", "32 programs", "all multiprocessors"]
    assert [way.name for way in chosen("programs, all multi", gpus=True)] == [
        f"{pattern}: {copies}" for pattern in ("all", "ring") for copies in kernels
    ]
    assert chosen("programs", gpus=False) == () and chosen("", gpus=True) == WAYS


@pytest.mark.full
def test_ranks_pull_alone_and_at_once() -> None:
    ranks = Ranks(Shape(3, "shm", experts=6, row_bytes=1 << 16), ENGINES)
    try:
        [rows] = measure(ranks, 0.02, 1)
    finally:
        ranks.close()
    assert [row["name"] for row in rows] == [way.name for way in ENGINES]
    assert all(row["all"] >= row["slowest"] > 0 for row in rows)
    assert all(row["alone"] > 0 and row["ratio"] > 0 for row in rows if row["pattern"] != "one reader")
