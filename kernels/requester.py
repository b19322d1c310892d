"""The requester's side of tokens that travel: a layer of which owners compute their experts, as calls on a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .mail import MailLayout
from .served import products, sort
from .split_moe import Workspace
from .tile_math import INTERPRETED
from .tiles import Tiles
from .torch_ops import MoeOps
from .travel import BACK_OFF, FIRST_SKIP, MOST_SKIP, STATE_ROWS, ask_kernel, merge_kernel, wait_kernel
from .weight_table import WeightTable


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
            products(hidden, tables, topk_weights, assignment, ops, tiles, gate_up, activated, partial, a1_scale)
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
    """How the tokens of one layer travel. layer: its row in `Layers`. owners: int32 [E], see `Requester.experts`.
    least_tokens: of a batch that travels."""

    requester: Requester
    layer: int
    owners: torch.Tensor
    least_tokens: int = 1

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


def _power(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(number - 1, 0).bit_length()
