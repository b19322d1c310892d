"""One GEMM: which rows it writes, tables of small tensors, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.layers import TILES, Layer, quantized, scatter
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.kernels.arguments import Assignment
from vllm_dwdp.kernels.bench.reference import dequantize
from vllm_dwdp.kernels.split_gemm import split_gemm
from vllm_dwdp.kernels.tiles import Tiles
from vllm_dwdp.kernels.torch_ops import assign
from vllm_dwdp.kernels.weight_table import Scales, WeightTable

PERSISTENT = Tiles(16, 32, 32, kernel="persistent")


@pytest.mark.parametrize("tiles", [TILES, PERSISTENT], ids=["pointer", "persistent"])
def test_rows_without_an_expert_are_left_alone(tiles: Tiles) -> None:
    torch.manual_seed(0)
    weights, a = torch.randn(3, 24, 32), torch.randn(10, 32)
    ids = torch.tensor([0, -1, 2, 2, -1, 0, 0, 2, -1, 2])[:, None]
    out = torch.full((10, 24), 7.0)
    views = scatter(weights)
    split_gemm(a, WeightTable.of(views), out, assign(ids, 16, 3), tiles, top_k=1)
    for row, expert in enumerate(ids[:, 0].tolist()):
        expected = torch.full((24,), 7.0) if expert < 0 else weights[expert] @ a[row]
        torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["pointer", "persistent"])
@pytest.mark.parametrize("block_m", [16, 32, 128])
@pytest.mark.parametrize("tokens", [16, 17, 64, 130])
def test_blocks_filled_to_any_height(tokens: int, block_m: int, kernel: str, launched: list[str]) -> None:
    """Full, half-filled and nearly empty blocks; columns that end inside of a tile; and the kernel that was asked for."""
    torch.manual_seed(tokens)
    weights, a = torch.randn(3, 40, 64).half(), torch.randn(tokens, 64).half()
    ids = torch.randint(0, 3, (tokens, 1))
    out = torch.full((tokens, 40), float("nan"), dtype=torch.float16)
    views = scatter(weights)
    tiles = Tiles(block_m, 32, 32, 2, kernel=kernel)  # type: ignore[arg-type]
    split_gemm(a, WeightTable.of(views), out, assign(ids, block_m, 3), tiles, top_k=1)
    expected = torch.stack([weights[expert].float() @ a[row].float() for row, expert in enumerate(ids[:, 0].tolist())])
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=2e-3)
    assert launched == [kernel]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels in the order of their launches."""
    from vllm_dwdp.kernels import persistent
    from vllm_dwdp.kernels import split_gemm as module

    names: list[str] = []

    class Noted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            names.append(self.name)
            return self.kernel[grid]

    monkeypatch.setattr(module, "split_gemm_kernel", Noted("pointer", module.split_gemm_kernel))
    monkeypatch.setattr(persistent, "persistent_kernel", Noted("persistent", persistent.persistent_kernel))
    return names


@pytest.mark.parametrize(
    ("columns", "gap", "spread", "kernel"),
    [(64, 0, 0, "persistent"), (72, 0, 0, "pointer"), (64, 4, 0, "pointer"), (64, 0, 1 << 40, "pointer")],
    ids=["fits", "depth", "rows", "far apart"],
)
def test_the_pointer_kernel_takes_what_no_descriptor_can(
    columns: int, gap: int, spread: int, kernel: str, launched: list[str]
) -> None:
    weights = torch.randn(2, 16, columns).half()
    views = scatter(weights, row_gap=gap)
    table = WeightTable.of(views)
    assert table.origin == min(view.data_ptr() for view in views) and table.unit in (16, 256)
    if spread:
        far = [view.data_ptr() + spread * expert for expert, view in enumerate(views)]
        assert WeightTable.from_addresses(far, (2, 16, columns), torch.float16, "cpu").unit == 0
        table = replace(table, unit=0)
    a, ids = torch.randn(20, columns).half(), torch.arange(20)[:, None] % 2
    out = torch.empty(20, 16, dtype=torch.float16)
    split_gemm(a, table, out, assign(ids, 16, 2), PERSISTENT, top_k=1)
    expected = torch.stack([weights[row % 2].float() @ a[row].float() for row in range(20)])
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=2e-3)
    assert launched == [kernel]


@pytest.mark.parametrize("kernel", ["pointer", "persistent"])
def test_sorted_blocks_of_expert_minus_one_are_zeroed(kernel: str) -> None:
    """Biases as well, in both kernels."""
    views = scatter(torch.ones(8, 16, 32))
    table = WeightTable.of(views, bias=torch.ones(8, 16))
    routes = torch.tensor([0, 2, *[3] * 14, 1, *[3] * 15], dtype=torch.int32)
    blocks = Assignment(routes, torch.tensor([-1, 4], dtype=torch.int32), torch.tensor([32], dtype=torch.int32))
    out = torch.full((3, 16), 7.0)
    split_gemm(torch.ones(3, 32), table, out, blocks, Tiles(16, 32, 32, kernel=kernel), top_k=1)  # type: ignore[arg-type]
    assert out.tolist() == [[0.0] * 16, [33.0] * 16, [0.0] * 16]


