"""examples/ranks_apart.py without engines: what came of requests, figures, picture, and the router as we start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import behind_router
import ranks_apart
import ranks_apart_picture
from ranks_apart import Mark
from servers import BIN, Server, Servers, free_ports, run_with_servers, series
from steady_load import TOKENS, Asked, Load, complete, over, rates

REPO = Path(__file__).resolve().parents[2]
WHOLE = tuple(range(TOKENS))
GOOD = Asked(0.0, 0.5, False, WHOLE)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    found = Servers(tmp_path)
    yield found
    found.stop()


@pytest.fixture
def answering(servers: Servers) -> Callable[..., Server]:
    """Starts a server of tests/unit/answering.py."""

    def start(name: str, port: int = 0) -> Server:
        port = port or free_ports(1)
        words = [sys.executable, "-m", "tests.unit.answering", name, str(port)]
        return servers.start(name, port, words, {"PYTHONPATH": str(REPO)})

    return start


def test_only_servers_that_were_left_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(servers: Servers, stops: bool) -> int:
        servers.start("one", 1, [sys.executable, "-c", "import time; time.sleep(60)"], {})
        if stops:
            servers.stop()
        return 3

    assert run_with_servers("some", partial(run, stops=True)) == 3 and capsys.readouterr().out == ""
    assert run_with_servers("some", partial(run, stops=False)) == 3
    assert capsys.readouterr().out == "some: 1 servers stopped\n"


def test_a_rank_says_how_it_came_by_its_experts_however_quiet_the_shell(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setattr(ranks_apart, "BIN", servers.folder)
    vllm = servers.folder / "vllm"
    vllm.write_text("#!/bin/sh\necho $VLLM_LOGGING_LEVEL\n")
    vllm.chmod(0o700)
    started = ranks_apart.start_rank(servers, ranks_apart.Group("model", 2, servers.folder), 0)
    assert started.process.wait(20) == 0 and started.log.read_text() == "INFO\n"


def test_what_came_of_a_request(servers: Servers, answering: Callable[..., Server]) -> None:
    """Whole, cut off, or failed; a stream that ends in silence is no answer."""
    server = answering("one")
    servers.wait(20)
    for streamed in (False, True):
        asked = complete(server.url, "whole", streamed)
        assert (asked.tokens, asked.trouble, asked.streamed) == (WHOLE, "", streamed)
        assert not asked.failed and not asked.cut and 0.1 <= asked.ended - asked.began < 20
    cut = complete(server.url, "cut", streamed=True)
    assert (cut.tokens, cut.trouble, cut.cut, cut.failed) == ((0, 1, 2), "ended after 3 of 16 tokens", True, False)
    error = complete(server.url, "error", streamed=True)
    assert error.cut and "engine is dead" in error.trouble
    broken = complete(server.url, "broken")
    assert broken.failed and not broken.cut and "500" in broken.trouble and "on purpose" in broken.trouble
    servers.stop()
    gone = complete(server.url, "gone", streamed=True)
    assert gone.failed and not gone.cut and "refused" in gone.trouble


def test_figures_of_a_span() -> None:
    """By when requests ended; what failed before a first token counts apart from what was cut off."""
    asked = [
        GOOD,
        Asked(0.0, 1.0, True, WHOLE),
        Asked(0.5, 3.5, False, WHOLE),
        Asked(1.0, 2.0, True, WHOLE[:4], "cut"),
        Asked(1.0, 2.5, False, WHOLE[:0], "refused"),
        Asked(1.0, 2.5, False, WHOLE[:4], "short"),
        Asked(1.0, 2.5, True, WHOLE[:0], "refused"),
    ]
    assert over(asked, 0.0, 1.0) == (1, 0, 0, 0, 0.5)
    assert over(asked, 1.0, 3.0) == (1, 2, 1, 1, 1.5)
    assert over(asked, 1.0, 5.0).answers == 2 and over(asked, 1.0, 5.0).slowest_s == 3.0
    assert over([], 0.0, 1.0) == (0, 0, 0, 0, 0.0)


def test_rates_over_time() -> None:
    """Of whole windows only; troubles are no answers."""
    asked = [Asked(0.0, 10 + at, False, WHOLE) for at in (1.0, 3.0, 3.5, 6.0, 6.5)]
    asked.append(Asked(0.0, 13.0, True, WHOLE[:2], "cut"))
    assert rates(asked, 10.0, 18.0, width_s=4.0) == [(2.0, 0.75), (3.0, 0.75), (4.0, 0.5), (5.0, 1.0), (6.0, 0.5)]
    assert rates(asked, 10.0, 13.0, width_s=4.0) == []


def story() -> tuple[list[Asked], list[Mark]]:
    asked = [Asked(at, at + 0.5, False, WHOLE) for at in range(40)]
    asked += [
        Asked(10.0, 11.0, True, WHOLE[:3], "ended"),
        Asked(12.0, 12.5, True, WHOLE[:0], "refused"),
        Asked(38.0, 41.0, True, WHOLE),
    ]
    marks = [Mark(0.0, "load begins", "before"), Mark(10.0, "killed", "it is dead"), Mark(40.0, "end", "")]
    return asked, marks


def test_the_report() -> None:
    lines = ranks_apart.report(*story())
    assert re.fullmatch(r"before +10 +10 +1.0 +0 +0 +0.5 s", lines[1])
    # What ends late counts to the last part.
    assert re.fullmatch(r"it is dead +30 +31 +1.0 +1 +1 +3.0 s", lines[2])
    assert lines[3] == "43 requests, 3 of them streams; the slowest took 3.0 s"
    assert lines[4] == "0 of 40 requests that do not stream failed"
    assert lines[5].startswith("1 of 3 streams were cut off") and lines[5].endswith(
        "; 1 failed before their first token"
    )


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes for the same figures; where it cannot be drawn that is told before anything starts."""
    pytest.importorskip("matplotlib")
    paths = [tmp_path / f"{i}.svg" for i in range(2)]
    for path in paths:
        ranks_apart_picture.check(str(path))
        ranks_apart_picture.draw(*story(), str(path))
    first, second = (path.read_text() for path in paths)
    assert first == second and "<!-- 1  killed -->" in first and "<!-- streams cut off: 1 -->" in first
    for wrong in ("no/such/folder.svg", str(tmp_path / "a.txt")):
        with pytest.raises(SystemExit, match=r"name an .svg or .png in a folder that is there"):
            ranks_apart_picture.check(wrong)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="needs matplotlib"):
        ranks_apart_picture.check(str(paths[0]))


