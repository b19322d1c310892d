"""The owner's side of tokens that travel: what its experts give for a mailbox, as calls on a stream.

Every product is computed with the tiles of direct reads, whoever computes it: so a result does not tell who did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from .arguments import Assignment
from .mail import MailLayout
from .split_gemm import split_gemm
from .tiles import Tiles
from .torch_ops import MoeOps, sort_routes
from .travel import answer_kernel, take_kernel
from .weight_table import WeightTable

_PIECE = 4096  # words a program of `take` copies


def products(
    hidden: torch.Tensor, tables: tuple[WeightTable, WeightTable], topk_weights: torch.Tensor, assignment: Assignment,
    ops: MoeOps, tiles: Tiles, gate_up: torch.Tensor, activated: torch.Tensor, partial: torch.Tensor,
    a1_scale: torch.Tensor | None,
) -> None:  # fmt: skip
    """Rows of `partial` for the assigned routes; the others stay as they are."""
    w13, w2 = tables
    split_gemm(hidden, w13, gate_up, assignment, tiles, top_k=topk_weights.shape[1], a_scale=a1_scale)
    second, scale = ops.activate_quantize(activated, gate_up, None)
    split_gemm(second, w2, partial, assignment, tiles, top_k=1, a_scale=scale, router_weights=topk_weights)


def sort(topk_ids: torch.Tensor, tiles: Tiles, experts: int) -> Assignment:
    """vLLM's sorting of the routes to experts 0 to E-1, E itself being none; torch's on a CPU."""
    if not topk_ids.is_cuda:
        return sort_routes(topk_ids, tiles.block_m, experts)
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    places = _places(experts, topk_ids.device)
    return Assignment(*moe_align_block_size(topk_ids, tiles.block_m, experts, places, ignore_invalid_experts=True))


@lru_cache
def _places(experts: int, device: torch.device) -> torch.Tensor:
    """int32 [E + 1], a map of experts on which E is nowhere: vLLM's kernel for few experts leaves routes out by a map only.

    Made at start, by the first request that is tried, before anything is captured."""
    with torch.inference_mode(False):
        places = torch.arange(experts + 1, dtype=torch.int32, device=device)
        places[experts] = -1
    return places


@dataclass(frozen=True)
class Layers:
    """What a rank computes for others from, of all layers of a shape: where it is, and copies for the layer at hand.

    sources: int64 [layers, parts], addresses; targets, words: int64 [parts]. tables: over the targets.
    """

    sources: torch.Tensor
    targets: torch.Tensor
    words: torch.Tensor
    most_words: int
    tables: tuple[WeightTable, WeightTable]
    held: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, layers: Sequence[tuple[WeightTable, WeightTable]]) -> Layers:
        """From the layers' tables of direct reads."""
        first, made, parts, copies = layers[0], [], [], []
        for which in (0, 1):
            table = first[which]
            parts.append([pair[which].addresses for pair in layers])
            copy = torch.empty_like(table.addresses)
            copies.append(copy)
            # No descriptor: its origin would be the first layer's.
            new: dict[str, Any] = {"addresses": copy, "origin": 0, "unit": 0}
            if table.scales is not None:
                parts.append([_scales(pair[which]) for pair in layers])
                copies.append(torch.empty_like(parts[-1][0]))
                new["scales"] = replace(table.scales, values=copies[-1])
            if table.bias is not None:
                parts.append([_bias(pair[which]) for pair in layers])
                copies.append(torch.empty_like(parts[-1][0]))
                new["bias"] = copies[-1]
            made.append(replace(table, **new))
        device = first[0].addresses.device
        rows = [[part[layer].data_ptr() for part in parts] for layer in range(len(layers))]
        sources = torch.tensor(rows, dtype=torch.int64, device=device)
        targets = torch.tensor([copy.data_ptr() for copy in copies], dtype=torch.int64, device=device)
        words = [copy.numel() * copy.element_size() // 4 for copy in copies]
        sizes = torch.tensor(words, dtype=torch.int64, device=device)
        return cls(sources, targets, sizes, max(words), (made[0], made[1]), tuple(t for p in parts for t in p))

    def serve(
        self, mail: torch.Tensor, layout: MailLayout, room: int, rows: torch.Tensor, flag: torch.Tensor, ops: MoeOps,
        tiles: Tiles,
    ) -> None:  # fmt: skip
        """Answer what is in `mail`, a batch of `room` tokens: to be captured once, and replayed for each request.

        mail: uint8 [mail_bytes] of this rank's memory. rows: [room * top_k, H], and flag: int32 [1], of the requester's.
        """
        top_k, routes = layout.top_k, room * layout.top_k
        head = layout.part(mail, 0, torch.int32, 2)
        ids = layout.part(mail, layout.ids_at, torch.int32, room, top_k)
        weights = layout.part(mail, layout.weights_at, torch.float32, room, top_k)
        tokens = layout.part(mail, layout.tokens_at, layout.token_type, room, layout.hidden)
        scale = layout.part(mail, layout.scales_at, torch.float32, room, layout.groups) if layout.groups else None
        count = len(self.words)
        take_kernel[(count, -(-self.most_words // _PIECE))](
            head, self.sources, self.targets, self.words, count, BLOCK=_PIECE
        )
        w13 = self.tables[0]
        gate_up = rows.new_empty(routes, w13.rows, device=mail.device)
        activated = rows.new_empty(routes, ops.width(w13.rows), device=mail.device)
        assignment = sort(ids, tiles, w13.num_experts)
        products(tokens, self.tables, weights, assignment, ops, tiles, gate_up, activated, rows, scale)
        answer_kernel[(1,)](head, flag)


def _scales(table: WeightTable) -> torch.Tensor:
    assert table.scales is not None
    return table.scales.values


def _bias(table: WeightTable) -> torch.Tensor:
    assert table.bias is not None
    return table.bias
