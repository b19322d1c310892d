"""Another number of ranks without a gap: a second group beside the first, behind one router, under load."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.engines import REPO, Leftovers, environment, gpus, processes

sys.path.insert(0, str(REPO / "examples"))
import behind_router
from ranks_apart import Group, start_rank
from servers import BIN, Servers
from steady_load import Load

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.full,
    pytest.mark.skipif(gpus() > 0, reason="CPU only: servers on cores of their own; ranks apart never ran on GPUs"),
    pytest.mark.skipif(not (BIN / "vllm-router").exists(), reason="needs the extra `disaggregated`"),
]


@pytest.mark.timeout(900)
def test_two_ranks_become_three_and_no_request_is_lost(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams neither."""
    model, before = checkpoint(family="qwen3_moe", num_experts=16), Leftovers()
    for name, value in environment(TMPDIR=str(before.tmp)).items():
        monkeypatch.setenv(name, value)
    (meet := tmp_path / "meet").mkdir()
    servers = Servers(tmp_path)
    try:
        old, new = (Group(str(model), ranks, meet, f"of-{ranks}") for ranks in (2, 3))
        first = [start_rank(servers, old, rank) for rank in range(old.ranks)]
        servers.wait(400)
        router = behind_router.start_router(servers, first)
        servers.wait(60)
        with Load(router.url, clients=4) as load:
            time.sleep(5)
            second = [start_rank(servers, new, rank) for rank in range(new.ranks)]
            servers.wait(500)
            for server in second:
                behind_router.add(router, server)
            for server in first:
                behind_router.leave(servers, router, server)
            alone = len(load.asked)
            assert behind_router.healthy(router) == {server.url for server in second}
            time.sleep(5)
        assert load.troubles(streamed=False) == load.troubles(streamed=True) == []
        assert len(load.asked) > alone > 20
        print(f"{len(load.asked)} requests, {len(load.asked) - alone} of them of the new group alone")
        groups = [server.process.pid for server in servers.started]
    finally:
        servers.stop()
    assert [line for group in groups for line in processes(group)] + before.check(groups[0]) == []
