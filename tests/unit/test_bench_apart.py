"""ci/bench/apart.py: which devices and ports each side has, and a router that does not come up."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ci.bench import apart, loads, servers
from ci.bench.loads import arguments


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Instead of processes: their words and environments."""
    found: list[tuple[list[str], dict[str, str]]] = []

    class Process:
        pid = 1 << 22  # nobody's

        def __init__(self, words: list[str], env: dict[str, str], **more: Any) -> None:
            found.append((words, env))

        def poll(self) -> int:
            return 3

    monkeypatch.setattr(subprocess, "Popen", Process)
    return found


def transfer(words: list[str]) -> dict[str, Any]:
    return json.loads(words[words.index("--kv-transfer-config") + 1])


def test_every_rank_and_process_has_a_side_channel_of_its_own(tmp_path: Path, started: list[Any]) -> None:
    for text in ("dwdp", "replicas"):
        apart.Prefill(servers.parse_system(text), tmp_path, [], ["0", "1"], False, tmp_path, "http://decode")
    apart.Decode(servers.parse_system("tp"), tmp_path, [], ["2", "3"], False, tmp_path)
    ports = [int(env["VLLM_NIXL_SIDE_CHANNEL_PORT"]) for _, env in started]
    assert ports[2] == ports[1] + 1, "of two replicas"
    roles = [transfer(words)["kv_role"] for words, _ in started]
    assert roles == ["kv_producer"] * 3 + ["kv_consumer"]
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started] == ["0,1", "0", "1", "2,3"]
    assert all("UCX_TLS" not in env for _, env in started), "on GPUs UCX chooses"


def test_a_router_that_does_not_come_up_is_told(
    tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = apart.Prefill(servers.parse_system("dwdp"), tmp_path, [], ["0", "1"], False, tmp_path, "http://decode:1")
    monkeypatch.setattr(servers, "healthy", lambda url: True)
    with pytest.raises(servers.ServerFailed, match="the router of dwdp did not come up"):
        made.wait(time.monotonic() + 5)
    words = started[-1][0]
    assert words[words.index("--decode") + 1] == "http://decode:1" and words.count("--prefill") == 1


def test_devices_are_split() -> None:
    assert apart.split("0123", 2, False) == (["0", "1"], ["2", "3"])
    assert apart.split("01", 2, True) == (["0", "1"], ["0"])
    assert apart.split("01", 2, False) == (["0", "1"], ["0", "1"])
    for prefill in (0, 5):
        with pytest.raises(ValueError, match="there are 4 devices"):
            apart.split("0123", prefill, False)


def test_sides_without_devices_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(sys, "argv", ["loads", "--systems", "dwdp", "tp", "--decode", "tp", "--prefill-devices", "3"])
    with pytest.raises(SystemExit):
        arguments()
    assert "--prefill-devices 3: there are 2 devices" in capsys.readouterr().err


def test_what_cannot_decode_for_all_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    (router := tmp_path / "vllm-router").touch()
    for decode, where, says in (
        ("replicas", router, "--decode replicas: 2 servers, but one decodes for all"),
        ("tp", tmp_path / "none", f"there is no {tmp_path}/none, which takes requests"),
        ("tp", router, ""),
    ):
        monkeypatch.setattr(apart, "ROUTER", where)
        monkeypatch.setattr(sys, "argv", ["loads", "--systems", "dwdp", "tp", "--decode", decode])
        if says:
            with pytest.raises(SystemExit):
                arguments()
            assert says in capsys.readouterr().err
        else:
            assert arguments().decode.kind == "tp"


def test_a_decode_that_does_not_come_up_is_one_line(
    tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (router := tmp_path / "vllm-router").touch()
    monkeypatch.setattr(apart, "ROUTER", router)
    monkeypatch.setattr(loads, "devices_of", lambda cpu: ["0", "1"])
    monkeypatch.setattr(servers.Server, "stop", lambda *_: None)  # of processes that are nobody's
    words = ["loads", "--cpu", "--systems", "dwdp", "tp", "--decode", "tp", "--logs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"^bench: decode-tp ended with 3: no error \(.*decode-tp-0.log\)$"):
        loads.main()
    assert started, "it was"


def test_no_port_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that start side by side listen only later."""
    first = apart._free_ports(3)
    real, asked = apart.socket.socket.getsockname, [first + 2, first - 2]

    def getsockname(self: Any) -> Any:
        return ("127.0.0.1", asked.pop()) if asked else real(self)

    monkeypatch.setattr(apart.socket.socket, "getsockname", getsockname)
    second = apart._free_ports(3)
    assert abs(second - first) >= 3 and not asked
