"""Compiles the kernels without a GPU and says what came out: `python -m vllm_dwdp.kernels.bench.compile_report`.

Prints one row per case and architecture: matrix instructions in the PTX, registers, spilled bytes, shared memory. Fails
where a kernel spills, where a tile with 64 rows does without wgmma on sm_90, and where weights are not loaded 16 bytes at
a time. Arguments are specialised as a launch would (multiples of 16, ones, absent tensors).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import persistent, split_gemm
from ..arguments import Assignment, Launch, prepare
from ..block_order import order
from ..split_gemm import constants_of
from ..tile_math import INTERPRETED, halves
from ..tiles import Tiles
from ..weight_table import Scales, WeightTable
from .shapes import Gemm

META = torch.device("meta")
FP8 = torch.float8_e4m3fn
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Case(Gemm):
    """One to compile."""

    dtype: torch.dtype = torch.bfloat16
    scales: Literal["none", "block", "channel", "tensor"] = "none"
    bias: bool = False


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case. shared: bytes. wide: 16-byte asynchronous copies or TMA loads are in use."""

    name: str
    arch: int
    tiles: str
    wgmma: int
    tcgen05: int
    mma: int
    wide: int
    registers: int
    spilled: int
    shared: int
    problem: str

    @property
    def cells(self) -> list[str]:
        """For the table."""
        return [str(value) for value in asdict(self).values()]


CASES = (
    Case("qwen3-30b w13", 8192, 8, 128, 1536, 2048, Tiles(128, 128, 64, 16, 8, 3)),
    Case("qwen3-30b w13 decode", 16, 8, 128, 1536, 2048, Tiles(16, 64, 128, 1, 4, 4)),
    Case("qwen3-30b w13 one route", 1, 8, 128, 1536, 2048, Tiles(16, 64, 128, 1, 4, 4)),
    Case("deepseek bf16 w13", 8192, 8, 256, 4096, 7168, Tiles(64, 128, 64, 16, 4, 3)),
    Case("gpt-oss w13 + bias", 8192, 4, 128, 5760, 2880, Tiles(128, 128, 64, 1, 8, 3), bias=True),
    Case("fp16 w2", 1024, 1, 8, 4096, 14336, Tiles(64, 128, 64, 8, 4, 3), torch.float16),
    Case("deepseek fp8 block w13", 8192, 8, 256, 4096, 7168, Tiles(64, 128, 128, 32, 4, 3), FP8, "block"),
    Case("deepseek fp8 block decode", 16, 8, 256, 4096, 7168, Tiles(16, 128, 128, 1, 4, 3), FP8, "block"),
    Case("fp8 channel", 1024, 8, 128, 4096, 4096, Tiles(128, 128, 128, 1, 8, 3), FP8, "channel"),
    Case("fp8 tensor", 1024, 8, 128, 4096, 4096, Tiles(64, 128, 128, 1, 4, 3), FP8, "tensor"),
    Case("persistent 128x256", 8192, 8, 256, 4096, 7168, Tiles(128, 256, 64, 8, 8, 3, "persistent")),
    Case("persistent 64x256", 8192, 8, 256, 4096, 7168, Tiles(64, 256, 64, 8, 8, 4, "persistent")),
    Case("persistent fp8 block", 8192, 8, 256, 4096, 7168, Tiles(64, 128, 128, 8, 8, 3, "persistent"), FP8, "block"),
    Case("persistent 128x128", 8192, 1, 256, 7168, 2048, Tiles(128, 128, 64, 8, 8, 4, "persistent")),
    Case("persistent two per SM", 8192, 8, 256, 4096, 7168, Tiles(128, 128, 64, 8, 4, 3, "persistent")),
    Case("persistent four stages", 8192, 8, 256, 4096, 7168, Tiles(128, 256, 64, 8, 8, 4, "persistent")),
    Case(
        "persistent fp8 block 128", 8192, 8, 256, 4096, 7168, Tiles(128, 128, 128, 8, 8, 4, "persistent"), FP8, "block"
    ),
    Case("pointer 128x256 halves", 8192, 8, 256, 4096, 7168, Tiles(128, 256, 64, 8, 8, 4)),
    Case("fp8 block halves", 8192, 8, 256, 4096, 7168, Tiles(128, 128, 128, 8, 8, 4), FP8, "block"),
    Case("spread", 64, 8, 128, 1536, 2048, Tiles(16, 64, 128, 1, 4, 4, spread=16)),
    Case("spread halves", 1024, 8, 128, 1536, 2048, Tiles(128, 128, 64, 1, 8, 4, spread=16)),
    Case("spread fp8 block halves", 1024, 8, 128, 1536, 2048, Tiles(128, 128, 128, 1, 8, 4, spread=16), FP8, "block"),
    Case("spread one route", 4, 8, 128, 1536, 2048, Tiles(16, 64, 128, 1, 4, 4, spread=16)),
    Case("spread fp8 block one route", 4, 8, 128, 1536, 2048, Tiles(16, 128, 128, 1, 4, 4, spread=16), FP8, "block"),
    Case("spread fp8 block", 64, 8, 128, 1536, 2048, Tiles(16, 128, 128, 1, 4, 4, spread=16), FP8, "block"),
    Case("fp8 block odd depth", 1024, 8, 16, 1536, 1472, Tiles(64, 128, 128, 8, 4, 3), FP8, "block"),
)


