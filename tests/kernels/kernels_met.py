"""Program for test_kernels_met.py: whether every kernel that a number of tokens launches is one of the warm-up's.

A kernel is what Triton keeps apart: the function, its constants and options, and how it specialises each argument, asked of
Triton itself for arguments without memory, with the shapes that vLLM's own sorting gives. Nothing is compiled. Says what it
looked at in a JSON line; ends with an error where a kernel would be met by a request first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import driver
from vllm import _custom_ops
from vllm.platforms import current_platform

from tests.kernels.launch_twice import Driver
from vllm_dwdp.kernels import configs, direct_tiles, tables, vllm_ops
from vllm_dwdp.kernels.arguments import prepare
from vllm_dwdp.kernels.configs import LayerShape
from vllm_dwdp.kernels.split_gemm import _planned
from vllm_dwdp.kernels.tiles import Tiles
from vllm_dwdp.kernels.weight_table import ScaleKind, Scales, WeightTable
from vllm_dwdp.layers.warm_up import warm_up_sizes

META = torch.device("meta")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8: dict[str, ScaleKind] = {"fp8_block": "block", "fp8": "channel"}
Tiling = Callable[[LayerShape, int], Tiles]
looked: dict[str, int] = {"layers": 0, "launches": 0, "kernels": 0, "sizes": 0}


def table(shape: LayerShape, rows: int, cols: int) -> WeightTable:
    scales = None
    if (kind := FP8.get(shape.dtype)) is not None:
        dense = {"block": (-(-rows // 128), -(-cols // 128)), "channel": (rows,)}[kind]
        values = torch.empty(shape.experts, *dense, device=META)
        scales = Scales(kind, values, (128, 128) if kind == "block" else (0, 0))
    addresses = torch.empty(shape.experts, dtype=torch.int64, device=META)
    dtype = DTYPES.get(shape.dtype, torch.float8_e4m3fn)
    return WeightTable(addresses, rows, cols, cols, dtype, scales, None, 1 << 46, 256)


class Layer:
    """The launches of a layer of `shape`, as `split_experts` makes them, and what the warm-up asks of it."""

    def __init__(self, shape: LayerShape, pulled: Tiling, direct: Tiling) -> None:
        self.shape, self.ways, self.direct = shape, {False: pulled, True: direct}, False
        self.tables = table(shape, shape.rows, shape.hidden), table(shape, shape.hidden, shape.width)
        self.kept: dict[tuple[int, bool], tuple[Tiles, Tiles]] = {}
        module = SimpleNamespace(
            top_k=shape.top_k,
            dwdp_tables=SimpleNamespace(pulled=self.tables),
            dwdp_compute_direct=lambda direct: setattr(self, "direct", direct),
            quant_method=SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=self)),
        )
        self.build = SimpleNamespace(module=module, placement=SimpleNamespace(num_experts=shape.experts))

    def all_tiles(self, tokens: int, top_k: int) -> tuple[Tiles, Tiles]:
        key = tokens, self.direct
        if key not in self.kept:
            tiles = self.ways[self.direct](self.shape, tokens)
            self.kept[key] = tiles, replace(tiles, kernel="pointer")
        return self.kept[key]

    def travels(self, tokens: int) -> bool:
        return False

    def kernels(self, tokens: int, direct: bool) -> list[str]:
        """What Triton would look for, GEMM by GEMM, as a rule and where the rank gives way to others."""
        self.direct = direct
        return [name for tiles in self.all_tiles(tokens, self.shape.top_k) for name in self.kernels_of(tokens, tiles)]

    def kernels_of(self, tokens: int, tiles: Tiles) -> list[str]:
        shape = self.shape
        ids = torch.empty(tokens, shape.top_k, dtype=torch.int32, device=META)
        assignment = vllm_ops.assign(ids, tiles.block_m, shape.experts)
        routes = tokens * shape.top_k
        router = torch.empty(routes, device=META)
        found = []
        for weights, rows, top_k, scaled in (
            (self.tables[0], tokens, shape.top_k, None),
            (self.tables[1], routes, 1, router),
        ):
            a = torch.empty(rows, weights.cols, dtype=weights.dtype, device=META)
            compute = torch.bfloat16 if weights.scales else weights.dtype
            out = torch.empty(routes, weights.rows, dtype=compute, device=META)
            scale = None
            if weights.scales is not None:
                scale = torch.empty(rows, -(-weights.cols // 128) if weights.scales.kind == "block" else 1, device=META)
            laid_out = prepare(a, weights, out, assignment, tiles, top_k, scaled, scale)
            planned = _planned(laid_out, weights, assignment, tiles, top_k, compute)
            binder = planned.function.device_caches[0][-1]
            _, specialised, options = binder(
                *laid_out.arguments, *((1 << 46,) if planned.persistent else ()), **planned.constants
            )
            found.append(f"{planned.function.__name__} {specialised} {options}")
        return found


def look(layers: list[Layer], direct_tokens: int, first: int, last: int) -> None:
    """Raises AssertionError where a request of `first`..`last` tokens would wait for the compiler."""
    sizes = warm_up_sizes(layers, direct_tokens, first, last)  # type: ignore[arg-type]
    assert sizes == sorted(set(sizes)) and all(first <= size <= last for size in sizes)
    for layer in layers:
        known = {kernel for size in sizes for kernel in layer.kernels(size, size <= direct_tokens)}
        met: dict[str, int] = {}
        for tokens in range(first, last + 1):
            for kernel in layer.kernels(tokens, tokens <= direct_tokens):
                met.setdefault(kernel, tokens)
        missed = {tokens: kernel for kernel, tokens in met.items() if kernel not in known}
        assert not missed, f"{layer.shape}, direct {direct_tokens}, {first}..{last}: not compiled {missed}"
        looked["layers"] += 1
        looked["launches"] += 2 * (last + 1 - first)
        looked["kernels"] += len(met)
    looked["sizes"] += len(sizes)


def chosen(chip: tables.Chip | None, block: bool) -> tuple[Tiling, Tiling]:
    """As a layer chooses, pulled and direct: on `chip`, or where there is no table (None)."""
    group = (128, 128) if block else None

    def pulled(shape: LayerShape, tokens: int) -> Tiles:
        configs.chip_of = lambda device: chip or tables.Chip("none")
        return configs.tiles_for(shape, tokens, META, group)

    def direct(shape: LayerShape, tokens: int) -> Tiles:
        direct_tiles.chip_of = lambda device: chip or tables.Chip("none")
        return direct_tiles.direct_tiles_for(shape, tokens, META, group)

    return pulled, direct


def vllms(shape: LayerShape, tokens: int) -> Tiles:
    """vLLM's choice, of its own tables or its defaults."""
    dtype = {"fp32": "float32", "fp8": "fp8_w8a8", "fp8_block": "fp8_w8a8"}.get(shape.dtype)
    block = (128, 128) if shape.dtype == "fp8_block" else None
    return Tiles.from_vllm(vllm_ops.best_config(shape[:4], shape.top_k, dtype, tokens, block))


