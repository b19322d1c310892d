"""Both GEMMs over split memory against a float32 reference."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.layers import TILES, Layer
from vllm_dwdp.kernels.tiles import Tiles
from vllm_dwdp.kernels.torch_ops import Activation

PERSISTENT = Tiles(16, 32, 32, group_m=4, kernel="persistent")
SWIGLU = Activation("swigluoai", limit=1.0)


@pytest.mark.parametrize("tiles", [TILES, PERSISTENT], ids=["pointer", "persistent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, tiles: Tiles) -> None:
    Layer(experts=5, hidden=64, width=48, tokens=23, top_k=2, dtype=dtype).check(tiles)


@pytest.mark.parametrize("kernel", ["pointer", "persistent"])
@pytest.mark.parametrize(
    ("hidden", "width", "tokens"), [(72, 36, 7), (33, 17, 19), (100, 52, 1), (31, 65, 33), (16, 16, 16)]
)
def test_odd_sizes(hidden: int, width: int, tokens: int, kernel: str) -> None:
    """Neither rows, columns nor depth fill their last tile; where no descriptor can be, the pointer kernel takes over."""
    layer = Layer(experts=3, hidden=hidden, width=width, tokens=tokens, top_k=2, dtype=torch.float16)
    layer.check(TILES if kernel == "pointer" else PERSISTENT)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_top_k(top_k: int) -> None:
    Layer(experts=9, hidden=32, width=16, tokens=11, top_k=top_k).check()


@pytest.mark.parametrize("experts", [2, 8, 61, 256])
@pytest.mark.parametrize("tiles", [TILES, PERSISTENT], ids=["pointer", "persistent"])
def test_numbers_of_experts(experts: int, tiles: Tiles) -> None:
    """With 256 experts and 9 routes blocks are single routes; with 80 they are sorted and most experts have none."""
    for tokens in (3, 40) if experts > 2 else (20,):
        Layer(experts=experts, hidden=32, width=16, tokens=tokens, top_k=min(3, experts)).check(tiles)


@pytest.mark.parametrize(
    "tiles", [TILES, PERSISTENT, Tiles(16, 16, 16, group_m=3)], ids=["pointer", "persistent", "small"]
)
def test_one_expert_gets_every_token(tiles: Tiles) -> None:
    """More row blocks than a group has, and every other expert empty."""
    layer = Layer(experts=7, hidden=32, width=16, tokens=150, top_k=1)
    layer.ids.fill_(4)
    layer.check(tiles)


def test_rows_with_gaps_between_them() -> None:
    """Of the weights (row stride 48 for 32 columns) and of the input."""
    layer = Layer(experts=4, hidden=32, width=32, tokens=18, top_k=2, row_gap=16)
    wide = torch.full((18, 80), float("nan"))
    wide[:, :32] = layer.x
    layer.x = wide[:, :32]
    layer.check()
    layer.check(PERSISTENT)


@pytest.mark.parametrize("tiles", [TILES, PERSISTENT], ids=["pointer", "persistent"])
def test_biases(tiles: Tiles) -> None:
    Layer(experts=4, hidden=40, width=24, tokens=17, top_k=2, dtype=torch.float16, bias=True).check(tiles)


@pytest.mark.parametrize(
    "activation", [SWIGLU, Activation("silu", limit=0.7), Activation("gelu"), Activation("gelu_tanh")]
)
def test_activations(activation: Activation) -> None:
    Layer(experts=4, hidden=32, width=24, tokens=9, top_k=2, activation=activation, bias=True).check()


@pytest.mark.parametrize("tiles", [TILES, PERSISTENT], ids=["pointer", "persistent"])
def test_router_weights_on_the_input(tiles: Tiles) -> None:
    layer = Layer(experts=4, hidden=32, width=24, tokens=9, top_k=1)
    inner = layer.check(tiles, "input")
    outer = layer.check(tiles, "output")
    assert (inner - outer).abs().max() > 0.01


@pytest.mark.parametrize("tiles", [TILES, PERSISTENT, Tiles(16, 64, 32)], ids=["pointer", "persistent", "wide"])
@pytest.mark.parametrize(
    ("scales", "quant"),
    [("block", "block"), ("channel", "token"), ("channel", "tensor"), ("tensor", "token"), ("tensor", "tensor")],
)
def test_fp8(scales: str, quant: str, tiles: Tiles) -> None:
    """Every kind of weight scales with every kind of activation scales that goes with it."""
    layer = Layer(
        experts=4, hidden=96, width=64, tokens=21, top_k=2, dtype=torch.float16, scales=scales, quant=quant,  # type: ignore[arg-type]
    )  # fmt: skip
    layer.check(tiles)


def test_both_kernels_and_any_order_of_tiles_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter multiplies with NumPy, whose float32 sums go by how its operands lie in memory, on some processors.
    multiply = np.matmul

    def order_free(a: Any, b: Any, dtype: Any) -> Any:
        return multiply(a.astype(np.float64), b.astype(np.float64)).astype(dtype)

    monkeypatch.setattr(np, "matmul", order_free)
    layer = Layer(experts=6, hidden=64, width=32, tokens=61, top_k=3, dtype=torch.float16, bias=True)
    plain = layer.run(Tiles(16, 32, 32))
    for tiles in (
        Tiles(16, 32, 32, group_m=5), Tiles(16, 32, 32, 1, kernel="persistent"), PERSISTENT,
        Tiles(32, 32, 32), Tiles(64, 32, 32, 3, kernel="persistent"),
    ):  # fmt: skip
        assert torch.equal(layer.run(tiles), plain)


def test_a_wrong_address_is_noticed() -> None:
    """The comparison would see two experts exchanged."""
    layer = Layer(experts=3, hidden=32, width=16, tokens=12, top_k=1)
    layer.tables[0].addresses[:2] = layer.tables[0].addresses[:2].flip(0)
    with pytest.raises(AssertionError, match="off by"):
        layer.check()


def test_no_tokens() -> None:
    layer = Layer(experts=3, hidden=32, width=16, tokens=4, top_k=1)
    layer.x, layer.ids, layer.router = layer.x[:0], layer.ids[:0], layer.router[:0]
    assert layer.run().shape == (0, 32)
