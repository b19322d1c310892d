"""Ports at which engines that fetch KV caches ask a rank of ours where its lies: NixlConnector's side channel.

Rank i listens at VLLM_NIXL_SIDE_CHANNEL_PORT + i. Where it cannot, vLLM's thread for it dies and its engine waits for that
thread for ever: so the ports are tried before.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vllm import envs

from vllm_dwdp.errors import DwdpError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_LAST_PORT = 65535


def _connectors(name: str | None, extra: Mapping[str, Any]) -> Iterator[str]:
    """A connector and, of a MultiConnector, those in it."""
    yield name or ""
    for inner in extra.get("connectors", ()):
        yield from _connectors(inner.get("kv_connector"), inner.get("kv_connector_extra_config") or {})


def _uses_nixl(config: VllmConfig) -> bool:
    transfer = config.kv_transfer_config
    if transfer is None:
        return False
    return any(
        name.startswith("Nixl") for name in _connectors(transfer.kv_connector, transfer.kv_connector_extra_config)
    )


def check_ports(config: VllmConfig, ranks: Iterable[int]) -> None:
    """Try the ports of these ranks and leave them free; raises DwdpError where a rank could not listen at its own."""
    if not _uses_nixl(config):
        return
    host, base = envs.VLLM_NIXL_SIDE_CHANNEL_HOST, envs.VLLM_NIXL_SIDE_CHANNEL_PORT
    for rank in ranks:
        port = base + rank
        where = f"rank {rank} cannot listen at {host}:{port}, the port of NixlConnector's side channel"
        if not 0 < port <= _LAST_PORT:
            raise DwdpError(f"{where}: set VLLM_NIXL_SIDE_CHANNEL_PORT, now {base}, to 1 to {_LAST_PORT - rank}")
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                # As ZMQ does: a port whose last connections are just closing is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
        except OSError as error:
            raise DwdpError(
                f"{where} ({error.strerror}): set VLLM_NIXL_SIDE_CHANNEL_HOST to an address of this machine, and give every "
                "launch on it its own VLLM_NIXL_SIDE_CHANNEL_PORT, with as many free ports from there as it has ranks"
            ) from None
