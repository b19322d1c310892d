"""Program for test_launching.py: split GEMMs against a driver of Triton that compiles and launches nothing but tells.

Prints a JSON line per launch: whether Triton searched for the kernel, and what it was launched with.
"""

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_dwdp.kernels import launching
from vllm_dwdp.kernels.arguments import Assignment
from vllm_dwdp.kernels.split_gemm import split_gemm
from vllm_dwdp.kernels.tiles import Tiles
from vllm_dwdp.kernels.weight_table import Scales, WeightTable

told: dict[str, Any] = {}


class Driver:
    """What a launch asks of a driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compiled:
    """Of Triton's CompiledKernel, what launches use; each has a number."""

    packed_metadata, function, made = (), 0, 0

    def __init__(self) -> None:
        Compiled.made += 1
        self.number = Compiled.made

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        told.update(kernel=self.number, searched=True, grid=args[:3], arguments=[shown(x) for x in args[9:]])

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def runner(*args: Any) -> None:
            told.update(kernel=self.number, searched=False, grid=grid, arguments=[shown(x) for x in args])

        return runner


def shown(value: Any) -> str:
    return f"{value.dtype} at {value.data_ptr()}" if isinstance(value, torch.Tensor) else repr(value)


def compile_nothing(self: Any, key: Any, signature: Any, device: int, *more: Any) -> Compiled:
    made = self.device_caches[device][0][key] = Compiled()
    return made


def main() -> None:
    driver.set_active(Driver())
    JITFunction._do_compile = compile_nothing  # type: ignore[method-assign]
    launching.watch(lambda name: told.update(compiled=name))
    experts, rows, cols, top_k = 4, 64, 128, 2
    routes, blocks = torch.zeros(256, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    padded = torch.zeros(1, dtype=torch.int32)
    assignment, single = Assignment(routes, blocks, padded), Assignment(None, blocks, padded)
    wider = Assignment(routes.long(), blocks, padded)
    memory = torch.zeros(experts + 1, rows, cols, dtype=torch.bfloat16)
    bias = torch.zeros(experts, rows, dtype=torch.bfloat16)
    plain = WeightTable.of(memory[:experts])
    other = WeightTable.of(memory[1:])
    scales = Scales("tensor", torch.zeros(experts))
    fp8 = WeightTable.of(memory.to(torch.float8_e4m3fn)[:experts], scales=scales)
    tables = {"plain": plain, "other": other, "biased": WeightTable.of(memory[:experts], bias=bias), "fp8": fp8}
    pointer, persistent = Tiles(32, 32, 64), Tiles(32, 32, 64, kernel="persistent")
    spread = Tiles(32, 32, 64, spread=4)
    wide = torch.zeros(64, cols + 8, dtype=torch.bfloat16)
    router = torch.zeros(64 * top_k)
    for words in sys.argv[1:]:
        table, kernel, tokens, *more = words.split(",")
        a = torch.zeros(int(tokens), cols, dtype=torch.bfloat16)
        if "strided" in more:
            a = wide[: int(tokens), :cols]
        if "unaligned" in more:
            a = torch.zeros(int(tokens) * cols + 1, dtype=torch.bfloat16)[1:].view(int(tokens), cols)
        out = torch.zeros(int(tokens) * top_k, rows, dtype=torch.float32 if "float32" in more else torch.bfloat16)
        if table == "fp8":
            a = a.to(torch.float8_e4m3fn)
        told.clear()
        split_gemm(
            a,
            tables[table],
            out,
            single if "single" in more else wider if "long" in more else assignment,
            persistent if kernel == "persistent" else spread if "spread" in more else pointer,
            top_k=top_k,
            router_weights=router if "router" in more else None,
            a_scale=torch.zeros(1, dtype=torch.bfloat16 if "half" in more else torch.float32)
            if table == "fp8"
            else None,
            compute_dtype=torch.bfloat16,
        )
        print(json.dumps({**told, "a": a.data_ptr(), "out": out.data_ptr()}))


if __name__ == "__main__":
    main()
