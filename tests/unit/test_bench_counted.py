"""ci/bench/counted.py: what DWDP's counters say of a turn, and that nothing about them spoils one."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from ci.bench import counted
from ci.bench.results import summary, table
from vllm_dwdp.engine.metrics import COUNTERS


def page(*waits: float, factor: float = 1.0) -> str:
    """Metrics of a server with a rank for each of `waits`, seconds; the others are numbers times `factor`."""
    lines = ["# HELP dwdp:forwards_total Forwards.", "# TYPE dwdp:forwards_total counter", 'vllm:x_total{a="b"} 3.0']
    for number, name in enumerate(counted.SERIES):
        for rank, wait in enumerate(waits):
            value = wait if name == "exposed_wait_seconds" else factor * 1e9 * (number + 1) * (rank + 1)
            lines.append(f'dwdp:{name}_total{{engine="{rank}"}} {value}')
    return "\n".join([*lines, 'dwdp:experts_held{engine="0"} 64.0', ""])


def test_every_series_is_one_that_servers_publish() -> None:
    assert {f"dwdp:{name}" for name in counted.SERIES} <= {series.name for series in COUNTERS}


def test_a_page_without_a_rank_in_each_series_tells_nothing() -> None:
    found = counted.parse(page(0.5, 1.5))
    assert found["exposed_wait_seconds"] == {0: 0.5, 1: 1.5} and set(found) == set(counted.SERIES)
    for missing in ('dwdp:layers_total{engine="1"}', 'dwdp:forwards_total{engine="0"}'):
        lines = [line for line in page(0.5, 1.5).splitlines() if not line.startswith(missing)]
        with pytest.raises(ValueError, match="is there for ranks"):
            counted.parse("\n".join(lines))
    with pytest.raises(ValueError, match="ranks"):
        counted.parse("vllm:x_total 3.0")


def test_shares_and_rates_are_means_of_ranks_over_the_whole_turn() -> None:
    before, after = counted.parse(page(1.0, 2.0)), counted.parse(page(1.2, 2.6, factor=3.0))
    found = counted.grown(before, after, seconds=4.0)
    assert found is not None
    assert found["exposed_wait_share"] == pytest.approx((0.2 + 0.6) / 2 / 4)
    assert found["exposed_wait_share_worst"] == pytest.approx(0.6 / 4)
    number = counted.SERIES.index("pulled_bytes") + 1
    assert found["pulled_bytes_per_s"] == pytest.approx(2e9 * number * 1.5 / 4)
    assert found["by_rank"]["pulled_bytes"] == [2e9 * number, 4e9 * number]
    assert counted.grown(before, counted.parse(page(1.2)), 4.0) is None
    # A rank that was started again: a mean with it would be wrong, if not below zero.
    assert counted.grown(before, counted.parse(page(9.0, 0.5, factor=3.0)), 4.0) is None


def turn(waits: tuple[float, ...] | None) -> dict[str, Any]:
    rest = {"tokens_per_s": 40.0, "output_per_s": 1.0, "ttft_s": [0.1], "itl_s": []}
    if waits is None:
        return rest
    zero = counted.parse(page(*[0.0] * len(waits), factor=0.0))
    return {**rest, "dwdp": counted.grown(zero, counted.parse(page(*waits)), seconds=2.0)}


def test_a_summary_has_medians_of_those_turns_that_told_and_a_line() -> None:
    turns = {
        "mixed": {"dpep": [turn(None)] * 4, "d64": [turn((0.1, 0.3)), turn(None), turn((1.0, 1.0)), turn((0.0, 0.02))]}
    }
    found = summary(turns, "dpep")
    mine = found["mixed"]["d64"]["dwdp"]
    assert "dwdp" not in found["mixed"]["dpep"] and (mine["turns"], mine["ranks"]) == (3, 2)
    assert (mine["exposed_wait_share"], mine["exposed_wait_share_worst"]) == pytest.approx((0.1, 0.15))
    late = counted.SERIES.index("travel_late") + 1
    assert mine["travel_late"] == 3 * (1 + 2) * late * 10**9
    (line,) = counted.lines(found, {"d64": 2, "dpep": 2})
    assert line.startswith("mixed: d64: exposed wait 10 % of the time, mean of 2 ranks, 15 % on the worst; ")
    assert "requests to owners late" in line and "GB/s read directly" in line
    assert "mean of 2 of 4 ranks" in counted.lines(found, {"d64": 4})[0]
    mine |= {"exposed_wait_share": 0.00314, "travel_requests": 0, "direct_forwards": 0}
    (line,) = counted.lines(found, {"d64": 2})
    assert "exposed wait 0.31 % " in line and "owners" not in line and "read directly" not in line
    assert table(found, "dpep").count("\n") == 2


class Page(BaseHTTPRequestHandler):
    """Answers with the next of `texts`; its server is asked for nothing else."""

    texts: Iterator[tuple[int, str]] = iter(())

    def do_GET(self) -> None:
        assert self.path == "/metrics"
        status, text = next(self.texts)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(counted.time, "sleep", found.append)
    monkeypatch.setattr(counted.time, "monotonic", itertools.count(100.0, 0.5).__next__)
    return found


def test_a_turn_has_what_grew_between_the_reads_around_it(url: str, slept: list[float]) -> None:
    Page.texts = iter([(200, page(wait, 2 * wait)) for wait in (0.0, 1.0, 5.0)])
    one, turns = counted.Counted(url), [{"turn": 0}, {"turn": 1}]
    one.next()
    assert slept == [0.0]
    for turn in turns:
        one.worked(2.0)
        one.keep(turn)
        assert "dwdp" not in turn
        one.next()
    # A clock that goes on by half a second with each look: the rest of what publishing takes is waited for.
    assert slept[1:] == pytest.approx([counted.PUBLISHED_S - 0.5] * 2)
    waits = [turn["dwdp"]["by_rank"]["exposed_wait_seconds"] for turn in turns]  # type: ignore[index]
    assert waits == [[1.0, 2.0], [4.0, 8.0]] and turns[0]["dwdp"]["seconds"] == 2.0  # type: ignore[index]


def test_what_cannot_be_read_leaves_a_turn_as_it_is(url: str, slept: list[float]) -> None:
    bad = [(500, "broken"), (200, "vllm:x 1\n"), (200, page(1.0))]
    Page.texts = iter([(200, page(0.0)), *bad, (200, page(2.0))])
    one, turns = counted.Counted(url), [{"turn": number} for number in range(4)]
    one.next()
    for turn in turns:
        one.worked(2.0)
        one.keep(turn)
        one.next()
    assert [("dwdp" in turn) for turn in turns] == [False, False, False, True]


def test_a_server_that_is_gone_or_silent_is_waited_for_no_longer_than_a_get_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counted, "GET_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        assert counted.read(f"http://127.0.0.1:{silent.getsockname()[1]}") is None
        silent.listen()
        assert counted.read(f"http://127.0.0.1:{silent.getsockname()[1]}") is None
