"""A MoE layer of which owners compute their experts for the tokens of others: both sides, as calls on a stream.

Every product is computed with the tiles of direct reads, whoever computes it: so a result does not tell who did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch

from .arguments import Assignment
from .split_gemm import split_gemm
from .split_moe import Workspace
from .tile_math import INTERPRETED
from .tiles import Tiles
from .torch_ops import MoeOps, sort_routes
from .travel import (
    BACK_OFF,
    FIRST_SKIP,
    MOST_SKIP,
    STATE_ROWS,
    answer_kernel,
    ask_kernel,
    merge_kernel,
    take_kernel,
    wait_kernel,
)
from .weight_table import WeightTable

_ALIGNED = 256
_PIECE = 4096  # words a program of `take` copies


class MailLayout(NamedTuple):
    """Offsets in a mailbox, and in the memory of an answer, for batches of at most `room` tokens.

    groups: float32 scales of a token, 0 where tokens are not quantised. token_type: of what travels; row_type: of answers.
    """

    room: int
    top_k: int
    hidden: int
    groups: int
    token_type: torch.dtype
    row_type: torch.dtype

    @property
    def ids_at(self) -> int:
        return _ALIGNED

    @property
    def weights_at(self) -> int:
        return self.ids_at + _aligned(4 * self.room * self.top_k)

    @property
    def scales_at(self) -> int:
        return self.weights_at + _aligned(4 * self.room * self.top_k)

    @property
    def tokens_at(self) -> int:
        return self.scales_at + _aligned(4 * self.room * self.groups)

    @property
    def mail_bytes(self) -> int:
        """Of a mailbox."""
        return self.tokens_at + _aligned(self.room * self.hidden * self.token_type.itemsize)

    @property
    def rows_bytes(self) -> int:
        """Of the rows of an answer."""
        return _aligned(self.room * self.top_k * self.hidden * self.row_type.itemsize)

    def part(self, mail: torch.Tensor, at: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """[shape] of `mail`, uint8 [mail_bytes], from byte `at` on."""
        return mail[at:][: prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class Requester:
    """What a rank's forwards need to ask: its state and where others are; the same for all layers of a shape.

    Attributes:
        rank, ranks: in the group.
        layout: of the mailboxes.
        buckets: tokens of the batches that owners compute, rising.
        state: int32 [STATE_ROWS, ranks], see travel.py.
        flags: int32 [ranks], in memory that owners write.
        mails, bells, answers: int64 [ranks], addresses of the mailboxes in the owners' memory, of their bells, and of the
            rows that they write into this rank's memory.
        limits: int64 [buckets], nanoseconds to wait.
    """

    rank: int
    ranks: int
    layout: MailLayout
    buckets: tuple[int, ...]
    state: torch.Tensor
    flags: torch.Tensor
    mails: torch.Tensor
    bells: torch.Tensor
    answers: torch.Tensor
    limits: torch.Tensor

    @staticmethod
    def new_state(ranks: int, device: torch.device) -> torch.Tensor:
        """Asks nobody, until `ENABLED` is set."""
        state = torch.zeros(STATE_ROWS, max(ranks, 2), dtype=torch.int32, device=device)
        state[BACK_OFF.value] = FIRST_SKIP
        return state

    def bucket(self, tokens: int) -> int:
        """The index of the smallest bucket that holds so many."""
        return next(i for i, room in enumerate(self.buckets) if room >= tokens)

    def experts(
        self, hidden: torch.Tensor, tables: tuple[WeightTable, WeightTable], topk_weights: torch.Tensor,
        topk_ids: torch.Tensor, *, layer: int, owners: torch.Tensor, ops: MoeOps, tiles: Tiles, workspace: Workspace,
        out: torch.Tensor, a1_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The routed experts of a layer; arguments as `split_experts`. owners: int32 [E], who computes an expert.

        `tables` are those of direct reads, `tiles` for the bucket of the batch, `workspace.gemm` has room for a row of
        2 I and one of H per route.
        """
        (tokens, top_k), (w13, w2) = topk_ids.shape, tables
        routes, index, width = tokens * top_k, self.bucket(tokens), ops.width(w13.rows)
        room = self.buckets[index]
        own_ids, late_ids = (topk_ids.new_empty(size, top_k, dtype=torch.int32) for size in (room, tokens))
        self.ask(hidden, topk_weights, topk_ids, own_ids, owners, layer, room, index, a1_scale)
        gate_up = workspace.gemm.flatten()[: routes * w13.rows].view(routes, w13.rows)
        partial = workspace.gemm.flatten()[routes * w13.rows :][: routes * w2.rows].view(routes, w2.rows)
        activated = workspace.activated.flatten()[: routes * width].view(routes, width)
        for ids in (own_ids[:tokens], late_ids):
            if ids is late_ids:
                self.wait(topk_ids, late_ids, owners, index)
            assignment = sort(ids, tiles, w13.num_experts)
            _products(hidden, tables, topk_weights, assignment, ops, tiles, gate_up, activated, partial, a1_scale)
        merge_kernel[(routes,)](
            topk_ids, owners, self.state, self.answers, partial, partial.stride(0),
            ME=self.rank, RANKS=self.ranks, HIDDEN=self.layout.hidden,
            BLOCK_H=self._block_h,
        )  # fmt: skip
        ops.reduce(partial.view(tokens, top_k, w2.rows), out)
        return out

    @property
    def _block_h(self) -> int:
        return min(1024, _power(self.layout.hidden))

    def ask(
        self, hidden: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, own_ids: torch.Tensor,
        owners: torch.Tensor, layer: int, room: int, index: int, a1_scale: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Send a batch to the owners that are asked; own_ids: int32 [room, top_k], filled with what is left to this rank."""
        layout, scales = self.layout, hidden if a1_scale is None else a1_scale
        (tokens, top_k), experts = topk_ids.shape, owners.shape[0]
        ask_kernel[(room,)](
            hidden, scales, topk_ids, topk_weights, owners, own_ids, self.state, self.mails, self.bells,
            tokens, hidden.stride(0), *scales.stride(), room, index, layer,
            E=experts, HIDDEN=layout.hidden, GROUPS=layout.groups, TOP_K=top_k, ME=self.rank, RANKS=self.ranks,
            IDS_AT=layout.ids_at, WEIGHTS_AT=layout.weights_at, SCALES_AT=layout.scales_at, TOKENS_AT=layout.tokens_at,
            BLOCK_K=_power(top_k), BLOCK_G=_power(layout.groups), BLOCK_H=self._block_h, INTERPRETED=INTERPRETED,
        )  # fmt: skip

    def wait(self, topk_ids: torch.Tensor, late_ids: torch.Tensor, owners: torch.Tensor, index: int) -> None:
        """Wait for the owners that were asked; late_ids: int32 [tokens, top_k], filled with what nobody computes."""
        wait_kernel[(1,)](
            topk_ids, owners, late_ids, self.state, self.flags, self.limits, topk_ids.numel(), index,
            E=owners.shape[0], ME=self.rank, RANKS=self.ranks, FIRST=FIRST_SKIP, MOST=MOST_SKIP,
            BLOCK=512, INTERPRETED=INTERPRETED, num_warps=1,
        )  # fmt: skip


@dataclass(frozen=True)
class Journey:
    """How the tokens of one layer travel. layer: its row in `Layers`. owners: int32 [E], see `Requester.experts`."""

    requester: Requester
    layer: int
    owners: torch.Tensor

    @property
    def most_tokens(self) -> int:
        """Of a batch that travels."""
        return self.requester.buckets[-1]

    def room(self, tokens: int) -> int:
        """Tokens of the batch that owners compute."""
        return self.requester.buckets[self.requester.bucket(tokens)]

    def experts(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`Requester.experts` of this layer."""
        return self.requester.experts(*args, layer=self.layer, owners=self.owners, **kwargs)


def _products(
    hidden: torch.Tensor, tables: tuple[WeightTable, WeightTable], topk_weights: torch.Tensor, assignment: Assignment,
    ops: MoeOps, tiles: Tiles, gate_up: torch.Tensor, activated: torch.Tensor, partial: torch.Tensor,
    a1_scale: torch.Tensor | None,
) -> None:  # fmt: skip
    """Rows of `partial` for the assigned routes."""
    w13, w2 = tables
    split_gemm(hidden, w13, gate_up, assignment, tiles, top_k=topk_weights.shape[1], a_scale=a1_scale)
    second, scale = ops.activate_quantize(activated, gate_up, None)
    split_gemm(second, w2, partial, assignment, tiles, top_k=1, a_scale=scale, router_weights=topk_weights)


def _power(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(number - 1, 0).bit_length()


def sort(topk_ids: torch.Tensor, tiles: Tiles, experts: int) -> Assignment:
    """vLLM's sorting, which takes no route to expert E; elsewhere torch's."""
    if not topk_ids.is_cuda:
        return sort_routes(topk_ids, tiles.block_m, experts)
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    return Assignment(*moe_align_block_size(topk_ids, tiles.block_m, experts))


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
        from dataclasses import replace

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
        _products(tokens, self.tables, weights, assignment, ops, tiles, gate_up, activated, rows, scale)
        answer_kernel[(1,)](head, flag)


def _scales(table: WeightTable) -> torch.Tensor:
    assert table.scales is not None
    return table.scales.values


def _bias(table: WeightTable) -> torch.Tensor:
    assert table.bias is not None
    return table.bias
