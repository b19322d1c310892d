"""Ports at which ranks tell where their KV cache lies: what would collide, or leave an engine waiting, is one line."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.executor.abstract import Executor

from tests.unit.leftovers import build, check_message, refusal
from vllm_dwdp.engine.executor import DwdpExecutor, DwdpUniExecutor
from vllm_dwdp.errors import DwdpError

pytestmark = pytest.mark.usefixtures("nothing_left")

NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_producer"}
OTHER = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
INSIDE = {
    "kv_connector": "MultiConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"connectors": [OTHER, NIXL]},
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The first of two ports in a row; somebody listens at the second."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1] - 1
            with socket.socket() as first:
                if first.connect_ex(("127.0.0.1", port)) == 0:
                    continue
            monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(port))
            monkeypatch.delenv("VLLM_NIXL_SIDE_CHANNEL_HOST", raising=False)
            yield port
            return


@pytest.mark.parametrize("transfer", [NIXL, INSIDE], ids=["nixl", "inside-of-multi"])
def test_a_port_of_a_rank_that_is_taken(transfer: dict[str, Any], taken: int, tiny_moe: Path) -> None:
    message = refusal(lambda: build(tiny_moe, kv_transfer_config=transfer))
    check_message(
        message, [f"rank 1 cannot listen at localhost:{taken + 1}", "in use", "its own VLLM_NIXL_SIDE_CHANNEL_PORT"]
    )


def test_ports_are_asked_of_nixl_only(taken: int, tiny_moe: Path) -> None:
    build(tiny_moe)
    build(tiny_moe, kv_transfer_config=OTHER)


def test_ports_are_left_free(taken: int, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(port))
    for _ in range(2):
        build(tiny_moe, kv_transfer_config=NIXL)


@pytest.mark.parametrize(
    ("port", "words"),
    [
        (
            65535,
            "rank 1",
        ),
        (0, "rank 0"),
    ],
)
def test_ports_that_there_are_not(port: int, words: str, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(port))
    message = refusal(lambda: build(tiny_moe, kv_transfer_config=NIXL))
    check_message(message, [words, f"now {port}", "to 1 to 6553"])


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_hosts_that_are_not_this_machine(host: str, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", host)
    message = refusal(lambda: build(tiny_moe, kv_transfer_config=NIXL))
    check_message(
        message, [f"rank 0 cannot listen at {host}:", "VLLM_NIXL_SIDE_CHANNEL_HOST to an address of this machine"]
    )


@pytest.mark.parametrize("cls", [DwdpExecutor, DwdpUniExecutor])
def test_a_port_that_was_taken_while_a_rank_loaded(
    cls: type[Executor], taken: int, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM asks for this right before its scheduler listens; its engine would wait for ever."""
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(taken + 2))
    config = build(tiny_moe, kv_transfer_config=NIXL)
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(taken))
    executor = cls.__new__(cls)
    executor.vllm_config = config
    monkeypatch.setattr(cls, "collective_rpc", lambda self, name: [{(0, 0): name}])
    executor.parallel_config = SimpleNamespace(data_parallel_index=0)  # type: ignore[assignment]
    assert executor.get_kv_connector_handshake_metadata() == [{(0, 0): "get_kv_connector_handshake_metadata"}]
    executor.parallel_config = SimpleNamespace(data_parallel_index=1)  # type: ignore[assignment]
    with pytest.raises(DwdpError, match=f"rank 1 cannot listen at localhost:{taken + 1}"):
        executor.get_kv_connector_handshake_metadata()
