"""Made layers for the kernel tests: experts somewhere in memory, their tables, their reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_dwdp.kernels.bench.reference import dequantize, reference_experts
from vllm_dwdp.kernels.split_moe import RouterWeight, split_experts
from vllm_dwdp.kernels.tiles import Tiles
from vllm_dwdp.kernels.torch_ops import FP8_MAX, Activation, QuantKind, TorchOps, quantize_fp8
from vllm_dwdp.kernels.weight_table import ScaleKind, Scales, WeightTable

TILES = Tiles(16, 32, 32)

#: Of the largest result, by dtype. The interpreter cuts bfloat16 instead of rounding it.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def scatter(experts: torch.Tensor, *, row_gap: int = 0) -> list[torch.Tensor]:
    """The rows of [E, N, K] in two slabs, backwards and at odd multiples of 16 bytes, as one [N, K] view per expert."""
    count, rows, cols = experts.shape
    item = experts.element_size()
    stride = cols + row_gap
    step = -(-rows * stride * item // 16) * 16 + 16
    slabs = [torch.full(((count + 1) * step + 64,), 0x7F, dtype=torch.uint8) for _ in range(2)]
    views = []
    for expert in range(count):
        slab = slabs[expert % 2]
        begin = -slab.data_ptr() % 16 + (count - 1 - expert) * step + 16
        part = slab[begin : begin + rows * stride * item].view(experts.dtype).view(rows, stride)[:, :cols]
        part.copy_(experts[expert])
        views.append(part)
    return views


def quantized(weights: torch.Tensor, kind: ScaleKind, group: tuple[int, int]) -> tuple[torch.Tensor, Scales]:
    """FP8 weights [E, N, K] and their dense scales."""
    experts, rows, cols = weights.shape
    if kind == "block":
        shape = (experts, -(-rows // group[0]), -(-cols // group[1]))
    else:
        shape = (experts, rows, 1) if kind == "channel" else (experts, 1, 1)
    values = torch.rand(shape) * 0.02 + 0.005
    spread = values
    if kind == "block":
        spread = values.repeat_interleave(group[0], 1).repeat_interleave(group[1], 2)[:, :rows, :cols]
    stored = (weights / spread).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    kept = {"block": values, "channel": values[:, :, 0], "tensor": values[:, 0, 0]}[kind].contiguous()
    return stored, Scales(kind, kept, group if kind == "block" else (0, 0))


@dataclass
class Layer:
    """A layer of E experts with hidden size H and width I, and a batch for it; `run` and `expected` to be compared."""

    experts: int
    hidden: int
    width: int
    tokens: int
    top_k: int
    dtype: torch.dtype = torch.float32
    activation: Activation = field(default_factory=Activation)
    bias: bool = False
    row_gap: int = 0
    scales: ScaleKind | None = None
    quant: QuantKind = "none"
    group: tuple[int, int] = (32, 32)
    seed: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        w13 = torch.randn(self.experts, 2 * self.width, self.hidden) / self.hidden**0.5
        w2 = torch.randn(self.experts, self.hidden, self.width) / self.width**0.5
        self.x = torch.randn(self.tokens, self.hidden).to(self.dtype)
        self.ids = torch.stack([torch.randperm(self.experts)[: self.top_k] for _ in range(self.tokens)]).to(torch.int32)
        self.router = torch.rand(self.tokens, self.top_k)
        self.biases: list[torch.Tensor | None] = [None, None]
        if self.bias:
            sizes = (2 * self.width, self.hidden)
            self.biases = [torch.randn(self.experts, size).to(self.dtype) for size in sizes]
        self.dense, self.scattered, self.tables = [], [], []
        for weights, bias in zip((w13, w2), self.biases, strict=True):
            scales = None
            if self.scales is None:
                stored = weights.to(self.dtype)
                self.dense.append(stored)
            else:
                stored, scales = quantized(weights, self.scales, self.group)
                self.dense.append(dequantize(stored, scales))
            views = scatter(stored, row_gap=self.row_gap)
            self.scattered.append(views)
            self.tables.append(WeightTable.of(views, scales=scales, bias=bias))

    @property
    def static(self) -> torch.Tensor | None:
        """The static scale of activations, where there is one per tensor."""
        return torch.tensor([0.01]) if self.quant == "tensor" else None

    @property
    def ops(self) -> TorchOps:
        """What goes between the GEMMs."""
        return TorchOps(self.activation, self.quant, self.group[1])

    def run(self, tiles: Tiles = TILES, router_weight: RouterWeight = "output") -> torch.Tensor:
        """The layer by our kernels, [M, H]."""
        w13, w2 = self.tables
        return split_experts(
            self.x, w13, w2, self.router, self.ids, ops=self.ops, tiles=tiles, router_weight=router_weight,
            a1_scale=self.static, a2_scale=self.static,
        )  # fmt: skip

    def expected(self, *, on_input: bool = False) -> torch.Tensor:
        """The layer in float32, [M, H]."""

        def requantize(x: torch.Tensor) -> torch.Tensor:
            if self.quant == "none":
                return x
            stored, scale = quantize_fp8(x.to(self.dtype), self.quant, self.group[1], self.static)
            if self.quant == "block":
                scale = scale.repeat_interleave(self.group[1], 1)[:, : x.shape[1]]
            return stored.float() * scale

        return reference_experts(
            self.x, *self.dense, self.router, self.ids, self.activation, bias13=self.biases[0], bias2=self.biases[1],
            on_input=on_input, rounding=requantize,
        )  # fmt: skip

    def check(self, tiles: Tiles = TILES, router_weight: RouterWeight = "output") -> torch.Tensor:
        """Run, compare within the dtype's tolerance, return the result."""
        found, expected = self.run(tiles, router_weight), self.expected(on_input=router_weight == "input")
        error, largest = (found.float() - expected).abs().max(), expected.abs().max()
        assert largest > 0.01
        # An FP8 value may fall to its other neighbour after a difference in the last bit before.
        tolerance = TOLERANCE[self.dtype] if self.quant == "none" else 0.03
        assert error <= tolerance * largest, f"off by {error:.3g} of {largest:.3g}"
        return found
