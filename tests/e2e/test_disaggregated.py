"""DWDP prefill on two ranks, a plain vLLM that decodes, vllm-router in front: tokens, balance, ends of each of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

import pytest

from tests.e2e.disaggregated import Cluster, cluster, example, needs_extra
from tests.e2e.job import PROMPTS

pytestmark = [pytest.mark.e2e, needs_extra]

RANKS = 2
LONG = " ".join(PROMPTS * 2)  # some blocks of the KV cache


@pytest.fixture(scope="module")
def parts(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = checkpoint(family="qwen3_moe", num_experts=16)
    with cluster(tmp_path_factory.mktemp("disaggregated"), example.Plan(str(model), RANKS)) as started:
        yield started


def test_tokens_are_plain_vllms_from_every_rank(parts: Cluster) -> None:
    """Twice each: the router takes ranks in turn. The long ones share a prefix of several blocks."""
    prompts = [*PROMPTS, LONG, f"{LONG} {LONG}"]
    before, prompts_before = parts.transfers(), parts.prompts()
    through = [parts.ask(prompt) for prompt in prompts for _ in range(RANKS)]
    assert through == [tokens for prompt in prompts for tokens in [parts.alone(prompt)] * RANKS]
    assert parts.transfers() - before == len(through)
    assert [now - then for now, then in zip(parts.prompts(), prompts_before, strict=True)] == [len(prompts)] * RANKS
    for server in (parts.prefill, parts.decode):
        assert example.series(server, "vllm:prefix_cache_hits_total") > 0


@pytest.mark.full
def test_prompts_are_spread_under_load(parts: Cluster) -> None:
    """Of uneven length, through the router and, without it, by vLLM's own balancer; one rank alone when it is named."""
    load = [f"{i} {LONG}"[: 20 + 60 * (i % 5)] for i in range(16)]
    logprobs = {"max_tokens": 1, "logprobs": 1}

    def first(prompt: str) -> float:
        answer = parts.post(parts.router, {"prompt": prompt, **logprobs})
        return float(answer["choices"][0]["logprobs"]["token_logprobs"][0])

    before = parts.prompts()
    with ThreadPoolExecutor(8) as pool:
        through = list(pool.map(first, load))
    after = parts.prompts()
    assert sum(after) - sum(before) == len(load)
    assert min(now - then for now, then in zip(after, before, strict=True)) >= len(load) // 3
    # Batches differ, so logprobs may by a little.
    alone = [parts.post(parts.decode, {"prompt": prompt, "cache_salt": "alone", **logprobs}) for prompt in load]
    assert through == pytest.approx([each["choices"][0]["logprobs"]["token_logprobs"][0] for each in alone], abs=0.05)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda prompt: parts.post(parts.prefill, {"prompt": prompt, "max_tokens": 1}), load))
    balanced = parts.prompts()
    assert min(now - then for now, then in zip(balanced, after, strict=True)) >= len(load) // 4
    parts.post(parts.prefill, {"prompt": "one", "max_tokens": 1}, rank=1)
    assert [now - then for now, then in zip(parts.prompts(), balanced, strict=True)] == [0, 1]


def test_ranks_have_ids_and_ports_of_their_own(parts: Cluster) -> None:
    """What prefill tells a decoding engine. Here nobody fetches: the blocks stay until vLLM's lease ends."""
    told = [
        parts.post(
            parts.prefill,
            {"prompt": LONG, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}},
            rank=rank,
        )["kv_transfer_params"]
        for rank in range(RANKS)
    ]
    ids, ports = [each["remote_engine_id"] for each in told], [each["remote_port"] for each in told]
    assert [name.rsplit("_", 1)[1] for name in ids] == ["dp0", "dp1"] and len({name[:36] for name in ids}) == 1
    assert ports == [ports[0], ports[0] + 1]
    environ = Path(f"/proc/{parts.prefill.process.pid}/environ").read_bytes().split(b"\0")
    assert f"VLLM_NIXL_SIDE_CHANNEL_PORT={ports[0]}".encode() in environ
    assert example.series(parts.prefill, "vllm:kv_cache_usage_perc") > 0


