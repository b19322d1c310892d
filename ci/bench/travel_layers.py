"""Layers of travel.py: a model's shape, who holds which experts, and where they lie in the memory of either side.

Every side has all experts of a layer in one slab, w13 of all experts, then w2; the same bytes on both. Scales and biases are
whole on either side, as engines have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_dwdp.kernels.bench.shapes import BLOCK, MODELS, ModelShape, fill
from vllm_dwdp.kernels.mail import MailLayout
from vllm_dwdp.kernels.torch_ops import FP8_MAX
from vllm_dwdp.kernels.weight_table import Scales, WeightTable
from vllm_dwdp.placement import Placement, place

Pair = tuple[WeightTable, WeightTable]

SIDES = 2
_ALIGNED = 256
#: Bytes of weights on a GPU, by default, and layers: so both sides fit in 60 GB with what long steps need.
_WEIGHTS = 54e9
_MOST_LAYERS = 8


class Beside(NamedTuple):
    """Of a matrix, what is no weight: scales of FP8 blocks, biases [E, rows]."""

    scales: Scales | None
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Shape:
    """A model's layer in `dtype`, held by two sides; held: experts of each, None for half of them.

    Raises DwdpError for a number that `place` refuses.
    """

    model: ModelShape
    held: int | None = None
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        assert self.placement.num_ranks == SIDES

    @property
    def placement(self) -> Placement:
        """As `experts_per_rank` places them."""
        return place(self.model.experts, SIDES, self.held)

    @property
    def stored(self) -> torch.dtype:
        """Of weights, and of tokens that travel."""
        return torch.float8_e4m3fn if self.model.quant == "block" else self.dtype

    @property
    def block(self) -> tuple[int, int] | None:
        """Of block scales."""
        return (BLOCK, BLOCK) if self.model.quant == "block" else None

    @property
    def matrices(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of w13 and w2."""
        return (2 * self.model.width, self.model.hidden), (self.model.hidden, self.model.width)

    @property
    def begins(self) -> tuple[int, int, int]:
        """Bytes from the begin of a slab at which w13, w2 and nothing begin."""
        found = [0]
        for rows, cols in self.matrices:
            nbytes = self.model.experts * rows * cols * self.stored.itemsize
            found.append(found[-1] + -(-nbytes // _ALIGNED) * _ALIGNED)
        return found[0], found[1], found[2]

    @property
    def nbytes(self) -> int:
        """Of a slab."""
        return self.begins[2]

    @property
    def layers(self) -> int:
        """As many as are measured by default."""
        return max(1, min(_MOST_LAYERS, int(_WEIGHTS / self.nbytes)))

    def mail(self, room: int) -> MailLayout:
        """Of requests of at most `room` tokens."""
        groups = -(-self.model.hidden // BLOCK) if self.model.quant == "block" else 0
        return MailLayout(room, self.model.top_k, self.model.hidden, groups, self.stored, self.dtype)

    def owners(self, rank: int) -> tuple[int, ...]:
        """Of each expert, the side that computes it for `rank`: itself where it holds the expert."""
        return self.placement.owners[rank]

    def addresses(self, which: int, slabs: Sequence[int], owners: Sequence[int]) -> list[int]:
        """Of each expert's w13 (0) or w2 (1) in its owner's slab; slabs: the address of each side's."""
        rows, cols = self.matrices[which]
        step = rows * cols * self.stored.itemsize
        return [slabs[owner] + self.begins[which] + expert * step for expert, owner in enumerate(owners)]

    def fill(self, slab: torch.Tensor, seed: int) -> list[Beside]:
        """Make a layer's weights in `slab`, uint8 [nbytes]: the same on every device of a kind. What is beside them."""
        torch.manual_seed(seed)
        made = []
        for which, (rows, cols) in enumerate(self.matrices):
            experts, device = self.model.experts, slab.device
            nbytes = experts * rows * cols * self.stored.itemsize
            fill(slab[self.begins[which] :][:nbytes].view(self.stored).view(experts, rows, cols))
            scales = bias = None
            if self.block is not None:
                grid = (experts, -(-rows // BLOCK), -(-cols // BLOCK))
                # As bench/shapes.py has them: products come out near 1.
                scales = Scales(
                    "block", (torch.rand(grid, device=device) + 0.5) * (6 / FP8_MAX * cols**-0.5), self.block
                )
            if self.model.bias:
                bias = torch.randn(experts, rows, device=device).to(self.dtype)
            made.append(Beside(scales, bias))
        return made

    def tables(
        self, slabs: Sequence[int], owners: Sequence[int], beside: Sequence[Beside], device: torch.device
    ) -> Pair:
        """Over the slabs of `owners`, for kernels of `device`."""
        made = []
        for which, (rows, cols) in enumerate(self.matrices):
            shape, where = (self.model.experts, rows, cols), self.addresses(which, slabs, owners)
            scales, bias = beside[which]
            made.append(WeightTable.from_addresses(where, shape, self.stored, device, scales=scales, bias=bias))
        return made[0], made[1]


def shape_of(name: str, held: int | None) -> Shape:
    """By the name of a model; raises ValueError for what cannot be measured."""
    model = next((model for model in MODELS if model.name == name), None)
    if model is None:
        raise ValueError(f"--model {name}: write one of {', '.join(model.name for model in MODELS)}")
    least = -(-model.experts // SIDES)
    if held is not None and not least <= held < model.experts:
        raise ValueError(
            f"--held {held}: each side of {name} holds {least} to {model.experts - 1} of {model.experts} experts"
        )
    return Shape(model, held)
