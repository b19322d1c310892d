"""ci/bench/contention.py over shared memory."""

from __future__ import annotations

import pytest

from ci.bench.contention import WAYS, Ranks, Shape, measure


@pytest.mark.full
def test_ranks_pull_alone_and_at_once() -> None:
    ranks = Ranks(Shape(3, "shm", experts=6, row_bytes=1 << 16))
    try:
        rows = measure(ranks, 0.02, 1)
    finally:
        ranks.close()
    assert [row["way"] for row in rows] == [way.name for way in WAYS]
    assert all(row["alone"] > 0 and row["all"] >= row["slowest"] > 0 and row["ratio"] > 0 for row in rows)