def abort(parts: Cluster, chunks: int) -> None:
    """Begin a stream through the router and close the connection after so many lines of it."""
    connection = http.client.HTTPConnection("127.0.0.1", int(parts.router.url.rsplit(":", 1)[1]), timeout=60)
    body = {"model": "demo", "prompt": LONG, "max_tokens": 600, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    if chunks:
        reply = connection.getresponse()
        for _ in range(chunks):
            assert reply.readline()
    connection.close()


def test_several_answers_and_aborts(parts: Cluster) -> None:
    """Of aborts, before the first token (the prompt may be computed, and never fetched) and after it, nothing stays."""
    several = parts.post(parts.router, {"prompt": LONG, "n": 3, "temperature": 0.8, "seed": 1, "max_tokens": 6})
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    assert several["usage"]["completion_tokens"] == 18
    for chunks in (0, 1, 5):
        abort(parts, chunks)
    assert parts.ask(LONG) == parts.alone(LONG)


@pytest.mark.full
def test_a_stopped_rank_holds_its_own_requests_only(parts: Cluster) -> None:
    prompts = PROMPTS[:4]
    expected = [parts.alone(prompt) for prompt in prompts]
    stopped = parts.rank_pids(1)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(4) as pool:
        try:
            answers = [pool.submit(parts.ask, prompt) for prompt in prompts]
            # Half of them are the other rank's.
            parts.wait_until("two of four answer", lambda: sum(answer.done() for answer in answers) == 2, 30)
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        assert [answer.result() for answer in answers] == expected


class Load:
    """Clients that ask again and again; what they got."""

    def __init__(self, parts: Cluster, expected: dict[str, list[int]], clients: int = 4) -> None:
        self.parts, self.expected, self.ended = parts, expected, threading.Event()
        self.right, self.failed, self.wrong = 0, 0, list[str]()
        self.threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        while not self.ended.is_set():
            for prompt, tokens in self.expected.items():
                try:
                    got = self.parts.ask(prompt)
                except (OSError, http.client.HTTPException, SystemExit):  # refused, cut off, or too few tokens
                    self.failed += 1
                    self.ended.wait(0.2)
                else:
                    self.right += got == tokens
                    self.wrong += [prompt] * (got != tokens)

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        self.parts.wait_until("requests are answered", lambda: self.right >= len(self.threads), 60)
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def load(parts: Cluster) -> Load:
    return Load(parts, {prompt: parts.alone(prompt) for prompt in PROMPTS[:2]})


@pytest.mark.full
def test_a_router_that_is_killed_and_started_again(parts: Cluster, load: Load) -> None:
    """Clients see a closed connection; the new router knows what it is told, and engines lose nothing."""
    with load:
        parts.servers.stop(parts.router, sign=signal.SIGKILL)
        with pytest.raises(URLError):
            parts.ask("nobody there")
        parts.router = example.start_router(parts.servers, parts.prefill, parts.decode)
        parts.servers.wait(60)
        answered = load.right
        parts.wait_until("requests are answered again", lambda: load.right > answered + 4)
    assert load.failed and not load.wrong


@pytest.mark.full
def test_no_kv_cache_stays_in_use(parts: Cluster) -> None:
    """After all of the above: aborts, prompts that nobody fetched, a stopped rank, a killed router."""
    parts.wait_until_quiet()
    assert example.series(parts.prefill, "vllm:nixl_num_kv_expired_reqs_total") >= RANKS


@pytest.mark.full
@pytest.mark.parametrize("which", ["decode", "prefill"])
def test_an_engine_that_is_killed_and_started_again(which: str, parts: Cluster, load: Load) -> None:
    """All of its launch ends, and nothing of it stays. Clients get errors until it is there again, at the same address."""
    server: example.Server = getattr(parts, which)
    with load:
        # A rank's engine: DWDP's launch ends with it.
        [*_, engine] = parts.pids(server, "EngineCore_DP1" if which == "prefill" else "EngineCore")
        os.kill(engine, signal.SIGKILL)
        server.process.wait(60)
        parts.wait_until("all of it ended", lambda: not parts.pids(server, ""), 30)
        failed = load.failed
        parts.wait_until("clients get errors", lambda: load.failed > failed + 4)
        # The other one goes on.
        if which == "prefill":
            assert parts.alone("No rank waits")
        parts.servers.started.remove(server)
        port = int(server.url.rsplit(":", 1)[1])
        setattr(parts, which, example.start_engines(parts.servers, parts.plan, which == "decode", port))
        parts.servers.wait(400)
        answered = load.right
        parts.wait_until("requests are answered again", lambda: load.right > answered + 4)
    assert not load.wrong
    parts.wait_until_quiet()


def test_nothing_stays(parts: Cluster) -> None:
    """The last test of this module: it ends everything."""
    with contextlib.suppress(OSError):
        parts.post(parts.prefill, {"prompt": LONG, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}})
    assert parts.left() == []
