"""Layers of known models with made weights, for benches and the tuner: dense as vLLM wants them, and scattered."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from ..configs import LayerShape
from ..tiles import Tiles
from ..torch_ops import FP8_MAX, Activation, MoeOps, TorchOps
from ..weight_table import Scales, WeightTable

BLOCK = 128


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more, so that the next problem fits."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Gemm:
    """One GEMM: `tokens` rows with `top_k` routes each, experts of rows x cols."""

    name: str
    tokens: int
    top_k: int
    experts: int
    rows: int
    cols: int
    tiles: Tiles


@dataclass(frozen=True)
class ModelShape:
    """The routed experts of one layer of a model. quant block: FP8 with 128 x 128 scales; none: the model's 16 bits."""

    name: str
    experts: int
    hidden: int
    width: int
    top_k: int
    quant: Literal["none", "block"] = "none"
    activation: Activation = field(default_factory=Activation)
    bias: bool = False

    @property
    def flops_per_token(self) -> float:
        """Of both GEMMs, padding not counted."""
        return 2.0 * self.top_k * 3 * self.width * self.hidden

    def key(self, dtype: torch.dtype) -> str:
        """Name in a table of tiles, with weights of `dtype` where they are not quantised."""
        name = "fp8_block" if self.quant == "block" else {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        return LayerShape(self.experts, 2 * self.width, self.hidden, self.width, name, self.top_k).key


MODELS = (
    ModelShape("Qwen3-30B-A3B", 128, 2048, 768, 8),
    ModelShape("Qwen3-235B-A22B", 128, 4096, 1536, 8),
    ModelShape("DeepSeek-V3", 256, 7168, 2048, 8, "block"),
    ModelShape("gpt-oss-120b", 128, 2880, 2880, 4, activation=Activation("swigluoai", limit=7.0), bias=True),
    ModelShape("Mixtral-8x7B", 8, 4096, 14336, 2),
    # No model: DeepSeek-V3's layer in 16 bits, for the share of the card's matrix rate.
    ModelShape("E256-bf16", 256, 7168, 2048, 8),
)

#: For machines without a GPU: every kind of layer, as small as tiles allow.
TINY_MODELS = (
    ModelShape("tiny", 8, 64, 32, 2),
    ModelShape("tiny-fp8", 4, 144, 64, 2, "block"),
    ModelShape("tiny-oss", 4, 48, 48, 2, activation=Activation("swigluoai", limit=7.0), bias=True),
)


class Batch(NamedTuple):
    """hidden [M, H], router weights float32 [M, top_k] and ids int32 [M, top_k], every expert equally likely."""

    hidden: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


class Dequantized(Sequence[torch.Tensor]):
    """Matrix by matrix in a wide dtype, so that a whole layer never is."""

    def __init__(self, stored: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        self._stored, self._scales, self._dtype = stored, scales, dtype

    def __len__(self) -> int:
        return self._stored.shape[0]

    def __getitem__(self, expert: int) -> torch.Tensor:  # type: ignore[override]
        # float32 holds every FP8 value, and torch has that cast on every device.
        wide = self._stored[expert].float().to(self._dtype)
        if self._scales is not None:
            spread = self._scales[expert].to(self._dtype).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            wide *= spread[: wide.shape[0], : wide.shape[1]]
        return wide


def fill(weights: torch.Tensor) -> None:
    """Make weights in [E, rows, cols] of 16 bits or FP8, matrix by matrix."""
    for matrix in weights:
        if weights.dtype.itemsize > 1:
            matrix.normal_(0.0, weights.shape[2] ** -0.5)
        else:
            made = torch.randn(*matrix.shape, device=matrix.device) * (FP8_MAX / 6)
            matrix.copy_(made.clamp(-FP8_MAX, FP8_MAX))


def scattered(dense: torch.Tensor, seed: int = 0) -> Iterator[torch.Tensor]:
    """Copies of the experts of [E, N, K] in two allocations, in a shuffled order, 256-byte aligned; in order of experts."""
    count, rows, cols = dense.shape
    step = -(-rows * cols * dense.element_size() // 256) * 256
    slabs = [torch.empty(-(-count // 2) * step, dtype=torch.uint8, device=dense.device) for _ in range(2)]
    for expert, place in enumerate(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()):
        part = slabs[place % 2][place // 2 * step :][: rows * cols * dense.element_size()]
        view = part.view(dense.dtype).view(rows, cols)
        view.copy_(dense[expert])
        yield view


def layer_ops(model: ModelShape, device: torch.device) -> MoeOps:
    """vLLM's on a GPU, plain torch elsewhere."""
    if device.type != "cuda":
        return TorchOps(model.activation, model.quant, BLOCK)
    from ..vllm_ops import VllmOps

    return VllmOps(model.activation, model.quant, BLOCK)


class Problem:
    """A layer's weights, twice: `dense` (w13, w2) for vLLM and `tables` over scattered copies for us."""

    def __init__(
        self, model: ModelShape, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        self.model, self.device, self.dtype = model, device, dtype
        stored = torch.float8_e4m3fn if model.quant == "block" else dtype
        shapes = ((2 * model.width, model.hidden), (model.hidden, model.width))
        self.dense: list[torch.Tensor] = []
        self.scales: list[torch.Tensor | None] = []
        self.biases: list[torch.Tensor | None] = []
        self.tables: list[WeightTable] = []
        self.contiguous: list[WeightTable] = []
        self._kept: list[list[torch.Tensor]] = []
        for rows, cols in shapes:
            dense = torch.empty(model.experts, rows, cols, dtype=stored, device=device)
            fill(dense)
            scales = bias = None
            if model.quant == "block":
                grid = (model.experts, -(-rows // BLOCK), -(-cols // BLOCK))
                scales = (torch.rand(grid, device=device) + 0.5) * (6 / FP8_MAX * cols**-0.5)
            if model.bias:
                bias = torch.randn(model.experts, rows, device=device).to(dtype)
            copies = list(scattered(dense, seed))
            given = Scales("block", scales, (BLOCK, BLOCK)) if scales is not None else None
            self.dense.append(dense)
            self.scales.append(scales)
            self.biases.append(bias)
            self.tables.append(WeightTable.of(copies, scales=given, bias=bias))
            self.contiguous.append(WeightTable.of(list(dense), scales=given, bias=bias))
            self._kept.append(copies)

    def batch(self, tokens: int, seed: int) -> Batch:
        """`tokens` tokens with distinct experts each."""
        made = torch.Generator(self.device).manual_seed(seed)
        hidden = torch.randn(tokens, self.model.hidden, generator=made, device=self.device).to(self.dtype)
        logits = torch.rand(tokens, self.model.experts, generator=made, device=self.device)
        weights, ids = torch.softmax(logits, 1).topk(self.model.top_k, 1)
        return Batch(hidden, weights / weights.sum(1, keepdim=True), ids.to(torch.int32))

    def wide(self, dtype: torch.dtype = torch.float32) -> tuple[Dequantized, Dequantized]:
        """w13 and w2 for a reference."""
        w13, w2 = (Dequantized(*pair, dtype) for pair in zip(self.dense, self.scales, strict=True))
        return w13, w2

    def ops(self) -> MoeOps:
        """See `layer_ops`."""
        return layer_ops(self.model, self.device)
