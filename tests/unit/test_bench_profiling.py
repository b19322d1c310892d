"""ci/bench/profiling.py: a turn with the profiler on, and that nothing of it spoils what is measured."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ci.bench import loads as bench_loads
from ci.bench import profiling
from ci.bench import run as bench_run
from ci.bench.client import LoadFailed, Window
from ci.bench.load import Load
from ci.bench.models import write_model
from ci.bench.profiled import Event, Trace, summarise
from ci.bench.servers import System
from tests.unit.test_bench_loads import bench

LOAD = Load("decode 8/x", 4, 2, 1)
RANKS = [{"rank": "0", "device": True}]


class Engine(ThreadingHTTPServer):
    """A server of vLLM as far as its profiler goes: `traces` that a stop writes into `folder`, whether a load was there."""

    def __init__(self, folder: Path, traces: int, statuses: dict[str, int], stuck: str) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.traces, self.statuses, self.stuck = folder, traces, statuses, stuck
        self.freed = threading.Event()
        self.asked: list[tuple[str, dict[str, Any], bool]] = []
        self.loaded, self.prefix = False, ""
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Engine

    def do_POST(self) -> None:
        what = self.path[1:]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((what, body, self.server.loaded))
        if what == self.server.stuck:
            self.server.freed.wait(60)
        status = self.server.statuses.get(what, 200)
        if what == "start_profile":
            self.server.prefix = body["profile_prefix"]
        elif status == 200 and self.server.prefix:
            for rank in range(self.server.traces):
                name = f"{self.server.prefix}_dp{rank}.{time.time_ns()}.pt.trace.json.gz"
                (self.server.folder / name).touch()
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


class Turns:
    """Servers, and what is put in the place of a load and of the reading of traces."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.engines = folder / "traces", list[Engine]()
        self.read: list[str] = []
        self.free_after = False
        self.args = argparse.Namespace(traces=self.folder, logs=None, ramp_s=0.0, profile_s=0.05, answer_s=1.0)
        monkeypatch.setattr(profiling, "AFTER_S", 60.0)  # of machines that are slow
        monkeypatch.setattr(profiling, "steady", self.steady)
        monkeypatch.setattr(profiling, "read_apart", self.read_apart)

    @asynccontextmanager
    async def steady(self, *_: Any) -> AsyncIterator[None]:
        for engine in self.engines:
            engine.loaded = True
        try:
            yield
        finally:
            for engine in self.engines:
                engine.loaded = False
                if self.free_after:
                    engine.freed.set()

    def read_apart(self, made: list[Path]) -> list[dict[str, Any]]:
        assert all(each.exists() for each in made)
        self.read = sorted(each.name.partition(".")[0] for each in made)
        return RANKS

    def server(self, *, engines: int = 1, **more: Any) -> Any:
        """Of so many processes; more: statuses, and what is stuck, of the last one."""
        for last in range(engines):
            mine = more if last == engines - 1 else {}
            engine = Engine(self.folder, 2, mine.get("statuses", {}), mine.get("stuck", ""))
            threading.Thread(target=engine.serve_forever).start()
            self.engines.append(engine)
        urls = [engine.url for engine in self.engines]
        return SimpleNamespace(urls=urls, targets=lambda pinned: [], system=System("dwdp", "dwdp:ü", {}))

    def take(self, server: Any, limit_s: float = 5.0) -> Any:
        return profiling.take(server, LOAD, [], self.args, limit_s)

    def asked(self) -> list[list[str]]:
        return [[what for what, _, _ in engine.asked] for engine in self.engines]


@pytest.fixture
def turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Turns]:
    made = Turns(tmp_path, monkeypatch)
    yield made
    for engine in made.engines:
        engine.freed.set()
        engine.shutdown()
        engine.server_close()


