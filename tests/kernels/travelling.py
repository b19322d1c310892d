"""For test_travel.py: a requester and its owners in one process, without a wait between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from vllm_dwdp.kernels.bench.shapes import BLOCK, TINY_MODELS, Problem
from vllm_dwdp.kernels.configs import layer_shape
from vllm_dwdp.kernels.direct_tiles import direct_tiles_for
from vllm_dwdp.kernels.mail import MailLayout
from vllm_dwdp.kernels.requester import Requester
from vllm_dwdp.kernels.served import Layers
from vllm_dwdp.kernels.split_moe import Workspace, split_experts
from vllm_dwdp.kernels.travel import (
    ENABLED,
    OPEN,
    SENT,
    answer_kernel,
)

CPU = torch.device("cpu")
LAYERS = 2
BUCKETS = (2, 4)
#: The last number before requests' numbers wrap.
LAST = (1 << 31) - 1


@dataclass
class Group:
    """A requester (rank 0) and owners (from 1 on), each of as many experts."""

    model: Any
    others: int = 1

    def __post_init__(self) -> None:
        self.problems = [Problem(self.model, CPU, torch.float16, seed=layer) for layer in range(LAYERS)]
        first = self.problems[0]
        self.tables = [(problem.tables[0], problem.tables[1]) for problem in self.problems]
        experts, top_k, hidden = self.model.experts, self.model.top_k, self.model.hidden
        quantized = self.model.quant == "block"
        groups, stored = (-(-hidden // BLOCK), torch.float8_e4m3fn) if quantized else (0, torch.float16)
        self.layout = MailLayout(max(BUCKETS), top_k, hidden, groups, stored, torch.float16)
        self.ranks = ranks = self.others + 1
        # As in a real mailbox, from the second request on, there is something else of before.
        self.mails = [torch.full((self.layout.mail_bytes,), 0x5A, dtype=torch.uint8) for _ in range(ranks)]
        for mail in self.mails:
            mail[:8] = 0
        self.rows = [torch.full((max(BUCKETS) * top_k, hidden), 7.0, dtype=torch.float16) for _ in range(ranks)]
        self.bells = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
        self.owners = (torch.arange(experts) * ranks // experts).to(torch.int32)

        def at(tensors: list[torch.Tensor]) -> torch.Tensor:
            return torch.tensor([0, *(tensor.data_ptr() for tensor in tensors[1:])], dtype=torch.int64)

        self.state = Requester.new_state(ranks, CPU)
        self.flags = torch.zeros(ranks, dtype=torch.int32)
        self.requester = Requester(
            0, ranks, self.layout, BUCKETS, self.state, self.flags, at(self.mails), at(self.bells), at(self.rows),
            torch.full((len(BUCKETS),), 1000, dtype=torch.int64),
        )  # fmt: skip
        self.served = Layers.of(self.tables)
        self.ops = first.ops()
        self.expected = cache(self._expected)

    def tiles(self, tokens: int) -> Any:
        shape = layer_shape(*self.tables[0], self.model.top_k)
        block = (BLOCK, BLOCK) if self.model.quant == "block" else None
        return direct_tiles_for(shape, BUCKETS[self.requester.bucket(tokens)], CPU, block)

    def serve(self, owner: int = 1) -> bool:
        """The owner's side; False where its bell has not rung."""
        number, bucket = divmod(int(self.bells[owner]), 256)
        if number == int(self.flags[owner]):
            return False
        room = BUCKETS[bucket]
        rows = self.rows[owner][: room * self.model.top_k]
        self.served.serve(
            self.mails[owner], self.layout, room, rows, self.flags[owner:], self.ops, self.tiles(room)
        )  # fmt: skip
        return True

    def _expected(self, tokens: int, layer: int, seed: int) -> torch.Tensor:
        batch = self.problems[layer].batch(tokens, seed)
        return split_experts(
            batch.hidden, *self.tables[layer], batch.weights, batch.ids, ops=self.ops, tiles=self.tiles(tokens)
        )

    def forward(
        self, tokens: int, layer: int = 0, seed: int = 0, between: Callable[[], Any] | None = None, padded: int = 0
    ) -> bool:
        """Whether the result is that of direct reads, bit for bit; `between`: called after asking and before waiting.

        padded: so many tokens at the end are none of a request: vLLM's routes of them are -1.
        """
        batch, tables, tiles = self.problems[layer].batch(tokens, seed), self.tables[layer], self.tiles(tokens)
        like, routes = batch.hidden, tokens * self.model.top_k
        expected, kept = self.expected(tokens, layer, seed), tokens - padded
        batch.ids[kept:] = -1
        room = Workspace.allocate(2 * routes, self.ops.width(tables[0].rows), *tables, like)
        room.gemm.fill_(float("nan"))
        hidden, scale = self.ops.quantize(batch.hidden, None)
        found = self.requester.experts(
            hidden, tables, batch.weights, batch.ids, layer=layer, owners=self.owners, a1_scale=scale,
            ops=Between(self.ops, between or (lambda: None)), tiles=tiles, workspace=room, out=torch.empty_like(like),
        )  # fmt: skip
        # A row of padding counts where a scale is of all tokens.
        return torch.equal(found[:kept], expected[:kept]) and not found[kept:].any()

    def only_ask(self, tokens: int, layer: int = 0) -> None:
        batch = self.problems[layer].batch(tokens, 0)
        index = self.requester.bucket(tokens)
        own = torch.empty(BUCKETS[index], self.model.top_k, dtype=torch.int32)
        self.requester.ask(batch.hidden, batch.weights, batch.ids, own, self.owners, layer, BUCKETS[index], index)

    def only_wait(self, tokens: int) -> torch.Tensor:
        """The routes that nobody computes."""
        ids = self.problems[0].batch(tokens, 0).ids
        late = torch.empty_like(ids)
        self.requester.wait(ids, late, self.owners, self.requester.bucket(tokens))
        return late

    def only_answer(self, owner: int = 1) -> None:
        """Without the work."""
        answer_kernel[(1,)](self.mails[owner].view(torch.int32), self.flags[owner:])

    def of(self, row: Any, owner: int = 1) -> int:
        return int(self.state[row.value, owner])

    def reset(self, number: int = 0) -> None:
        """As after a start, or as after so many requests; owners are asked from the second forward on."""
        self.state.copy_(Requester.new_state(self.ranks, CPU))
        self.state[SENT.value] = number
        self.flags.fill_(number)
        for mail, bell in zip(self.mails, self.bells, strict=True):
            mail[:4] = torch.tensor([number], dtype=torch.int32).view(torch.uint8)
            bell.fill_(number * 256)
        self.state[ENABLED.value, 0] = 1


class Between:
    """Calls something once, while the requester's own experts are computed."""

    def __init__(self, ops: Any, call: Callable[[], None]) -> None:
        self._ops, self._call = ops, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def activate_quantize(self, *args: Any) -> Any:
        call, self._call = self._call, lambda: None
        call()
        return self._ops.activate_quantize(*args)


@cache
def group(model: int = 0, others: int = 1) -> Group:
    return Group(TINY_MODELS[model], others)


def asking(model: int = 0, others: int = 1, number: int = 0) -> Group:
    """All owners are asked in the next forward."""
    made = group(model, others)
    made.reset(number)
    made.only_wait(1)
    assert all(made.of(OPEN, owner) == 1 for owner in range(1, made.ranks))
    return made
