"""Launches every kind of the kernels on tiny odd shapes, checks every value: `python -m vllm_dwdp.kernels.bench.sanitize`.

Made to run under a checker of device memory, where a launch takes seconds:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck  python -m vllm_dwdp.kernels.bench.sanitize
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python -m vllm_dwdp.kernels.bench.sanitize

Each expert's matrix ends where its own allocation ends (with caching off, an allocation of torch's is one of the driver's),
and so do the inputs, so that a read past the end is seen. Outputs are poisoned with NaN and have guards around them, which
must stay. Experts lie in allocations of their own, in no order. Results are compared with float64, on the CPU: beside our
kernels, only copies run on the GPU. Exits 1 on wrong values.
With TRITON_INTERPRET=1 and `--device cpu` the same runs without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from ..arguments import Assignment
from ..split_gemm import split_gemm
from ..tile_math import INTERPRETED
from ..tiles import KernelName, Tiles
from ..torch_ops import FP8_MAX, assign
from ..weight_table import ScaleKind, Scales, WeightTable
from .shapes import Gemm

#: Elements before and after an output that must not change.
GUARD = 512
GROUP = 64
#: Of the largest value: float64 against float32 sums, rounded once to 16 bits.
TOLERANCE = 8e-3


@dataclass(frozen=True)
class Case(Gemm):
    """One to launch."""

    scales: ScaleKind | None = None
    bias: bool = False


def _tiles(kernel: KernelName, block_m: int, block_n: int, block_k: int, warps: int = 4, stages: int = 3) -> Tiles:
    return Tiles(block_m, block_n, block_k, 4, warps, stages, kernel)


CASES = (
    Case("single routes", 1, 2, 16, 72, 136, _tiles("pointer", 16, 64, 64)),
    Case("flat, odd", 5, 3, 5, 72, 104, _tiles("pointer", 16, 32, 64), bias=True),
    Case("tall, odd", 70, 2, 3, 136, 104, _tiles("pointer", 64, 64, 64), bias=True),
    Case("half tiles", 150, 2, 3, 136, 136, _tiles("pointer", 128, 128, 64, 8), bias=True),
    Case("spread", 70, 2, 5, 136, 104, Tiles(16, 64, 64, 4, spread=3), bias=True),
    Case("single routes, joined", 3, 2, 32, 72, 136, Tiles(16, 64, 64, 4, spread=2)),
    Case("fp8 blocks, swapped", 9, 2, 4, 136, 192, _tiles("pointer", 16, 64, 64), "block"),
    Case("fp8 blocks, wide tiles", 70, 2, 3, 136, 192, _tiles("pointer", 64, 128, 64), "block"),
    Case("fp8 channels", 70, 2, 3, 136, 192, _tiles("pointer", 128, 64, 64), "channel"),
    Case("persistent", 90, 2, 3, 136, 128, _tiles("persistent", 64, 64, 64), bias=True),
    Case("persistent, half tiles", 150, 2, 3, 264, 192, _tiles("persistent", 128, 256, 64, 8), bias=True),
    Case("persistent fp8 blocks", 70, 2, 4, 136, 192, _tiles("persistent", 64, 64, 64), "block"),
)


def at_the_end(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device` that ends with its allocation, but for what alignment to 16 bytes takes away."""
    size = values.numel() * values.element_size()
    # torch rounds allocations up to 512 bytes.
    whole = -(-size // 512) * 512
    memory = torch.full((whole,), 0x7F, dtype=torch.uint8)
    begin = (whole - size) // 16 * 16
    memory[begin : begin + size].view(values.dtype).view(values.shape).copy_(values)
    return memory.to(device)[begin : begin + size].view(values.dtype).view(values.shape)


def _scales(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept, spread over [E, rows, cols])."""
    if case.scales == "block":
        kept = torch.rand(case.experts, -(-case.rows // GROUP), -(-case.cols // GROUP)) * 0.02 + 0.01
        return kept, kept.repeat_interleave(GROUP, 1).repeat_interleave(GROUP, 2)[:, : case.rows, : case.cols]
    kept = torch.rand(case.experts, case.rows) * 0.02 + 0.01
    return kept, kept[:, :, None].expand(case.experts, case.rows, case.cols)


def check(case: Case, device: torch.device) -> tuple[float, str]:
    """(largest difference from float64 by the largest value, the kernel that computed).

    Infinite where a guard changed or a result was not written.
    """
    torch.manual_seed(0)
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    shape = (case.experts, case.rows, case.cols)
    weights = torch.randn(shape) * case.cols**-0.5
    a = torch.randn(case.tokens, case.cols)
    scales, a_scale = None, None
    if case.scales is None:
        stored, given = weights.to(dtype), a.to(dtype)
        exact, exact_a = stored.double(), given.double()
    else:
        kept, spread = _scales(case)
        stored = (weights / spread).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        given = (a * 40).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        groups = -(-case.cols // GROUP) if case.scales == "block" else 1
        a_scale = torch.rand(case.tokens, groups) + 0.5
        exact = stored.double() * spread.double()
        wide = a_scale.double().repeat_interleave(GROUP, 1)[:, : case.cols] if case.scales == "block" else a_scale
        exact_a = given.double() * wide
        scales = Scales(case.scales, at_the_end(kept, device), (GROUP, GROUP) if case.scales == "block" else (0, 0))
    bias = torch.randn(case.experts, case.rows).to(dtype) if case.bias else None
    # Made last to first, so that addresses are not in the order of experts.
    experts: Sequence[torch.Tensor] = [at_the_end(matrix, device) for matrix in reversed(list(stored))][::-1]
    table = WeightTable.of(experts, scales=scales, bias=None if bias is None else at_the_end(bias, device))
    ids = torch.stack([torch.randperm(case.experts)[: case.top_k] for _ in range(case.tokens)]).int()
    router = torch.rand(case.tokens, case.top_k)
    routes = case.tokens * case.top_k
    whole = torch.full((2 * GUARD + routes * case.rows,), float("nan"), dtype=dtype).to(device)
    out = whole[GUARD : GUARD + routes * case.rows].view(routes, case.rows)
    blocks = assign(ids, case.tiles.block_m, case.experts)
    placed = Assignment(*(None if part is None else at_the_end(part, device) for part in blocks))  # type: ignore[arg-type]
    split_gemm(
        at_the_end(given, device), table, out, placed, case.tiles, top_k=case.top_k,
        router_weights=at_the_end(router, device), a_scale=None if a_scale is None else at_the_end(a_scale, device),
    )  # fmt: skip
    kernel = case.tiles.kernel if table.unit else "pointer"
    expected = torch.empty(routes, case.rows, dtype=torch.float64)
    for route, expert in enumerate(ids.flatten().tolist()):
        row = exact[expert] @ exact_a[route // case.top_k]
        row = row if bias is None else row + bias[expert].double()
        expected[route] = row * router.flatten()[route].double()
    found = whole.cpu()
    guards = torch.cat([found[:GUARD], found[GUARD + routes * case.rows :]])
    found = found[GUARD : GUARD + routes * case.rows].view(routes, case.rows)
    if not bool(guards.isnan().all()) or not bool(found.isfinite().all()):
        return float("inf"), kernel
    return float((found.double() - expected).abs().max() / expected.abs().max()), kernel


def main() -> int:
    """Command line; returns 1 on wrong values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--case", nargs="*", default=[], help="only cases whose names contain one of these")
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin nothing new after so many seconds")
    options = parser.parse_args()
    device, begun = torch.device(options.device), time.monotonic()
    cases = [case for case in CASES if not options.case or any(part in case.name for part in options.case)]
    print(f"{device}, torch {torch.__version__}, Triton {triton.__version__}")
    wrong = left = 0
    for case in cases:
        if time.monotonic() - begun > options.limit_s:
            left += 1
            continue
        error, kernel = check(case, device)
        wrong += not error < TOLERANCE
        said = "right" if error < TOLERANCE else "WRONG"
        print(
            f"{case.name:<24} {said} ({kernel} kernel, off by {error:.1e}, {time.monotonic() - begun:.0f} s)",
            flush=True,
        )
    print(
        f"{len(cases) - left} cases, {wrong} wrong"
        + (f", {left} left out: {options.limit_s:.0f} s are over" if left else "")
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
