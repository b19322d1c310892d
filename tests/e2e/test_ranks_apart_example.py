"""examples/ranks_apart.py as users run it: its figures, and nothing left, however it ends."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.disaggregated import example
from tests.e2e.engines import gpus, start_example

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.full,
    pytest.mark.skipif(gpus() > 0, reason="CPU only: servers on cores of their own"),
    pytest.mark.skipif(not (example.BIN / "vllm-router").exists(), reason="needs the extra `disaggregated`"),
]


@pytest.mark.timeout(1200)
def test_no_request_fails_whatever_happens_to_a_rank(tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    process, log, before = start_example("ranks_apart", tmp_path, "--picture", str(picture))
    try:
        assert process.wait(1100) == 0, log.read_text()
    finally:
        process.kill()
    text = log.read_text()
    print(text)
    [failed, asked] = re.search(r"(\d+) of (\d+) requests that do not stream failed", text).groups()
    assert int(failed) == 0 and int(asked) > 100
    [cut, streams, early] = re.search(r"(\d+) of (\d+) streams were cut .* (\d+) failed before", text).groups()
    # Those that the killed server had, of which there are at most as many as clients.
    assert int(cut) + int(early) <= 6 < int(streams)
    assert "rank 2: experts adopted, in " in text and "rank 3: experts adopted, in " in text
    rows = [line.split() for line in text.splitlines() if line.endswith(" s") and "there   " in line]
    assert len(rows) == 3 and all(int(row[-6]) > 0 for row in rows)
    assert "4 servers stopped" in text and "6  rank 3: leaves" in picture.read_text()
    assert before.check(process.pid) == []


def test_ctrl_c_while_a_rank_is_dead_leaves_nothing(tmp_path: Path) -> None:
    process, log, before = start_example("ranks_apart", tmp_path)
    try:
        while "the router takes it out" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 128 + signal.SIGINT
    finally:
        process.kill()
    assert "Traceback" not in log.read_text() and "servers stopped" in log.read_text()
    assert before.check(process.pid) == []