def test_every_process_is_profiled_under_load_and_its_traces_go(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    slept, sleep = list[float](), asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: slept.append(seconds) or sleep(seconds))
    turns.args.ramp_s = 0.01
    server = turns.server(engines=2)
    turns.folder.mkdir()
    (turns.folder / "decode.1.pt.trace.json.gz").touch()  # of a turn before
    assert turns.take(server) == RANKS and slept == [0.01, 0.05]
    assert turns.asked() == [["start_profile", "stop_profile"]] * 2
    assert all(loaded for engine in turns.engines for _, _, loaded in engine.asked)
    # Letters that vLLM takes, and the number of the process.
    assert turns.read == [f"decode-8-x-dwdp---{number}_dp{rank}" for number in range(2) for rank in range(2)]
    assert [each.name for each in turns.folder.iterdir()] == ["decode.1.pt.trace.json.gz"]
    turns.args.logs = turns.folder
    turns.take(server)
    assert len(list(turns.folder.iterdir())) == 5


def test_a_load_ends_while_traces_are_written(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "AFTER_S", 0.05)
    turns.free_after = True
    assert turns.take(turns.server(stuck="stop_profile"), limit_s=20.0) == RANKS


def test_names_of_traces_are_those_that_vllm_takes() -> None:
    from vllm.config.profiler import validate_profile_prefix

    for load, system in (("decode1", "dwdp"), ("-ä", "ö"), ("...", ""), ("x" * 300, "a b:{}")):
        assert validate_profile_prefix(profiling.prefix(load, system, 15))


def test_vllm_takes_the_words(tmp_path: Path) -> None:
    from vllm.config import ProfilerConfig

    flag, text = profiling.words(tmp_path)
    config = ProfilerConfig(**json.loads(text))
    assert flag == "--profiler-config" and config.torch_profiler_dir == str(tmp_path)
    assert not (
        config.torch_profiler_with_stack or config.torch_profiler_record_shapes or config.should_profile_frontend
    )


def test_a_server_that_has_no_profiler_says_so_and_is_measured_on(turns: Turns) -> None:
    server = turns.server(engines=2, statuses={"start_profile": 404, "stop_profile": 404})
    with pytest.raises(profiling.ProfileFailed, match="status 404 of /start_profile") as caught:
        turns.take(server)
    # The first one's had started.
    assert not caught.value.on and turns.asked() == [["start_profile", "stop_profile"]] * 2
    assert not list(turns.folder.iterdir())


def test_a_start_that_takes_too_long_is_stopped(turns: Turns) -> None:
    server = turns.server(stuck="start_profile")
    with pytest.raises(profiling.ProfileFailed, match="/start_profile was not answered within 2 s") as caught:
        turns.take(server, limit_s=2.0)
    assert not caught.value.on and "stop_profile" in turns.asked()[0]


