"""Placements whose shares end on pages of memory, so that peers can map them next to each other (pure)."""

import math
import mmap
from typing import Final

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.placement import Placement, boundary_shift, place

#: vLLM's CPU kernels pad the intermediate size to this (fused_moe/experts/cpu_moe.py `output_alignment`).
CPU_PADDING: Final = 32


def cpu_rows(inner: int, hidden: int, element: int, gated: bool = True) -> tuple[int, int]:
    """Bytes of one expert in w13 and in w2 on CPU, as far as they are known before weights are created."""
    row = -(-inner // CPU_PADDING) * CPU_PADDING * hidden * element
    return row * (2 if gated else 1), row


def page_granularity(row_bytes: int, page: int = mmap.PAGESIZE) -> int:
    """Experts after which a boundary of rows of `row_bytes` falls on a page again."""
    return page // math.gcd(page, row_bytes)


def place_on_pages(num_experts: int, num_ranks: int, held: int | None, rows: tuple[int, ...]) -> Placement:
    """As `place`, with boundaries on pages for tensors of these bytes per expert.

    Raises DwdpError where that moves a boundary by more than one expert, or has a rank hold two more.
    """
    granularity = math.lcm(*map(page_granularity, rows))
    reason = f"that would move a boundary by more than one of {num_experts} experts"
    try:
        if boundary_shift(num_experts, num_ranks, granularity) <= 1:
            placement = place(num_experts, num_ranks, held, granularity)
            if held is None or max(map(len, placement.shares)) <= held + 1:
                return placement
    except DwdpError as error:
        reason = str(error)
    raise DwdpError(
        f"have {' and '.join(map(str, rows))} bytes and end on a page of {mmap.PAGESIZE} only every {granularity} "
        f"experts; {reason}"
    )
