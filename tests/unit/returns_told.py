"""ci/bench/returns.py with servers of tests/unit/returning.py in vLLM's place: a pytest plugin."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ci.bench import returns, returns_apart, returns_extra, returns_plain, returns_servers
from ci.root import ROOT

import servers as servers_module  # isort: skip
from servers import Server, Servers, free_ports  # isort: skip


def serve(servers: Servers, name: str, model: Path, words: Sequence[str], port: int = 0, fault: str = "") -> Server:
    """In place of the one that starts vLLM; ports of the group are in a row."""
    peers = [0]
    if "--additional-config" in words:
        dwdp = json.loads(words[words.index("--additional-config") + 1])["dwdp"]
        # The last one is of an extra rank, which may be there: it says how many are.
        ranks = range(dwdp["ranks"] + ("--extra" in sys.argv))
        peers = [port - dwdp["rank"] + rank for rank in ranks if rank != dwdp["rank"]]
    (servers.folder / f"{name}.json").write_text(json.dumps(list(words)))
    port = port or free_ports(1)
    command = [sys.executable, "-m", "tests.unit.returning", name, str(port), ",".join(map(str, peers)), fault]
    return servers.start(name, port, command, {"PYTHONPATH": str(ROOT)})


@pytest.fixture
def returns_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs it with a fault, and with more words; returns (exit status, results)."""

    def run(fault: str = "", *words: str) -> tuple[int, dict[str, Any]]:
        for module in (returns_apart, returns_plain):
            monkeypatch.setattr(module, "serve", functools.partial(serve, fault=fault))
        for module in (returns_apart, returns_extra):
            monkeypatch.setattr(module, "_NOTICE_LIMIT_S", 2.0)
        monkeypatch.setattr(returns_servers, "_LEFT_LIMIT_S", 2.0)
        monkeypatch.setattr(returns_extra, "_END_LIMIT_S", 1.0)
        monkeypatch.setattr(returns_extra, "_TIDY_LIMIT_S", 1.0)
        for limit in ("STOP_LIMIT_S", "TIDY_LIMIT_S"):
            monkeypatch.setattr(servers_module, limit, 1.0)
        monkeypatch.setattr(returns, "visible_gpus", lambda: 4)
        monkeypatch.setattr(returns, "machine", lambda cpu: "a test")
        monkeypatch.setattr(returns_servers, "segments", set)
        result = tmp_path / "returns.json"
        line = ["returns", "--model", "tiny", "--part-s", "1.5", "--settle-s", "0.3", "--json", str(result)]
        line += ["--load", "small=96/1/2", "--scratch", str(tmp_path), *words]
        monkeypatch.setattr(sys, "argv", line)
        args = returns.arguments()
        (folder := tmp_path / "servers").mkdir()
        servers = Servers(folder)
        try:
            code = returns.run(servers, args)
        finally:
            assert servers.started == []
        return code, json.loads(result.read_text())

    return run