def test_a_load_that_fails_is_no_more_than_a_profile_that_is_not_there(
    turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def steady(*_: Any) -> AsyncIterator[None]:
        raise LoadFailed("no token in time")
        yield

    monkeypatch.setattr(profiling, "steady", steady)
    with pytest.raises(profiling.ProfileFailed, match="LoadFailed: no token in time") as caught:
        turns.take(turns.server())
    assert not caught.value.on


@pytest.mark.parametrize("stuck", ["", "stop_profile"])
def test_a_load_that_fails_while_it_is_profiled_is_told_once_the_profiler_was_stopped(
    stuck: str, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the traces would show ranks without requests, and nobody would know why."""

    @asynccontextmanager
    async def steady(*_: Any) -> AsyncIterator[None]:
        yield
        raise LoadFailed("status 500")

    monkeypatch.setattr(profiling, "AFTER_S", 0.05)
    monkeypatch.setattr(profiling, "steady", steady)
    with pytest.raises(profiling.ProfileFailed, match="status 500" if not stuck else "/stop_profile") as caught:
        turns.take(turns.server(stuck=stuck), limit_s=2.0 if stuck else 20.0)
    assert turns.asked() == [["start_profile", "stop_profile"]] and caught.value.on == bool(stuck)


def test_a_profiler_that_may_still_run_ends_the_system_and_no_other(
    turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "CALL_S", 2.0)
    slow, said, dropped, written = turns.server(stuck="stop_profile"), list[str](), list[str](), list[int]()
    fast = turns.server()
    fast.urls = fast.urls[1:]
    bench: Any = SimpleNamespace(
        servers={"slow": slow, "fast": fast},
        deadline=time.monotonic() + 60,
        found={"profile": {}},
        drop=lambda name, why: dropped.append(f"{name}: {why}"),
        write=lambda: written.append(1),
    )
    profiling.profile_load(bench, turns.args, LOAD, [], said.append)
    assert dropped == ["slow: its profiler may still run"] and bench.found["profile"] == {LOAD.name: {"fast": RANKS}}
    assert "no profile of slow: /stop_profile was not answered within 2 s" in said[0] and len(written) == 1
    bench.deadline = time.monotonic() + profiling.LEAST_S - 1
    profiling.profile_load(bench, turns.args, LOAD, [], said.append)
    assert said[2:] == [f"{LOAD.name}: no profile of {name}: out of time" for name in ("slow", "fast")]


def test_a_profiler_that_does_not_answer_takes_no_more_than_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(profiling, "take", lambda *given: limits.append(given[-1]) or RANKS)
    for left in (50.0, 1000.0):
        found: dict[str, Any] = {"profile": {}}
        bench: Any = SimpleNamespace(servers={"a": None}, found=found, write=lambda: None)
        bench.deadline = time.monotonic() + left
        profiling.profile_load(bench, argparse.Namespace(), LOAD, [], lambda _: None)
    assert limits[0] <= 25 and limits[1] == profiling.CALL_S


def test_a_profile_comes_after_the_turns_of_its_load_and_spoils_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second load's profiler may run on, which ends the system after its turns."""
    events: list[str] = []

    async def play(targets: Any, load: Load, *_: Any) -> Window:
        events.append(load.name)
        return Window(5.0, 100.0, 1.0, 5, [0.1], [], {})

    def take(_: Any, load: Load, *__: Any) -> list[dict[str, Any]]:
        events.append("profile")
        if load.name == "two":
            raise profiling.ProfileFailed("no answer", on=True)
        return summarise([Trace("0", True, 0.0, 150e3, [60e3], [Event("nvjet", "matrix products", 50e3, 75e3)])])

    monkeypatch.setattr(bench_run, "turn", play)
    monkeypatch.setattr(profiling, "take", take)
    made = bench(tmp_path, monkeypatch, ["replicas"], "--turns", "2", "--profile")
    write_model("tiny", 1, tmp_path)
    made.run(tmp_path)
    made.tell()
    found = json.loads((tmp_path / "r.json").read_text())
    # Two warm-ups, two turns.
    assert events == [*["one"] * 4, "profile", *["two"] * 4, "profile"]
    assert {load: len(rows["replicas"]) for load, rows in found["turns"].items()} == {"one": 2, "two": 2}
    assert set(found["failed"]) == {"replicas"} and set(found["profile"]) == {"one"}
    assert found["profile"]["one"]["replicas"][0]["kinds"]["matrix products"] == 25
    assert "25.00 ( 25.0%)" in capsys.readouterr().out


def test_traces_are_read_in_a_process_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(profiling.ProfileFailed, match="no rank wrote a trace"):
        profiling.read_apart([])
    span = {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "ts": 0, "dur": 150e3}
    traces = [tmp_path / f"a_dp{rank}.{rank}.pt.trace.json" for rank in (1, 0)]
    for each in traces:
        each.write_text(json.dumps({"traceEvents": [span]}))
    assert [rank["rank"] for rank in profiling.read_apart(traces)] == ["a_dp0", "a_dp1"]
    traces[0].write_text("{}")
    with pytest.raises(
        profiling.ProfileFailed, match=r"2 traces: profiled: a_dp1\.1\.pt\.trace\.json: it has no traceEvents"
    ):
        profiling.read_apart(traces)


def test_servers_have_a_profiler_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for more in ([], ["--profile"]):
        monkeypatch.setattr(sys, "argv", ["loads", "--cpu", *more])
        args = bench_loads.arguments()
        args.traces = tmp_path
        assert ("--profiler-config" in bench_loads.common_words(args, args.loads)) == bool(more)
