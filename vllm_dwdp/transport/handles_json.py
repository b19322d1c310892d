"""Handles as JSON, for the launch's folder."""

from __future__ import annotations

from typing import Any

from vllm_dwdp.transport.base import Handle


def handle_to_json(handle: Handle) -> dict[str, Any]:
    """A handle for the launch's folder."""
    return {**handle.to_dict(), "payload": handle.payload.hex()}


def handle_from_json(raw: dict[str, Any]) -> Handle:
    """The inverse of `handle_to_json`."""
    return Handle.from_dict({**raw, "payload": bytes.fromhex(raw["payload"])})
