"""A mixture-of-experts model as the planner sees it: parameters, FLOP and bytes of every operator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vllm_dwdp.predict.formats import WeightFormat


@dataclass(frozen=True)
class Attention:
    """One kind of attention layer. `window`: tokens a token looks back on (None: all).

    MLA where `kv_rank` is set: `head_dim` = nope + `rope_dim`, `q_rank` None for an uncompressed query. Otherwise MHA
    or GQA. `biases`: parameters outside of matrices (biases, sinks, query and key norms).
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None
    kv_rank: int | None = None
    q_rank: int | None = None
    rope_dim: int = 0
    biases: int = 0

    @property
    def kind(self) -> str:
        """'MLA', 'MHA' or 'GQA'."""
        if self.kv_rank is not None:
            return "MLA"
        return "MHA" if self.kv_heads == self.heads else "GQA"

    def projection_params(self, hidden: int) -> int:
        """Parameters of the query, key, value and output projections."""
        query, values = self.heads * self.head_dim, self.heads * self.v_head_dim
        if self.kv_rank is None:
            return hidden * (query + self.kv_heads * (self.head_dim + self.v_head_dim) + values)
        down = hidden * (self.kv_rank + self.rope_dim)
        up = self.kv_rank * self.heads * (self.head_dim - self.rope_dim + self.v_head_dim)
        q = hidden * query if self.q_rank is None else self.q_rank * (hidden + query)
        return q + down + up + values * hidden

    def kv_elements(self) -> int:
        """Values that the KV cache keeps per token."""
        if self.kv_rank is not None:
            return self.kv_rank + self.rope_dim
        return self.kv_heads * (self.head_dim + self.v_head_dim)

    def core_flop_per_pair(self, absorbed: bool = False) -> int:
        """FLOP of one query token with one key token: scores and values. `absorbed`: MLA in the latent space (decode)."""
        if absorbed and self.kv_rank is not None:
            return 2 * self.heads * (2 * self.kv_rank + self.rope_dim)
        return 2 * self.heads * (self.head_dim + self.v_head_dim)

    def pairs(self, new: Any, context: Any) -> Any:
        """(query, key) pairs of `new` tokens after `context` cached ones, causal; arrays or numbers, broadcast."""
        new, context = np.asarray(new, dtype=float), np.asarray(context, dtype=float)
        everything = new * context + new * new / 2
        if self.window is None:
            return everything
        # Tokens that still see all before them, then tokens that see `window`.
        growing = np.clip(self.window - context, 0, new)
        return growing * context + growing * growing / 2 + (new - growing) * self.window


@dataclass(frozen=True)
class LayerGroup:
    """`count` layers that are alike."""

    attention: Attention
    is_moe: bool
    count: int


@dataclass(frozen=True)
class MoeModel:
    """Sizes in parameters unless said otherwise; `*_params` of one layer (one expert for `expert_params`, with
    `expert_width` values between its two products).

    Formats: of the routed experts, of the attention's projections, of other products; embeddings and router are BF16.
    """

    name: str
    hidden: int
    vocab: int
    tied: bool
    groups: tuple[LayerGroup, ...]
    experts: int
    top_k: int
    expert_params: int
    expert_width: int
    shared_params: int
    dense_params: int
    router_params: int
    expert_format: WeightFormat
    attention_format: WeightFormat
    mlp_format: WeightFormat
    context_limit: int | None = None

    @property
    def layers(self) -> int:
        """All decoder layers."""
        return sum(g.count for g in self.groups)

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts."""
        return sum(g.count for g in self.groups if g.is_moe)

    @property
    def embedding_params(self) -> int:
        """Embedding and head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @cached_property
    def replicated_params(self) -> int:
        """All but routed experts, embedding and head."""
        total = self.hidden
        for g in self.groups:
            mlp = self.router_params + self.shared_params if g.is_moe else self.dense_params
            norms = 2 * self.hidden + g.attention.biases
            total += g.count * (g.attention.projection_params(self.hidden) + norms + mlp)
        return total

    @property
    def total_params(self) -> int:
        """Every parameter of the language model, without drafting (MTP) layers."""
        return self.replicated_params + self.embedding_params + self.moe_layers * self.experts * self.expert_params

    @property
    def active_params(self) -> int:
        """Parameters that one token meets, embedding and head included."""
        return self.replicated_params + self.embedding_params + self.moe_layers * self.top_k * self.expert_params

    @property
    def mtp_params(self) -> int:
        """One drafting layer as DeepSeek-V3 and GLM-4.5 publish it, without its embedding: a MoE layer and a merger."""
        moe = next(g for g in self.groups if g.is_moe)
        layer = moe.attention.projection_params(self.hidden) + self.router_params + self.shared_params
        return layer + self.experts * self.expert_params + 2 * self.hidden * self.hidden

    @property
    def expert_bytes(self) -> float:
        """Bytes of one routed expert of one layer, scales included."""
        return self.expert_params * self.expert_format.bytes

    @cached_property
    def replicated_bytes(self) -> float:
        """Bytes that every rank holds whatever the share: attention, routers, shared experts, dense layers, embeddings."""
        total = (self.embedding_params + self.hidden) * 2.0
        for g in self.groups:
            total += g.count * g.attention.projection_params(self.hidden) * self.attention_format.bytes
            total += g.count * (2 * self.hidden + g.attention.biases) * 2.0
            if g.is_moe:
                total += g.count * (self.router_params * 2.0 + self.shared_params * self.mlp_format.bytes)
            else:
                total += g.count * self.dense_params * self.mlp_format.bytes
        return total

    def kv_bytes(self, context: float, element: float) -> float:
        """Bytes of KV cache of one sequence with `context` tokens, `element` bytes a value."""
        return sum(
            g.count * g.attention.kv_elements() * element * min(context, g.attention.window or context)
            for g in self.groups
        )

    @property
    def attention_kind(self) -> str:
        """Such as 'MLA' or 'GQA, 18 of 36 layers look back 128 tokens'."""
        windowed = sum(g.count for g in self.groups if g.attention.window)
        kind = self.groups[0].attention.kind
        if not windowed:
            return kind
        spans = sorted({g.attention.window for g in self.groups if g.attention.window})
        return f"{kind}, {windowed} of {self.layers} layers look back {spans[0]} tokens"