def _table(case: Case) -> WeightTable:
    scales = None
    if case.scales != "none":
        rows, cols = case.rows, case.cols
        shape = {"block": (-(-rows // 128), -(-cols // 128)), "channel": (rows,), "tensor": ()}[case.scales]
        values = torch.empty(case.experts, *shape, device=META)
        scales = Scales(case.scales, values, (128, 128) if case.scales == "block" else (0, 0))  # type: ignore[arg-type]
    bias = torch.empty(case.experts, case.rows, dtype=torch.bfloat16, device=META) if case.bias else None
    addresses = torch.empty(case.experts, dtype=torch.int64, device=META)
    return WeightTable(addresses, case.rows, case.cols, case.cols, case.dtype, scales, bias)


def launch_of(case: Case) -> tuple[Launch, dict[str, Any], bool]:
    """The launch of a case, on tensors without memory; its constants; and whether each block is a single route."""
    routes, tiles = case.tokens * case.top_k, case.tiles
    a = torch.empty(case.tokens, case.cols, dtype=case.dtype, device=META)
    out = torch.empty(routes, case.rows, dtype=torch.bfloat16 if case.dtype.itemsize == 1 else case.dtype, device=META)
    single = routes * 4 <= case.experts
    slots = None if single else torch.empty(routes + case.experts * (tiles.block_m - 1), dtype=torch.int32, device=META)
    ints = torch.empty(1, dtype=torch.int32, device=META)
    a_scale = None
    if case.scales != "none":
        a_scale = torch.empty(case.tokens, -(-case.cols // 128) if case.scales == "block" else 1, device=META)
        if case.scales == "tensor":
            a_scale = torch.empty(1, device=META)
    router = torch.empty(routes, device=META)
    assignment = Assignment(slots, ints, ints)
    table = _table(case)
    launch = prepare(a, table, out, assignment, tiles, case.top_k, router, a_scale)
    return launch, constants_of(launch, table, tiles, case.top_k, out.dtype), single


def source_of(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """`kernel` specialised for these arguments the way a launch specialises it."""
    signature: dict[str, str] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[index] if index < len(arguments) else constants[name]
        if index >= len(arguments) or value is None or (isinstance(value, int) and value == 1):
            signature[name], fixed[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, fixed, attributes)


def spills(ptx: str, arch: int) -> tuple[int, int]:
    """(registers, spilled bytes) as ptxas counts them."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", ptx)
    try:
        tool = get_ptxas(arch).path
    except TypeError:  # Triton 3.6 picks the tool by the architecture's name alone
        tool = get_ptxas().path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            tool,
            "-v",
            f"--gpu-name={target.group(1) if target else f'sm_{arch}a'}",
            str(path),
            "-o",
            "/dev/null",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", said)]
    spilled = [int(found) for found in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    return max(registers, default=0), sum(spilled)


def compile_case(case: Case, arch: int) -> Row:
    """Compile `case` for sm_`arch` and look at it."""
    launch, constants, single = launch_of(case)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    arguments, halved = launch.arguments, not single and halves(case.tiles)
    if case.tiles.kernel == "persistent":
        kernel: Any = persistent.persistent_kernel
        # The lowest address: 64 bits, a multiple of 16.
        arguments += (1 << 46,)
        constants.update(PROGRAMS=132, UNIT=256, HALVES=halved)
    else:
        kernel = split_gemm.split_gemm_kernel
        flat = case.scales != "none" and case.tiles.block_m < 64 <= case.tiles.block_n
        constants.update(SINGLE=single, SWAP=flat and arch == 90, HALVES=halved)
        constants |= order(case.tokens * case.top_k * single, case.tiles)
    made = triton.compile(source_of(kernel, arguments, constants), GPUTarget("cuda", arch, 32), options)
    ptx: str = made.asm["ptx"]
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in _PATTERNS.items()}
    registers, spilled = spills(ptx, arch)
    problem = ""
    if spilled:
        problem = f"spills {spilled} bytes"
    elif arch == 90 and case.tiles.block_m >= 64 and not counts["wgmma"]:
        problem = "no wgmma"
    elif not counts["wide"]:
        problem = "no wide loads"
    used = case.tiles
    tiles = f"{used.block_m}x{used.block_n}x{constants['BLOCK_K']}/{used.num_warps}w{used.num_stages}s"
    return Row(
        case.name,
        arch,
        tiles,
        **counts,
        registers=registers,
        spilled=spilled,
        shared=made.metadata.shared,
        problem=problem,
    )


_PATTERNS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "wide": r"cp\.async\.c[ag]\.shared\.global[^;]*0x10|cp\.async\.bulk\.tensor",
}


def report(cases: tuple[Case, ...], archs: tuple[int, ...]) -> list[Row]:
    """Compile all and print the table as it grows."""
    heads = [field.upper() for field in Row.__dataclass_fields__]
    widths = [28, 5, 17, 6, 8, 4, 5, 10, 8, 7, 0]
    print(*(head.ljust(width) for head, width in zip(heads, widths, strict=True)))
    rows = []
    for case in cases:
        for arch in archs:
            rows.append(compile_case(case, arch))
            print(*(cell.ljust(width) for cell, width in zip(rows[-1].cells, widths, strict=True)), flush=True)
    return rows


def main() -> int:
    """Command line; returns 1 if a case has a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 100], help="compute capabilities, times ten")
    parser.add_argument("--case", nargs="*", default=[], help="only cases whose names contain one of these")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    if INTERPRETED:
        print("TRITON_INTERPRET is set, so that nothing can be compiled: unset it", file=sys.stderr)
        return 2
    cases = tuple(case for case in CASES if not options.case or any(part in case.name for part in options.case))
    print(f"Triton {triton.__version__}, torch {torch.__version__}")
    rows = report(cases, tuple(options.arch))
    if options.json:
        options.json.write_text(
            json.dumps({"triton": triton.__version__, "rows": [asdict(row) for row in rows]}, indent=1)
        )
    failed = [row for row in rows if row.problem]
    print(f"{len(rows)} compiled, {len(failed)} with a problem")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
