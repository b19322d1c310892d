"""ci/bench/starts.py: each system starts without caches and then with those of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ci.bench import starts
from ci.bench.servers import ServerFailed, System


class Starting:
    """A server that looks at its caches when it starts; `tp` does not come up."""

    seen: list[tuple[str, str, bool]]

    def __init__(self, system: System, *_: Any) -> None:
        self._system = system
        cache = Path(os.environ["TRITON_CACHE_DIR"])
        self.seen.append((system.name, str(cache), cache.exists()))
        cache.mkdir(parents=True, exist_ok=True)

    def wait(self, deadline: float) -> None:
        if self._system.kind == "tp":
            raise ServerFailed("tp was not up in time")

    def stop(self) -> None: ...


def test_the_second_start_has_the_caches_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in starts._CACHES:
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setattr(Starting, "seen", [], raising=False)
    monkeypatch.setattr(starts, "Server", Starting)
    result = tmp_path / "s.json"
    monkeypatch.setattr(sys, "argv", ["starts", "--cpu", "--systems", "dwdp", "tp", "dpep", "--json", str(result)])
    assert starts.main() == 1, "tp failed"
    assert [(name, warm) for name, _, warm in Starting.seen] == [
        ("dwdp", False), ("dwdp", True), ("tp", False), ("dpep", False), ("dpep", True)
    ]  # fmt: skip
    assert len({cache for _, cache, _ in Starting.seen}) == 3
    found = json.loads(result.read_text())["seconds"]
    assert {name: len(took) for name, took in found.items()} == {"dwdp": 2, "tp": 0, "dpep": 2}
    assert "tp was not up in time" in capsys.readouterr().out
