"""What a MoE layer needs beside its GEMMs, in plain torch: for the CPU, for tests, and as a description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from vllm_dwdp.errors import DwdpError

from .arguments import Assignment

#: silu, gelu, gelu_tanh: act(gate) * up, halves side by side. swigluoai: gpt-oss, gate and up interleaved.
ActivationKind = Literal["silu", "gelu", "gelu_tanh", "swigluoai"]

#: none: not quantised. block: a scale per token and group. token, tensor: what they say.
QuantKind = Literal["none", "block", "token", "tensor"]

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Activation:
    """A gated activation [., 2 I] -> [., I].

    Attributes:
        alpha: factor inside the sigmoid (swigluoai).
        limit: clamp of the gate from above and of up to both sides; None for none.
    """

    kind: ActivationKind = "silu"
    alpha: float = 1.702
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.kind == "swigluoai" and self.limit is None:
            raise DwdpError("swigluoai without a limit: gpt-oss clamps at 7.0, so set limit")
        if self.kind.startswith("gelu") and self.limit is not None:
            raise DwdpError(f"{self.kind} with a limit of {self.limit}: only silu and swigluoai are clamped")


class MoeOps(Protocol):
    """What `split_experts` calls between its GEMMs; every tensor lies on the kernels' device."""

    def assign(self, topk_ids: torch.Tensor, block_m: int, num_experts: int) -> Assignment:
        """Sort the routes of int [M, top_k] by expert into blocks of `block_m`; without a synchronisation."""

    def width(self, rows: int) -> int:
        """Columns after the activation of `rows` columns."""

    def activate(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        """[R, rows] -> [R, width(rows)]."""

    def quantize(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[R, K] as the weights' dtype wants it, and its scales; `scale` is a static one."""

    def activate_quantize(
        self, out: torch.Tensor, gate_up: torch.Tensor, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`quantize(activate(...))`; `out` is room for the activation."""

    def reduce(self, partial: torch.Tensor, out: torch.Tensor) -> None:
        """[M, top_k, H] summed over its routes into [M, H]."""


def room_for_routes(num_routes: int, block_m: int, num_experts: int) -> int:
    """Most routes that sorting into blocks can give, padding included; as vLLM allocates."""
    most = num_routes + num_experts * (block_m - 1)
    return min(num_routes * block_m, most) if num_routes < num_experts else most


def are_single(num_routes: int, num_experts: int) -> bool:
    """Whether routes are so few that they are not sorted, and each is a block; as vLLM has it."""
    return num_routes * 4 <= num_experts


def assign(topk_ids: torch.Tensor, block_m: int, num_experts: int) -> Assignment:
    """`sort_routes`, or none of it where there are few."""
    flat = topk_ids.reshape(-1)
    routes = flat.numel()
    if are_single(routes, num_experts):
        padded = torch.full((1,), routes * block_m, dtype=torch.int32, device=flat.device)
        return Assignment(None, flat.to(torch.int32), padded)
    return sort_routes(topk_ids, block_m, num_experts)


def sort_routes(topk_ids: torch.Tensor, block_m: int, num_experts: int) -> Assignment:
    """Sort the routes of int [M, top_k] by expert, each expert's padded to whole blocks; those of no expert are left out."""
    flat = topk_ids.reshape(-1).long()
    routes = flat.numel()
    keys = torch.where(flat < 0, num_experts, flat)
    order = torch.argsort(keys, stable=True)
    counts = torch.bincount(keys, minlength=num_experts + 1)
    blocks = (counts[:num_experts] + block_m - 1) // block_m
    begins = torch.cumsum(blocks, 0) - blocks
    first = torch.cumsum(counts, 0) - counts
    sorted_keys = keys[order]
    rank = torch.arange(routes, device=flat.device) - first[sorted_keys]
    room = room_for_routes(routes, block_m, num_experts)
    # One place more, for all routes that are left out.
    place = torch.cat([begins * block_m, begins.new_tensor([room])])[sorted_keys] + rank
    table = torch.full((room + 1,), routes, dtype=torch.int32, device=flat.device)
    table[place.clamp(max=room)] = order.to(torch.int32)
    ends = torch.cumsum(blocks, 0)
    of_block = torch.searchsorted(ends, torch.arange(-(-room // block_m), device=flat.device), right=True)
    padded = (ends[-1:] * block_m).to(torch.int32)
    return Assignment(table[:room], of_block.clamp(max=num_experts - 1).to(torch.int32), padded)


def activate(activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
    """[R, 2 I] -> [R, I] in the dtype of `gate_up`, computed in float32 or wider and rounded once."""
    wide = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    if activation.kind == "swigluoai":
        gate, up = wide[:, ::2], wide[:, 1::2]
    else:
        gate, up = wide.chunk(2, dim=1)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    if activation.kind == "swigluoai":
        result = gate * torch.sigmoid(gate * activation.alpha) * (up + 1)
    elif activation.kind == "silu":
        result = torch.nn.functional.silu(gate) * up
    else:
        tanh = "tanh" if activation.kind == "gelu_tanh" else "none"
        result = torch.nn.functional.gelu(gate, approximate=tanh) * up
    return result.to(gate_up.dtype)


def quantize_fp8(
    x: torch.Tensor, kind: QuantKind, group: int = 128, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, K] as float8_e4m3fn and float32 scales: [R, ceil(K / group)] (block), [R, 1] (token) or [1] (tensor)."""
    wide = x.float()
    if kind == "block":
        rows, cols = wide.shape
        padded = torch.nn.functional.pad(wide, (0, -cols % group)).view(rows, -1, group)
        found = padded.abs().amax(2).clamp(min=1e-10) / FP8_MAX
        spread = found.repeat_interleave(group, dim=1)[:, :cols]
    elif kind == "token":
        spread = found = wide.abs().amax(1, keepdim=True).clamp(min=1e-10) / FP8_MAX
    else:
        spread = found = wide.abs().amax().clamp(min=1e-10).reshape(1) / FP8_MAX if scale is None else scale.reshape(1)
    return (wide / spread).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), found


@dataclass(frozen=True)
class TorchOps:
    """`MoeOps` in plain torch, on any device.

    Attributes:
        quant: how activations are quantised; none for weights that are not FP8.
        group: columns that share an activation scale, for block.
    """

    activation: Activation
    quant: QuantKind = "none"
    group: int = 128

    def assign(self, topk_ids: torch.Tensor, block_m: int, num_experts: int) -> Assignment:
        """See `MoeOps`."""
        return assign(topk_ids, block_m, num_experts)

    def width(self, rows: int) -> int:
        """See `MoeOps`."""
        return rows // 2

    def activate(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        """See `MoeOps`."""
        out.copy_(activate(self.activation, gate_up))

    def quantize(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `MoeOps`."""
        return (x, None) if self.quant == "none" else quantize_fp8(x, self.quant, self.group, scale)

    def activate_quantize(
        self, out: torch.Tensor, gate_up: torch.Tensor, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `MoeOps`."""
        self.activate(out, gate_up)
        return self.quantize(out, scale)

    def reduce(self, partial: torch.Tensor, out: torch.Tensor) -> None:
        """See `MoeOps`; sums in float32."""
        out.copy_(partial.float().sum(1))
