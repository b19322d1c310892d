"""Where the matrices of a layer's experts are: one base address per expert, instead of one [E, N, K] tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from vllm_dwdp.errors import DwdpError

#: Bytes. The kernels promise it to the compiler, which then loads 16 bytes at a time; TMA descriptors need it as well.
ALIGNMENT = 16

#: block: one per group_n x group_k tile; channel: one per row; tensor: one per expert.
ScaleKind = Literal["block", "channel", "tensor"]

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


def _address_tensor(
    what: str, addresses: Sequence[int], alignment: int, num_experts: int, device: torch.device | str
) -> torch.Tensor:
    if len(addresses) != num_experts or not addresses:
        raise DwdpError(f"{what}: {len(addresses)} addresses for {num_experts} experts; give one per expert")
    for expert, address in enumerate(addresses):
        if address <= 0 or address % alignment:
            raise DwdpError(
                f"{what}: expert {expert} is at {address:#x}, which is no address aligned to {alignment} bytes; "
                "align the tensors of slabs and slots"
            )
    # An address is 64 bits; torch's int64 keeps the bits.
    signed = [address - (1 << 64) if address >> 63 else address for address in addresses]
    return torch.tensor(signed, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Scales:
    """Scales of FP8 weights, float32: weight = stored * scale.

    Attributes:
        kind: what a scale covers.
        values: [E, ceil(N/group_n), ceil(K/group_k)] for block, [E, N] or [E, N, 1] for channel, [E] for tensor;
            any strides.
        group: (group_n, group_k) for block, (0, 0) otherwise.
    """

    kind: ScaleKind
    values: torch.Tensor
    group: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float32:
            raise DwdpError(f"scales are {self.values.dtype}; the kernels read float32")
        if (self.kind == "block") != all(size > 0 for size in self.group):
            raise DwdpError(
                f"scales per {self.kind} with groups of {self.group}: only block scales have groups, and all do"
            )


@dataclass(frozen=True)
class WeightTable:
    """One matrix [rows, cols] per expert, anywhere in memory that the device can read.

    The table neither owns nor keeps that memory: whoever made it keeps slabs, slots and mappings for as long as a kernel
    may run. `rows` is N and `cols` K of `x [., K] @ weight.T -> [., N]`.

    Attributes:
        addresses: int64 [E] on the device, each a multiple of 16 bytes.
        row_stride: elements from one row to the next; the elements of a row are adjacent.
        origin: the lowest address.
        unit: bytes, 256 or 16, that divide every address's distance from `origin`; 0 where those distances are more than
            2^31 units, which no descriptor of all experts can address.
        scales: for FP8 weights, None otherwise.
        bias: [E, rows], any strides, or None.
    """

    addresses: torch.Tensor
    rows: int
    cols: int
    row_stride: int
    dtype: torch.dtype
    scales: Scales | None = None
    bias: torch.Tensor | None = None
    origin: int = 0
    unit: int = 0

    @property
    def num_experts(self) -> int:
        """E."""
        return self.addresses.shape[0]

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        """What the kernels are compiled for beside sizes and strides; the same for layers that are alike."""
        scales, bias = self.scales, self.bias
        how = None if scales is None else (scales.kind, scales.group)
        added = None if bias is None else bias.dtype
        return self.addresses.device, self.dtype, how, added, self.unit, self.origin >> 31 > 0

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Elements from one expert, row and column group of the scales to the next; from one expert and row of the bias."""
        scales = () if self.scales is None else self.scales.values.stride()
        bias = (0, 0) if self.bias is None else self.bias.stride()
        return (*scales, 0, 0, 0)[:3] + bias

    @classmethod
    def from_addresses(
        cls,
        addresses: Sequence[int],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        row_stride: int | None = None,
        scales: Scales | None = None,
        bias: torch.Tensor | None = None,
    ) -> WeightTable:
        """From one base address per expert and the shape (E, rows, cols); raises DwdpError for what cannot be right."""
        num_experts, rows, cols = shape
        stride = cols if row_stride is None else row_stride
        if min(shape) < 1 or stride < cols:
            raise DwdpError(f"experts of shape {shape} with rows {stride} elements apart: rows must not overlap")
        if dtype not in WEIGHT_DTYPES:
            raise DwdpError(
                f"no split-weight kernel for {dtype}; there are ones for {', '.join(map(str, WEIGHT_DTYPES))}"
            )
        if (dtype.itemsize == 1) != (scales is not None):
            raise DwdpError(
                f"weights of {dtype} with{'out' if scales is None else ''} scales: FP8 needs them, others have none"
            )
        for what, part in (("scales", scales.values if scales else None), ("bias", bias)):
            if part is not None and part.shape[0] != num_experts:
                raise DwdpError(f"{what} of {part.shape[0]} experts for weights of {num_experts}")
        _check_extents(rows, cols, scales, bias)
        table = _address_tensor("weights", addresses, ALIGNMENT, num_experts, device)
        return cls(table, rows, cols, stride, dtype, scales, bias, min(addresses), _unit(addresses))

    @classmethod
    def of(
        cls, experts: Sequence[torch.Tensor], *, scales: Scales | None = None, bias: torch.Tensor | None = None
    ) -> WeightTable:
        """From one [rows, cols] tensor per expert (which the caller keeps); a [E, rows, cols] tensor is such a sequence."""
        first = experts[0]
        for tensor in experts:
            if tensor.shape != first.shape or tensor.stride() != first.stride() or tensor.stride(1) != 1:
                raise DwdpError(
                    f"experts of shape {tuple(tensor.shape)}, strides {tensor.stride()} beside {tuple(first.shape)}, "
                    f"{first.stride()}: all must agree, with adjacent elements in a row"
                )
        return cls.from_addresses(
            [tensor.data_ptr() for tensor in experts],
            (len(experts), first.shape[0], first.shape[1]),
            first.dtype,
            first.device,
            row_stride=first.stride(0),
            scales=scales,
            bias=bias,
        )


def _unit(addresses: Sequence[int]) -> int:
    origin = min(addresses)
    distances = [address - origin for address in addresses]
    for unit in (256, ALIGNMENT):
        if all(distance % unit == 0 for distance in distances):
            return unit if max(distances) // unit < 1 << 31 and max(addresses) < 1 << 63 else 0
    return 0


def _check_extents(rows: int, cols: int, scales: Scales | None, bias: torch.Tensor | None) -> None:
    """The kernel reads scales and biases unmasked up to rows and cols."""
    if bias is not None and bias.shape[1:] != (rows,):
        raise DwdpError(f"bias of shape {tuple(bias.shape)} for experts of {rows} rows: needs [E, {rows}]")
    if scales is None:
        return
    found = tuple(scales.values.shape[1:])
    if scales.kind == "block":
        wanted: tuple[tuple[int, ...], ...] = ((-(-rows // scales.group[0]), -(-cols // scales.group[1])),)
    elif scales.kind == "channel":
        wanted = ((rows,), (rows, 1))
    else:
        wanted = ((), (1,), (1, 1))
    if found not in wanted:
        raise DwdpError(
            f"scales per {scales.kind} of shape [E, {found}] for experts of {rows} x {cols}: needs {wanted[0]}"
        )
