"""Program for test_compile_ahead.py: compiles layers ahead, with a compiler that compiles nothing.

Prints a JSON line: how many kernels the layers launch, how many were compiled, by which threads, and how many again; and
where one of them failed in its thread, how many are not there afterwards, and how many are promises still, which the second
launch of a remembered kernel cannot use.
"""

import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import triton
import triton.compiler
from triton.runtime import driver
from vllm import _custom_ops

from tests.kernels.kernels_met import Layer
from tests.kernels.launch_twice import Compiled, Driver
from vllm_dwdp.kernels.compile_ahead import compile_ahead
from vllm_dwdp.kernels.configs import LayerShape
from vllm_dwdp.kernels.experts import SplitExperts
from vllm_dwdp.kernels.persistent import persistent_kernel
from vllm_dwdp.kernels.split_gemm import split_gemm_kernel
from vllm_dwdp.kernels.tiles import Tiles
from vllm_dwdp.kernels.torch_ops import QuantKind

threads: list[str] = []
failing: list[Exception] = []


def compile_nothing(*given: Any, **more: Any) -> Compiled:
    threads.append(threading.current_thread().name)
    time.sleep(0.02)
    if failing:
        raise failing.pop()
    return Compiled()


def kept() -> list[Any]:
    """What Triton keeps of both kernels."""
    functions = split_gemm_kernel, persistent_kernel
    return [
        kernel for function in functions for held, *_ in function.device_caches.values() for kernel in held.values()
    ]


def main() -> None:
    driver.set_active(Driver())
    _custom_ops.moe_align_block_size = lambda *arguments, **more: None
    triton.compiler.compile = compile_nothing

    def pulled(shape: LayerShape, tokens: int) -> Tiles:
        return Tiles(64, 64, 64, kernel="persistent") if tokens > 100 else Tiles(32, 64, 64)

    def direct(shape: LayerShape, tokens: int) -> Tiles:
        return Tiles(16, 64, 64, spread=16)

    kinds: dict[str, QuantKind] = {"bf16": "none", "fp8": "token", "fp8_block": "block"}
    layers = [Layer(LayerShape(60, 256, 128, 128, dtype, 4), pulled, direct) for dtype in kinds]
    sizes = [1, 2, 3, 4, 5, 8, 17, 40, 44, 101, 104]

    def jobs() -> Any:
        for layer in layers:
            for size in sizes:

                def job(layer: Layer = layer, size: int = size) -> None:
                    layer.direct = size <= 8
                    shape = layer.shape
                    experts: Any = SimpleNamespace(
                        quant_kind=kinds[shape.dtype], all_tiles=layer.all_tiles, tables=layer.tables,
                        travels=layer.travels, journey=True,
                    )  # fmt: skip
                    SplitExperts.compile(experts, size, shape.top_k)

                yield job

    count = compile_ahead(jobs())
    launched = {kernel for layer in layers for size in sizes for kernel in layer.kernels(size, size <= 8)}
    told = {"launched": len(launched), "compiled": count, "calls": len(threads), "threads": len(set(threads))}
    told["in_main"] = threads.count(threading.main_thread().name)
    told["again"] = compile_ahead(jobs())
    for function in (split_gemm_kernel, persistent_kernel):
        function.device_caches.clear()
    failing.append(RuntimeError("no room for what is compiled"))
    told["missing"] = told["compiled"] - compile_ahead(jobs())
    told["promises"] = sum(isinstance(kernel, triton.FutureKernel) for kernel in kept())
    print(json.dumps(told))


if __name__ == "__main__":
    main()
