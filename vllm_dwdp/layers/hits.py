"""Counts on the device how many tokens each layer sends to each expert, in captured graphs and compiled code too.

A layer adds its `topk_ids` to a row of one fixed tensor: no host code sees a number, and nothing waits. Rows that are no
tokens, as vLLM pads captured batches and runs dummy ones, are left out by vLLM's own mask where it gives one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.library import Library
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hits_file import Hits
from vllm_dwdp.layers.build import LayerBuild


class Row(NamedTuple):
    """Where one layer counts."""

    counts: torch.Tensor  # int64 [E + 1]; the last takes what is no expert
    one: torch.Tensor  # int64 [1]


_rows: list[Row] = []
_library = Library("dwdp", "FRAGMENT")


def count(ids: torch.Tensor, number: int) -> None:
    """Count `ids`, the experts that tokens are sent to ([tokens, top_k], integers), for the layer of this number."""
    row = _rows[number]
    if (padding := _padding()) is not None:
        ids = ids.masked_fill(padding[: ids.shape[0]].unsqueeze(1), -1)
    # vLLM marks experts that it leaves out with -1, which becomes the last place.
    places = ids.reshape(-1).remainder(row.counts.shape[0])
    row.counts.index_add_(0, places, row.one.expand(places.shape[0]))


def _padding() -> torch.Tensor | None:
    """bool [at least tokens]: True for rows that are no tokens; None where vLLM does not say."""
    return get_forward_context().is_padding if is_forward_context_available() else None


def _nothing(ids: torch.Tensor, number: int) -> None:
    return None


# As acquire and release do (gates.py), it says that it changes what the kernel reads, so that compiled code keeps it.
direct_register_custom_op("count_hits", count, mutates_args=["ids"], fake_impl=_nothing, target_lib=_library)


class HitCounts:
    """The counts of all MoE layers of a rank.

    Raises DwdpError for a layer whose kernel routes by itself, since nobody sees where its tokens go.
    """

    def __init__(self, layers: Sequence[LayerBuild], rank: int, device: torch.device) -> None:
        for layer in layers:
            if layer.module.quant_method.is_monolithic:
                raise DwdpError(
                    f"dwdp.hits cannot count {layer.name}, whose kernel routes tokens by itself: leave it out, or choose "
                    "other kernels with --moe-backend"
                )
        self._layers, self._rank = tuple(layers), rank
        most = max(layer.placement.num_experts for layer in layers)
        self._table = torch.zeros((len(layers), most + 1), dtype=torch.int64, device=device)
        one = torch.ones(1, dtype=torch.int64, device=device)
        for layer, counts in zip(layers, self._table, strict=True):
            _rows.append(Row(counts[: layer.placement.num_experts + 1], one))
            layer.module.dwdp_hits = len(_rows) - 1

    def reset(self) -> None:
        """Forget what was counted, such as vLLM's warm-up."""
        self._table.zero_()

    def read(self) -> Hits:
        """What was counted so far; waits for the device."""
        table = self._table.tolist()
        counts = {
            layer.name: tuple(row[: layer.placement.num_experts])
            for layer, row in zip(self._layers, table, strict=True)
        }
        tokens = max(sum(counts[layer.name]) // layer.module.top_k for layer in self._layers)
        return Hits(tokens, counts)

    def summary(self) -> dict[str, dict[str, int]]:
        """Layer -> hits in total, and of experts that this rank holds."""
        counts = self.read().layers
        return {
            layer.name: {
                "total": sum(counts[layer.name]),
                "local": sum(counts[layer.name][expert] for expert in layer.placement.shares[self._rank]),
            }
            for layer in self._layers
        }


def ids_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """`topk_ids` among what vLLM passes to `forward_modular` behind the hidden states."""
    ids: torch.Tensor = kwargs["topk_ids"] if "topk_ids" in kwargs else args[1]
    return ids
