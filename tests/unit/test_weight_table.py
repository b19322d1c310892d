"""Tables of addresses that kernels would read beyond, or load from as if they were aligned, are refused."""

from __future__ import annotations

import pytest
import torch

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.kernels.weight_table import Scales, WeightTable

SHAPE = (2, 4, 8)  # experts, rows, columns


def table(
    addresses: tuple[int, ...] = (4096, 8192), scales: Scales | None = None, bias: torch.Tensor | None = None
) -> WeightTable:
    dtype = torch.bfloat16 if scales is None else torch.float8_e4m3fn
    return WeightTable.from_addresses(addresses, SHAPE, dtype, "cpu", scales=scales, bias=bias)


def test_addresses() -> None:
    high = (1 << 64) - 4096
    made = table((4096, high))
    assert made.addresses.tolist() == [4096, -4096] and (made.origin, made.unit) == (4096, 0)
    assert (table().unit, table((4096, 4096 + 16)).unit) == (256, 16)
    for wrong in (0, -16, 4096 + 8):
        with pytest.raises(DwdpError, match=r"expert 1 is at .*, which is no address aligned to 16 bytes"):
            table((4096, wrong))
    with pytest.raises(DwdpError, match="3 addresses for 2 experts"):
        table((4096, 8192, 12288))


@pytest.mark.parametrize("experts", [1, 3])
def test_scales_and_biases_are_of_as_many_experts(experts: int) -> None:
    bias = torch.zeros(experts, 4)
    with pytest.raises(DwdpError, match=f"bias of {experts} experts for weights of 2"):
        table(bias=bias)
    scales = Scales("tensor", torch.zeros(experts))
    with pytest.raises(DwdpError, match=f"scales of {experts} experts for weights of 2"):
        table(scales=scales)


def test_scales_and_biases_reach_as_far_as_the_rows() -> None:
    assert table(bias=torch.zeros(2, 4)).bias is not None
    with pytest.raises(DwdpError, match=r"bias of shape \(2, 3\)"):
        table(bias=torch.zeros(2, 3))
    with pytest.raises(DwdpError, match="scales per channel"):
        table(scales=Scales("channel", torch.zeros(2, 3)))