@pytest.mark.full
@pytest.mark.skipif(not (BIN / "vllm-router").exists(), reason="needs the extra `disaggregated`")
def test_the_router_loses_no_request_when_a_server_dies_and_returns(
    servers: Servers, answering: Callable[..., Server]
) -> None:
    """And when one joins and leaves. Only streams under way are cut."""
    behind = [answering(name) for name in ("one", "two")]
    servers.wait(20)
    router = behind_router.start_router(servers, behind)
    servers.wait(30)
    with Load(router.url, clients=8) as load:
        time.sleep(1)
        os.kill(behind[1].process.pid, signal.SIGKILL)
        assert behind_router.wait_for(router, behind[1], there=False) < 10
        servers.stop(behind[1])
        before = len(load.asked)
        behind[1] = answering("two", int(behind[1].url.rsplit(":", 1)[1]))
        assert behind_router.wait_for(router, behind[1], there=True) < 10
        deadline = time.monotonic() + 15
        while not series(behind[1], "vllm:answered"):
            assert time.monotonic() < deadline, "a server that is back gets no requests"
            time.sleep(0.1)
        third = answering("three")
        servers.wait(20)
        behind_router.add(router, third)
        assert behind_router.wait_for(router, third, there=True) < 10
        time.sleep(1)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(complete, third.url, "slow", streamed=True)
            behind_router.leave(servers, router, third)
        assert slow.result().trouble == ""
        assert third.url not in behind_router.healthy(router) and third not in servers.started
        time.sleep(1)
    assert load.troubles(streamed=False) == [] and len(load.asked) > before > 10
    assert all("ended after" in trouble or "IncompleteRead" in trouble for trouble in load.troubles(streamed=True))
    with pytest.raises(SystemExit, match="the router still holds three gone"):
        behind_router.wait_for(router, third, there=True, limit_s=0.2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ranks", "1"], "ranks_apart: --ranks 1: DWDP takes 2 or more"),
        (["--clients", "0"], "ranks_apart: --clients 0: without one there is no load"),
        (["--picture", "no/such/folder.svg"], "name an .svg or .png"),
    ],
)
@pytest.mark.skipif(not (BIN / "vllm-router").exists(), reason="needs the extra `disaggregated`")
def test_words_that_are_wrong(words: list[str], told: str) -> None:
    """One line, before anything starts."""
    done = subprocess.run(
        [sys.executable, "examples/ranks_apart.py", *words], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr
