"""Acquire and release as custom ops, where torch.compile sees them: around experts that it traces through, as on vLLM's CPU
platform.

Each op declares that it changes a tensor of the layer's data flow, acquire the input of the experts and release their
output, so that the compiler keeps them on either side of the expert kernel, and leaves everything else of the graph as it
is in plain vLLM. Where the layer is behind vLLM's own opaque op, or eager, the gate is called directly.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.library import Library
from vllm.utils.torch_utils import direct_register_custom_op


class LayerGate(Protocol):
    """What a layer calls around its expert compute; `layer` is its place in the ring of its rank, `tokens` those of the
    forward, padding included: the same in both calls."""

    def acquire(self, layer: int, tokens: int) -> None:
        """Return when the weights of `layer` may be read."""

    def release(self, layer: int, tokens: int) -> None:
        """The weights of `layer` are no longer read."""


_gates: list[tuple[LayerGate, int]] = []
_library = Library("dwdp", "FRAGMENT")


def register_gate(gate: LayerGate, layer: int) -> int:
    """Make `gate` and `layer` reachable from a compiled graph; returns the number that the ops take."""
    _gates.append((gate, layer))
    return len(_gates) - 1


def replace_gate(number: int, gate: LayerGate) -> None:
    """Have the ops call `gate` for the layer that was registered as `number`."""
    _gates[number] = (gate, _gates[number][1])


def _acquire(states: torch.Tensor, number: int) -> None:
    gate, layer = _gates[number]
    gate.acquire(layer, len(states))


def _release(states: torch.Tensor, number: int) -> None:
    gate, layer = _gates[number]
    gate.release(layer, len(states))


def _nothing(states: torch.Tensor, number: int) -> None:
    return None


direct_register_custom_op("acquire", _acquire, mutates_args=["states"], fake_impl=_nothing, target_lib=_library)
direct_register_custom_op("release", _release, mutates_args=["states"], fake_impl=_nothing, target_lib=_library)
