"""Hits are written while a launch serves."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

pytest.importorskip("vllm")

from tests.unit.helpers import LIMIT_S
from vllm_dwdp.engine import hits_writer
from vllm_dwdp.engine.hits_writer import HitsWriter
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hits_file import Hits


class Device:
    """Counts hits, and keeps what was written."""

    def __init__(self) -> None:
        self.tokens = 0
        self.written: list[int] = []

    def read(self) -> Hits:
        return Hits(self.tokens, {"layers.0": (self.tokens,)})

    def write(self, hits: Hits) -> None:
        self.written.append(hits.tokens)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_new_hits_are_written_without_anybody_asking() -> None:
    device = Device()
    writer = HitsWriter(device.read, device.write, 0, period_s=0.01)
    writer.start()
    time.sleep(0.05)
    assert device.written == []
    device.tokens = 3
    until(lambda: device.written == [3])
    device.tokens = 5
    until(lambda: device.written == [3, 5])
    time.sleep(0.05)
    assert device.written == [3, 5]
    device.tokens = 6
    assert writer.now().tokens == 6 and device.written[-1] == 6
    writer.close()
    assert device.written == [3, 5, 6, 6]


def test_a_launch_that_served_nothing_leaves_an_earlier_file() -> None:
    device = Device()
    writer = HitsWriter(device.read, device.write, 0, period_s=0.01)
    writer.start()
    assert writer.now().tokens == 0
    writer.close()
    assert device.written == []


def test_a_file_that_cannot_be_written_is_a_warning_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(hits_writer.logger, "warning", lambda text, *values: said.append(text % values))
    device = Device()
    device.tokens = 1

    def refuse(hits: Hits) -> None:
        if len(said) < 2:
            raise DwdpError("no room")
        device.write(hits)

    writer = HitsWriter(device.read, refuse, 3, period_s=0.01)
    writer.start()
    until(lambda: device.written == [1])
    assert said == ["dwdp rank 3: hits are lost: no room"] * 2
    with pytest.raises(DwdpError, match="no room"):
        said.clear()
        writer.now()
    writer.close()
