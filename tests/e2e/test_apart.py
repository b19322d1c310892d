"""Ranks that are servers of their own: tokens, a kill of one under load of the other, and its return."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import as_one_rank, gpus, rank_cores, run_job, side_by_side
from tests.e2e.server import Server, dwdp_arguments, start_server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(gpus() > 0, reason="CPU only: servers on cores of their own"),
]

RANKS = 2
PROMPTS = ("No rank waits", "for another one", "and a dead one takes nobody along")


def arguments(rank: int, meet: str, **more: Any) -> list[str]:
    settings = {"group": "e2e", "rank": rank, "ranks": RANKS, "meet": meet, "timeout_s": 200, **more}
    return ["--enforce-eager", *dwdp_arguments(1), "--additional-config", json.dumps({"dwdp": settings})]


@dataclass
class Group:
    """Two servers, and the tokens of plain vLLM."""

    folder: Path
    model: Path
    meet: str
    expected: dict[str, list[int]]
    servers: list[Server]

    def start(self, rank: int, **more: Any) -> Server:
        return start_server(self.folder, self.model, *arguments(rank, self.meet, **more))


@pytest.fixture(scope="module")
def group(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """The servers start at once, in no order, beside plain vLLM, which goes when it has told its tokens."""
    folder, model = tmp_path_factory.mktemp("apart"), checkpoint(family="qwen3_moe", num_experts=16)
    with tempfile.TemporaryDirectory() as meet, ThreadPoolExecutor(3) as pool:
        cores = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, rank_cores(RANKS)[0]))}
        plain = pool.submit(start_server, folder, model, "--enforce-eager", env=cores)
        found = Group(folder, model, meet, {}, [])
        starting = [pool.submit(found.start, rank) for rank in range(RANKS)]
        try:
            found.servers = [start.result() for start in starting]
            found.expected = {prompt: plain.result().complete(prompt) for prompt in PROMPTS}
            plain.result().stop()
            yield found
        finally:
            for server in [*found.servers, plain.result()]:
                server.kill()


@dataclass
class Load:
    """Requests to a server, one after the other, each compared with plain vLLM's tokens, until it is left."""

    group: Group
    rank: int
    pause_s: float = 0.02
    answered: int = 0
    slowest_s: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._send)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _send(self) -> None:
        for prompt in itertools.cycle(PROMPTS):
            if self._over.wait(self.pause_s):
                return
            began = time.monotonic()
            try:
                if (tokens := self.group.servers[self.rank].complete(prompt)) != self.group.expected[prompt]:
                    self.wrong.append(f"{prompt}: {tokens}")
            except OSError as error:
                self.wrong.append(f"{prompt}: {error}")
            self.answered += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)


def alive(server: Server, wanted: float, limit_s: float = 10) -> bool:
    """Whether a server comes to see that many peers."""
    deadline = time.monotonic() + limit_s
    while list(server.metrics("dwdp:peers_alive").values()) != [wanted] and time.monotonic() < deadline:
        time.sleep(0.2)
    return list(server.metrics("dwdp:peers_alive").values()) == [wanted]


def test_tokens_are_plain_vllms_on_every_server(group: Group) -> None:
    for rank, server in enumerate(group.servers):
        assert {prompt: server.complete(prompt) for prompt in PROMPTS} == group.expected
        assert alive(server, 1)
        time.sleep(1.5)  # counters are published once a second
        counted = server.metrics()
        assert counted[f'dwdp:forwards_total{{engine="{rank}"}}'] > 0
        assert 0 < counted[f'dwdp:experts_held{{engine="{rank}"}}'] < 16


