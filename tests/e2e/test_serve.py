"""`vllm serve` with dwdp: the API, pinning, metrics, independence of the ranks, and its end."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.engines import environment
from tests.e2e.server import VLLM, Server, dwdp_arguments, start_server

pytestmark = pytest.mark.e2e

RANKS = 2
PROMPT = "No rank waits"


@pytest.fixture(scope="module")
def server(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two ranks behind two API servers (vLLM's default), contiguous view."""
    server = start_server(
        tmp_path_factory.mktemp("serve"),
        checkpoint(family="qwen3_moe", num_experts=16),
        *dwdp_arguments(RANKS, weight_view="contiguous"),
        "--enforce-eager",
    )
    yield server
    try:
        # Where the last test is not chosen: killed, a server leaves vLLM's queues in shared memory.
        server.stop()
    finally:
        server.kill()


def settle(server: Server, field: str = "dwdp:layers_total") -> dict[str, float]:
    """Metrics once they no longer change: they are published once a second."""
    last = server.metrics(field)
    for _ in range(20):
        time.sleep(2.2)
        now = server.metrics(field)
        if now == last and now:
            return now
        last = now
    raise AssertionError(f"{field} still changes without requests: {last}")


def test_completions_are_the_same_on_every_rank(server: Server) -> None:
    served = [server.complete(PROMPT, rank=rank) for rank in range(RANKS)]
    assert served[0] == served[1] == server.complete(PROMPT) and len(served[0]) == 8


def test_chat_and_streaming(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    whole = server.post("/v1/chat/completions", body)
    stream = server.post("/v1/chat/completions", {**body, "stream": True})
    assert whole["usage"]["completion_tokens"] == 5
    chunks = [line for line in stream.splitlines() if line.startswith("data: {")]
    assert len(chunks) >= 5 and stream.rstrip().endswith("data: [DONE]")


def test_pinned_requests_run_no_forward_elsewhere(server: Server) -> None:
    before = settle(server, "dwdp:")
    for _ in range(4):
        server.complete(PROMPT, rank=1)
    after = settle(server, "dwdp:")

    def grown(name: str) -> list[float]:
        keys = [f'dwdp:{name}_total{{engine="{rank}"}}' for rank in range(RANKS)]
        return [after[key] - before[key] for key in keys]

    # Not multiplied by the number of API servers: 4 requests of 8 tokens are 32 forwards.
    assert grown("forwards") == [0, 32]
    assert grown("layers") == [0, 4 * 32]


def test_metrics_agree_with_each_other(server: Server) -> None:
    metrics = settle(server, "dwdp:")
    for rank in range(RANKS):
        label = f'{{engine="{rank}"}}'
        assert metrics[f"dwdp:experts_held{label}"] == 8
        assert metrics[f"dwdp:slab_bytes{label}"] > 0 and metrics[f"dwdp:slot_bytes{label}"] > 0
        # Four layers on two slots: every layer computed was pulled, half of its bytes from the peer.
        assert metrics[f"dwdp:pulled_bytes_total{label}"] == metrics[f"dwdp:merged_bytes_total{label}"] > 0
        # Layers are counted in vLLM's warm-up too, forwards are not.
        assert metrics[f"dwdp:layers_total{label}"] >= 4 * metrics[f"dwdp:forwards_total{label}"] > 0
        assert metrics[f"dwdp:direct_forwards_total{label}"] == metrics[f"dwdp:direct_bytes_total{label}"] == 0
        assert metrics[f"dwdp:on_demand_fetches_total{label}"] == 0


def test_vllm_bench_serve_runs_through(server: Server) -> None:
    bench = subprocess.run(
        [
            *(*VLLM, "bench", "serve", "--model", server.model, "--base-url", server.url("")),
            *("--dataset-name", "random", "--input-len", "16", "--output-len", "8", "--num-prompts", "12"),
            *("--max-concurrency", "4", "--disable-tqdm"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert bench.returncode == 0, bench.stdout[-3000:] + bench.stderr[-3000:]
    assert "Successful requests:                     12" in bench.stdout


def latencies(server: Server, rank: int, count: int = 6) -> list[float]:
    """Seconds of pinned requests, one at a time."""
    seconds = []
    for _ in range(count):
        started = time.monotonic()
        server.complete(PROMPT, tokens=24, rank=rank)
        seconds.append(time.monotonic() - started)
    return seconds


def test_a_stopped_rank_delays_nobody(server: Server) -> None:
    usual = statistics.median(latencies(server, rank=0))
    stopped = server.rank_pids(1)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        beside = statistics.median(latencies(server, rank=0))
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    # Generous, since the machine is shared: a rank that waited for its peer would not finish at all.
    assert beside < 5 * usual
    assert server.complete(PROMPT, rank=1) == server.complete(PROMPT, rank=0)


def test_sigterm_ends_everything_also_a_stopped_rank(server: Server) -> None:
    """The last test of this module: it ends the server."""
    for pid in server.rank_pids(1):
        os.kill(pid, signal.SIGSTOP)
    assert server.stop(signal.SIGTERM) < 10
    assert server.left() == []
    log = server.log.read_text()
    assert "dwdp rank 0 stops:" in log and "its engine was killed" not in log


def hit_parts(file: Path) -> dict[str, dict[str, int]]:
    """Rank -> what it wrote so far."""
    return json.loads(file.read_text())["ranks"] if file.exists() else {}


@pytest.mark.full
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_three_ranks_one_api_server(sign: signal.Signals, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    server = start_server(
        tmp_path,
        checkpoint(family="mixtral", num_experts=7),
        *dwdp_arguments(3, hits=str(tmp_path / "hits.json")),
        "--enforce-eager",
        "--api-server-count",
        "1",
    )
    try:
        tokens = [server.complete(PROMPT, rank=rank) for rank in range(3)]
        assert tokens[0] == tokens[1] == tokens[2]
        assert {f'dwdp:layers_total{{engine="{rank}"}}' for rank in range(3)} == set(settle(server))
        # vLLM leaves ranks no time to write at the end.
        deadline = time.monotonic() + 30
        while len(parts := hit_parts(tmp_path / "hits.json")) < 3:
            assert time.monotonic() < deadline, sorted(parts)
            time.sleep(0.5)
        # A terminal sends SIGINT to every process.
        assert server.stop(sign, everywhere=sign == signal.SIGINT) < 10
        assert server.left() == [] and "its engine was killed" not in server.log.read_text()
        # A prompt and all tokens but the last.
        assert hit_parts(tmp_path / "hits.json") == parts and sorted(parts) == ["0", "1", "2"]
        assert len({part["tokens"] for part in parts.values()}) == 1 and parts["0"]["tokens"] > 8
    finally:
        server.kill()
