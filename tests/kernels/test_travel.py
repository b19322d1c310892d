"""Two ranks in one process: what travels, what comes back, and what is read directly where nothing does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from vllm_dwdp.kernels.bench.shapes import BLOCK, TINY_MODELS, Problem
from vllm_dwdp.kernels.configs import layer_shape
from vllm_dwdp.kernels.direct_tiles import direct_tiles_for
from vllm_dwdp.kernels.mail import MailLayout
from vllm_dwdp.kernels.requester import Requester
from vllm_dwdp.kernels.served import Layers
from vllm_dwdp.kernels.split_moe import Workspace, split_experts
from vllm_dwdp.kernels.travel import ANSWERED, BACK_OFF, ENABLED, LATE, OPEN, SENT, SKIP

CPU = torch.device("cpu")
LAYERS = 2


@dataclass
class Both:
    """A requester (rank 0) and the owner (rank 1) of the upper half of the experts."""

    model: Any
    buckets: tuple[int, ...] = (4, 8)
    calls: list[Callable[[], None]] = field(default_factory=list)  # between asking and waiting

    def __post_init__(self) -> None:
        self.problems = [Problem(self.model, CPU, torch.float16) for _ in range(LAYERS)]
        first = self.problems[0]
        self.tables = [(problem.tables[0], problem.tables[1]) for problem in self.problems]
        experts, top_k, hidden = self.model.experts, self.model.top_k, self.model.hidden
        quantized = self.model.quant == "block"
        groups, stored = (-(-hidden // BLOCK), torch.float8_e4m3fn) if quantized else (0, torch.float16)
        self.layout = MailLayout(max(self.buckets), top_k, hidden, groups, stored, torch.float16)
        self.mail = torch.zeros(self.layout.mail_bytes, dtype=torch.uint8)
        self.rows = torch.full((max(self.buckets) * top_k, hidden), 7.0, dtype=torch.float16)
        self.bell = torch.zeros(1, dtype=torch.int64)
        self.owners = (torch.arange(experts) >= experts // 2).to(torch.int32)

        def at(tensor: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0, tensor.data_ptr()], dtype=torch.int64)

        self.state = Requester.new_state(2, CPU)
        self.flags = torch.zeros(2, dtype=torch.int32)
        self.requester = Requester(
            0, 2, self.layout, self.buckets, self.state, self.flags, at(self.mail), at(self.bell), at(self.rows),
            torch.full((len(self.buckets),), 1000, dtype=torch.int64),
        )  # fmt: skip
        self.served = Layers.of(self.tables)
        self.ops = first.ops()

    def tiles(self, tokens: int) -> Any:
        shape = layer_shape(*self.tables[0], self.model.top_k)
        block = (BLOCK, BLOCK) if self.model.quant == "block" else None
        return direct_tiles_for(shape, self.buckets[self.requester.bucket(tokens)], CPU, block)

    def serve(self) -> None:
        """The owner's side, if its bell has rung."""
        number, bucket = divmod(int(self.bell), 256)
        if number == int(self.flags[1]):
            return
        room = self.buckets[bucket]
        rows = self.rows[: room * self.model.top_k]
        self.served.serve(self.mail, self.layout, room, rows, self.flags[1:], self.ops, self.tiles(room))

    def forward(self, tokens: int, layer: int = 0, seed: int = 0, between: Callable[[], None] | None = None) -> bool:
        """Whether the result is that of direct reads, bit for bit."""
        batch, tables, tiles = self.problems[layer].batch(tokens, seed), self.tables[layer], self.tiles(tokens)
        like, routes = batch.hidden, tokens * self.model.top_k
        expected = split_experts(batch.hidden, *tables, batch.weights, batch.ids, ops=self.ops, tiles=tiles)
        room = Workspace.allocate(2 * routes, self.ops.width(tables[0].rows), *tables, like)
        room.gemm.fill_(float("nan"))
        hidden, scale = self.ops.quantize(batch.hidden, None)
        found = self.requester.experts(
            hidden, tables, batch.weights, batch.ids, layer=layer, owners=self.owners, a1_scale=scale,
            ops=_Between(self.ops, between or (lambda: None)), tiles=tiles, workspace=room, out=torch.empty_like(like),
        )  # fmt: skip
        return torch.equal(found, expected)

    def of(self, row: Any) -> int:
        return int(self.state[row.value, 1])


class _Between:
    """Calls something once, while the requester's own experts are computed."""

    def __init__(self, ops: Any, call: Callable[[], None]) -> None:
        self._ops, self._call = ops, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def activate_quantize(self, *args: Any) -> Any:
        call, self._call = self._call, lambda: None
        call()
        return self._ops.activate_quantize(*args)


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["plain", "fp8", "bias"])
def both(request: pytest.FixtureRequest) -> Both:
    return Both(TINY_MODELS[request.param])


@pytest.fixture
def asking(both: Both) -> Both:
    """Everything answered, and the owner is asked in the next forward."""
    both.serve()
    both.state[SKIP.value] = 0
    both.state[BACK_OFF.value] = 4
    both.state[ENABLED.value, 0] = 1
    both.forward(1, between=both.serve)
    assert both.of(OPEN) == 1
    return both


@pytest.mark.parametrize(("tokens", "layer"), [(1, 1), (3, 0), (8, 1)])
def test_an_answer_in_time_is_what_direct_reads_give(asking: Both, tokens: int, layer: int) -> None:
    sent, late = asking.of(SENT), asking.of(LATE)
    assert asking.forward(tokens, layer, between=asking.serve)
    assert (asking.of(SENT), asking.of(ANSWERED), asking.of(LATE)) == (sent + 1, 1, late)


def test_rows_of_the_answer_are_used(asking: Both) -> None:
    def wrong() -> None:
        asking.serve()
        asking.rows.fill_(3.0)

    assert not asking.forward(4, between=wrong)


def test_without_an_answer_experts_are_read_directly(asking: Both) -> None:
    late = asking.of(LATE)
    assert asking.forward(5)
    assert (asking.of(ANSWERED), asking.of(LATE), asking.of(OPEN)) == (0, late + 1, 0)


def test_an_owner_that_has_not_answered_is_not_asked_again(asking: Both) -> None:
    asking.forward(4)
    sent, mail = asking.of(SENT), asking.mail.clone()
    for turn in range(6):
        assert asking.forward(3, seed=turn)
    assert asking.of(SENT) == sent and torch.equal(asking.mail, mail)


def test_a_late_answer_changes_nothing_but_who_is_asked(asking: Both) -> None:
    asking.forward(4)
    assert asking.forward(6, seed=1, between=asking.serve)
    assert asking.of(ANSWERED) == 0
    asked = [asking.forward(6, seed=turn, between=asking.serve) and asking.of(ANSWERED) for turn in range(6)]
    assert asked[-1] == 1 and 0 in asked


def test_nobody_is_asked_until_enabled(asking: Both) -> None:
    asking.state[ENABLED.value, 0] = 0
    assert asking.forward(4, between=asking.serve)
    sent = asking.of(SENT)
    assert asking.forward(4, seed=1, between=asking.serve)
    assert asking.of(SENT) == sent and asking.of(OPEN) == 0