def test_a_killed_rank_takes_nobody_along_and_returns(group: Group) -> None:
    with Load(group, 0) as load:
        time.sleep(1)
        dead = group.servers[1]
        [worker] = dead.pids("VLLM::Worker")
        os.kill(worker, signal.SIGKILL)
        assert alive(group.servers[0], 0)
        killed = load.answered
        time.sleep(2)
        group.servers[0].get("/health")
        # Nothing is waited for that is no longer there.
        assert load.answered > killed + 3 and load.slowest_s < 5
        dead.process.wait(60)  # vLLM ends a server whose worker is gone
        load.pause_s = 0.5  # the start needs the cores, of which there may be two
        group.servers[1] = group.start(1)
        assert alive(group.servers[0], 1)
        with Load(group, 1) as second:
            time.sleep(2)
    assert (load.wrong, second.wrong) == ([], []) and second.answered > 3
    print(f"answered {load.answered} and {second.answered}, slowest {load.slowest_s:.2f} s")
    text = group.servers[1].log.read_text()
    assert "dwdp rank 1: experts adopted, in " in text
    told = group.servers[0].log.read_text()
    assert told.count("dwdp rank 0: rank 1 (life 1, process ") == 1 and "serving goes on" in told
    assert told.count("dwdp rank 0: rank 1 is there again (life 2, process ") == 1
    for server in group.servers:
        server.stop()
    assert [server.left() for server in (dead, *group.servers)] == [[], [], []]
    # The last one takes the folder along, unless vLLM leaves its worker no time.
    assert os.listdir(group.meet) in ([], [f"dwdp-group-{os.geteuid()}-e2e"])


@pytest.mark.full
def test_an_extra_rank_comes_and_outlives_the_others_which_return_from_it(group: Group) -> None:
    """Contiguous, workers in their engines; and a fourth server, extra too, that is none of this group."""
    settings = {"weight_view": "contiguous", "launcher": "uni"}
    for server in group.servers:
        server.stop()
    started: list[Server] = []
    try:
        with ThreadPoolExecutor(RANKS + 1) as pool:
            started += pool.map(lambda rank: group.start(rank, **settings), [0, 1, 3])
        extra = started[-1]
        assert all(alive(server, 2) for server in started)
        assert {prompt: extra.complete(prompt) for prompt in PROMPTS} == group.expected
        counted = extra.metrics()
        assert counted['dwdp:experts_held{engine="3"}'] == started[1].metrics()['dwdp:experts_held{engine="1"}']
        for server in started[:RANKS]:
            [engine] = server.pids("VLLM::EngineCore")
            os.kill(engine, signal.SIGKILL)
        assert alive(extra, 0)
        for server in started[:RANKS]:
            server.process.wait(60)
        with pytest.raises(AssertionError, match="cannot share experts"):
            group.start(4, **settings, num_slots=3)
        assert {prompt: extra.complete(prompt) for prompt in PROMPTS} == group.expected
        with ThreadPoolExecutor(RANKS) as pool:
            started += pool.map(lambda rank: group.start(rank, **settings), range(RANKS))
        assert all(alive(server, 2) for server in started[RANKS:])
        extra.stop()
        for rank, server in enumerate(started[-RANKS:]):
            assert f"dwdp rank {rank}: experts adopted, in " in server.log.read_text()
            assert alive(server, 1) and "rank 3 (life 1, process " in server.log.read_text()
            assert {prompt: server.complete(prompt) for prompt in PROMPTS} == group.expected
        for server in started[-RANKS:]:
            server.stop()
    finally:
        for server in started:
            server.kill()
    assert [server.left() for server in started] == [[]] * len(started)


@pytest.mark.full
def test_programs_of_their_own(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Offline, contiguous, workers in their engines; whoever is done first leaves the other its experts."""
    model = checkpoint(family="qwen3_moe", num_experts=9)

    def program(rank: int, meet: str) -> dict[str, Any]:
        settings = {"group": "programs", "rank": rank, "ranks": RANKS, "meet": meet, "timeout_s": 200}
        settings |= {"weight_view": "contiguous", "launcher": "uni"}
        options = {"distributed_executor_backend": "dwdp", "additional_config": {"dwdp": settings}}
        return run_job(tmp_path, model, ["tokens", "digests", "counters"], **options)

    with tempfile.TemporaryDirectory() as meet:
        plain, *shared = side_by_side(
            lambda: run_job(tmp_path, model, ["tokens", "digests"], **as_one_rank(RANKS)),
            *(functools.partial(program, rank, meet) for rank in range(RANKS)),
        )
        assert os.listdir(meet) == []
    for rank, job in enumerate(shared):
        assert job["tokens"] == plain["tokens"] and job["left"] == []
        assert job["digests"] == plain["digests"]
        [counters] = job["counters"]
        assert (counters["rank"], counters["view"], counters["experts_held"]) == (rank, "contiguous", 4 + rank)
        assert counters["pulled_bytes"] > 0 and counters["requests"] > 0