def shape_of(key: str) -> LayerShape:
    words = dict(word.split("=") for word in key.split(",") if "=" in word)
    numbers = [int(words[name]) for name in ("E", "N", "H", "I")]
    return LayerShape(*numbers, words["dtype"], int(words["top_k"]))  # type: ignore[arg-type]


def shipped(last: int) -> None:
    """Every shape of every shipped table, on its device, where there is no table, and with vLLM's tiles."""
    chips = [tables._parsed(path) for path in sorted(tables.FOLDER.glob("*.json"))]
    shapes = sorted({shape_of(key) for _, found in chips for key in found})
    assert len(shapes) >= 6
    for shape in shapes:
        block = shape.dtype == "fp8_block"
        ways = [chosen(chip, block) for chip in [*(chip for chip, _ in chips), None]]
        ways.append((vllms, ways[-1][1]))
        for number, (pulled, direct) in enumerate(ways):
            look([Layer(shape, pulled, direct)], (0, 40, 512, 3)[number % 4], (1, 1, 257, 1)[number % 4], last)


@st.composite
def odd_layers(draw: st.DrawFn) -> tuple[list[Layer], int, int, int]:
    """Layers of any number of experts, with tiles that change at any number of tokens; some of them direct."""
    last = draw(st.integers(1, 200))
    layers = []
    for _ in range(draw(st.integers(1, 2))):
        experts = draw(st.one_of(st.integers(1, 40), st.sampled_from([60, 96, 128, 192, 256, 384])))
        width = draw(st.integers(1, 6)) * 64
        shape = LayerShape(
            experts, 2 * width, draw(st.integers(1, 5)) * 64, width,
            draw(st.sampled_from(["bf16", "fp32", "fp8", "fp8_block"])), draw(st.integers(1, min(experts, 9))),
        )  # fmt: skip
        some = st.builds(
            Tiles, st.sampled_from([16, 32, 64, 128]), st.sampled_from([32, 64]), st.sampled_from([64, 128]),
            kernel=st.sampled_from(["pointer", "persistent"]),
        )  # fmt: skip
        spread = st.builds(Tiles, st.sampled_from([16, 64]), st.just(64), st.just(64), spread=st.sampled_from([1, 16]))
        two, more, at = draw(some), draw(some), draw(st.integers(1, 200))
        far, near = draw(spread), draw(spread)

        def pulled(shape: LayerShape, tokens: int, two: Tiles = two, more: Tiles = more, at: int = at) -> Tiles:
            return two if tokens < at else more

        def direct(shape: LayerShape, tokens: int, far: Tiles = far, near: Tiles = near, at: int = at) -> Tiles:
            return far if tokens < at // 2 else near

        layers.append(Layer(shape, pulled, direct))
    return layers, draw(st.sampled_from([0, 3, 16, 100, 1000])), draw(st.integers(1, last)), last


@settings(max_examples=60, deadline=None, derandomize=True)
@given(odd_layers())
def odd(drawn: tuple[list[Layer], int, int, int]) -> None:
    look(*drawn)


def main() -> None:
    driver.set_active(Driver())
    _custom_ops.moe_align_block_size = lambda *arguments, **more: None
    type(current_platform).get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H100 80GB HBM3")
    if sys.argv[1] == "odd":
        # Of 384 experts, 80 routes are few enough to be a block each, and no power of two.
        look([Layer(LayerShape(384, 4096, 7168, 2048, "bf16", 8), *chosen(None, False))], 40, 1, 64)
        odd()
    else:
        shipped(int(sys.argv[1]))
    print(json.dumps(looked))


if __name__ == "__main__":
    main()
