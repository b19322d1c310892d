"""Forwards of few tokens read missing experts from their owners' slabs; those of many pull them into slots.

Which, is told by the number of tokens, so that all layers of a forward go the same way. A direct forward leaves the ring
alone: what is in the slots, or on its way, stays right. It moves nothing by itself, so that CUDA graphs may hold it, and an
owner that died is read on, since its memory stays mapped.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_dwdp.direct import LayerCosts, direct_tokens, expected_hits
from vllm_dwdp.prefetch.counters import CounterPage

if TYPE_CHECKING:
    from vllm_dwdp.layers.slabs import LayerSlab
    from vllm_dwdp.prefetch.prefetcher import Prefetcher

#: Bytes that are copied within the device to measure its memory: past any cache.
_MEMORY_BYTES = 1 << 26


class DirectGate:
    """Acquire and release of one layer of a split or composite view: forwards of at most `tokens` tokens read directly."""

    def __init__(self, prefetcher: Prefetcher, module: Any, tokens: int) -> None:
        self._prefetcher, self._module, self._tokens = prefetcher, module, tokens

    def acquire(self, layer: int, tokens: int) -> None:
        """Have the kernel take the table for this forward, with the slot filled where that is read.

        Raises as `Prefetcher.acquire`.
        """
        direct = tokens <= self._tokens
        self._module.dwdp_compute_direct(direct)
        if not direct:
            self._prefetcher.acquire(layer)

    def release(self, layer: int, tokens: int) -> None:
        """As `Prefetcher.release`, for forwards that pull."""
        if tokens > self._tokens:
            self._prefetcher.release(layer)


class ForwardCounts:
    """Counts forwards of the model by the way they go; told by the worker, since replayed graphs run none of our code.

    most_direct: the most tokens of a direct forward; None where every forward reads in place. travels: of those, the least
    and the most whose tokens travel.
    """

    def __init__(
        self,
        counters: CounterPage,
        layers: Sequence[LayerSlab],
        rank: int,
        most_direct: int | None,
        travels: tuple[int, int] = (1, 0),
    ) -> None:
        self._counters, self._most_direct, self._travels = counters, most_direct, travels
        # Layers are alike but for few; a forward costs one power for each kind.
        kinds: dict[tuple[int, int], int] = {}
        for layer in layers:
            placement = layer.build.placement
            nbytes = sum(tensor.row_bytes for tensor in layer.fetched) * len(placement.missing(rank))
            kind = (placement.num_experts, layer.build.module.top_k)
            kinds[kind] = kinds.get(kind, 0) + nbytes
        self._missing_bytes = [(experts, top_k, nbytes) for (experts, top_k), nbytes in kinds.items()]

    def reset(self) -> None:
        """Forget vLLM's warm-up."""
        page = self._counters.fields
        page.forwards = page.direct_forwards = page.direct_bytes = page.travel_forwards = 0

    def add(self, tokens: int) -> None:
        """A forward of `tokens` tokens begins, counted by what it has, though its graph may have more and go another way:
        one token in a graph of the least that travel travels, and counts as read. No graph pulls."""
        page = self._counters.fields
        page.forwards += 1
        least, most = self._travels
        if least <= tokens <= most:
            page.travel_forwards += 1
        elif self._most_direct is None or tokens <= self._most_direct:
            page.direct_forwards += 1
            page.direct_bytes += int(
                sum(expected_hits(experts, top_k, tokens, of=nbytes) for experts, top_k, nbytes in self._missing_bytes)
            )


def memory_rate(device: torch.device) -> float:
    """Bytes per second that this GPU reads from its memory, as copies within it go; measured in about a millisecond."""
    source = torch.empty(_MEMORY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * _MEMORY_BYTES / statistics.median(seconds[1:])


def layer_costs(layer: LayerSlab, rank: int, link: float, memory: float, flops: float) -> LayerCosts:
    """Of a layer on `rank`, its rates as in LayerCosts."""
    placement, top_k = layer.build.placement, layer.build.module.top_k
    nbytes = sum(tensor.row_bytes for tensor in layer.fetched)
    missing = len(placement.missing(rank))
    moe = layer.build.module.moe_config
    # By the layer's sizes: packed weights are several to an element.
    flop = 2 * top_k * (3 if moe.is_act_and_mul else 2) * moe.hidden_dim * moe.intermediate_size_per_partition
    return LayerCosts(placement.num_experts, missing, top_k, nbytes, missing * nbytes / link, link, memory, flops, flop)


def measured_tokens(layers: Sequence[LayerSlab], rank: int, link: float, memory: float, flops: float) -> int:
    """`direct_tokens` of the layer for which it is least: all layers of a forward go one way. Rates as in LayerCosts."""
    kinds = {(layer.build.placement, layer.build.module.top_k): layer for layer in layers}.values()
    return min(direct_tokens(layer_costs(layer, rank, link, memory, flops)) for layer in kinds)