def test_a_block_of_expert_minus_one_is_zeroed() -> None:
    out = torch.full((2, 16), 7.0)
    blocks = Assignment(None, torch.tensor([1, -1], dtype=torch.int32), torch.tensor([32], dtype=torch.int32))
    views = scatter(torch.ones(8, 16, 32))
    split_gemm(torch.ones(2, 32), WeightTable.of(views), out, blocks, TILES, top_k=1)
    assert out.tolist() == [[32.0] * 16, [0.0] * 16]


@pytest.mark.parametrize("kernel", ["pointer", "persistent"])
def test_scales_and_biases_of_any_strides(kernel: str) -> None:
    """Scales and biases with gaps between experts and rows, against dense ones: the same bits."""
    torch.manual_seed(1)
    stored, scales = quantized(torch.randn(4, 48, 96), "block", (32, 32))
    bias = torch.randn(4, 48)
    a = (torch.randn(21, 96) * 50).to(torch.float8_e4m3fn)
    a_scale = torch.rand(21, 3)
    blocks = assign(torch.randint(0, 4, (21, 1)), 16, 4)
    views = scatter(stored)
    gaps = Scales("block", torch.full((5, 2, 7), torch.nan)[:4, :, :3], (32, 32))
    gaps.values.copy_(scales.values)
    bias_gaps = torch.full((48, 5), torch.nan)[:, :4].T
    bias_gaps.copy_(bias)
    results = []
    for given, offset in ((scales, bias), (gaps, bias_gaps)):
        out = torch.empty(21, 48)
        table = WeightTable.of(views, scales=given, bias=offset)
        split_gemm(a, table, out, blocks, Tiles(16, 32, 32, kernel=kernel), top_k=1, a_scale=a_scale)  # type: ignore[arg-type]
        results.append(out)
    assert torch.equal(*results)
    assert dequantize(stored, scales).abs().max() > 1


def _with(**changes: Any) -> dict[str, Any]:
    return {"addresses": [256, 512], "shape": (2, 16, 32), "dtype": torch.bfloat16, "device": "cpu"} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addresses": [256, 520]}, "weights: expert 1 is at 0x208, which is no address aligned to 16 bytes"),
        ({"addresses": [0, 256]}, "expert 0 is at 0x0"),
        ({"addresses": [256]}, "1 addresses for 2 experts"),
        ({"row_stride": 31}, "rows 31 elements apart"),
        ({"shape": (2, 0, 32)}, r"experts of shape \(2, 0, 32\)"),
        ({"dtype": torch.int8}, "no split-weight kernel for torch.int8"),
        ({"dtype": torch.float8_e4m3fn}, "FP8 needs them"),
        ({"bias": torch.zeros(3, 16)}, "bias of 3 experts for weights of 2"),
        ({"bias": torch.zeros(2, 15)}, r"bias of shape \(2, 15\) for experts of 16 rows"),
        (
            {"dtype": torch.float8_e4m3fn, "scales": Scales("channel", torch.ones(2, 15))},
            "scales per channel of shape",
        ),
    ],
)
def test_tables_that_cannot_be_right_are_refused(changes: dict[str, Any], message: str) -> None:
    WeightTable.from_addresses(**_with())
    with pytest.raises(DwdpError, match=message) as caught:
        WeightTable.from_addresses(**_with(**changes))
    assert "\n" not in str(caught.value)


def test_addresses_keep_all_64_bits() -> None:
    table = WeightTable.from_addresses(**_with(addresses=[(1 << 64) - 256, 256]))
    assert [address % (1 << 64) for address in table.addresses.tolist()] == [(1 << 64) - 256, 256]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: setattr(layer, "x", layer.x[:, :16]),
        lambda layer: setattr(layer, "x", layer.x.half()),
        lambda layer: setattr(layer, "x", layer.x.T.contiguous().T),
        lambda layer: setattr(layer, "router", layer.router[:3]),
        lambda layer: layer.tables.reverse(),
    ],
    ids=["columns", "dtype", "stride", "router weights", "tables exchanged"],
)
def test_inputs_that_do_not_fit_are_refused(spoil: Any) -> None:
    layer = Layer(experts=3, hidden=32, width=16, tokens=4, top_k=1)
    spoil(layer)
    with pytest.raises(DwdpError) as caught:
        layer.run()
    assert "\n" not in str(caught.value)
