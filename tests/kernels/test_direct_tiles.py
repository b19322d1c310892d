"""Direct reads: the spread order of row blocks, and tiles that read each weight over the link once."""

import json
import sys
from dataclasses import replace
from math import comb
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.layers import TILES, Layer, scatter
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.kernels import configs, split_gemm, tables
from vllm_dwdp.kernels.bench import compile_report
from vllm_dwdp.kernels.bench.candidates import fits
from vllm_dwdp.kernels.block_order import spread_block
from vllm_dwdp.kernels.direct_tiles import (
    COVERED,
    HEIGHTS,
    SPREAD,
    default_direct,
    direct_key,
    direct_tiles_for,
    height,
    likelihood,
)
from vllm_dwdp.kernels.tiles import Tiles
from vllm_dwdp.kernels.torch_ops import assign
from vllm_dwdp.kernels.weight_table import WeightTable

CPU = torch.device("cpu")
QWEN = configs.LayerShape(128, 1536, 2048, 768, "bf16", 8)
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1, "fp8_block": 1}


@triton.jit
def order_kernel(out_ptr, used_ptr, SPREAD: tl.constexpr):
    block = tl.program_id(0)
    tl.store(out_ptr + block, spread_block(block, tl.load(used_ptr), SPREAD))


def order(used: int, total: int, spread: int) -> list[int]:
    """By the kernels' own function."""
    out = torch.full((total,), -1, dtype=torch.int32)
    order_kernel[(total,)](out, torch.tensor([used], dtype=torch.int32), spread)
    return out.tolist()


def expected_order(used: int, total: int, spread: int) -> list[int]:
    """Runs of blocks as equal as can be, the longer ones first, read side by side; then what is past `used`."""
    sizes = [used // spread + (run < used % spread) for run in range(spread)]
    runs = [list(range(sum(sizes[:run]), sum(sizes[: run + 1]))) for run in range(spread)]
    found = [run[place] for place in range(max(sizes)) for run in runs if place < len(run)]
    return found + list(range(used, total))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 70), st.integers(0, 9), st.integers(2, 40))
def test_the_order_is_a_bijection_over_the_used_blocks(used: int, past: int, spread: int) -> None:
    expected = expected_order(used, used + past, spread)
    assert order(used, used + past, spread) == expected
    assert sorted(expected) == list(range(used + past)) and sorted(expected[:used]) == list(range(used))


@pytest.mark.parametrize("missing", [range(64, 128), range(0, 64), range(112, 128), range(40, 56)])
def test_own_and_missing_experts_are_in_flight_together(missing: range) -> None:
    """With a block per expert, any SPREAD blocks in a row have the share of missing ones that the layer has, within one."""
    found = [block in missing for block in order(128, 128, SPREAD)]
    counts = [sum(found[at : at + SPREAD]) for at in range(128 - SPREAD + 1)]
    share = len(missing) * SPREAD / 128
    assert share - 1 <= min(counts) and max(counts) <= share + 1


@pytest.mark.parametrize(("group_m", "spread"), [(1, 1), (1, 3), (2, 3)])
def test_the_kernel_computes_in_that_order(group_m: int, spread: int) -> None:
    """The first programs alone: whose rows they wrote."""
    experts, rows = 7, 40
    weights, a = torch.randn(experts, rows, 32), torch.randn(16, 32)
    ids = (torch.arange(16) % experts)[:, None]
    views = scatter(weights)
    table, tiles = WeightTable.of(views), Tiles(16, 32, 32, group_m, spread=spread)
    blocks, out = assign(ids, 16, experts), torch.full((16, rows), float("nan"))
    laid_out = split_gemm.prepare(a, table, out, blocks, tiles, 1, None, None)
    planned = split_gemm._planned(laid_out, table, blocks, tiles, 1, torch.float32)
    wanted = expected_order(experts, experts, spread) if spread > 1 else list(range(experts))
    # Two column blocks: four programs are two row blocks, grouped or not.
    planned.function[(4,)](*laid_out.arguments, **planned.constants)
    computed = {int(ids[route, 0]) for route in range(16) if not out[route].isnan().any()}
    assert computed == set(wanted[:2])
    assert planned.constants["SPREAD"] == spread


@pytest.mark.parametrize(
    ("layer", "tiles", "spread"),
    [
        ({"tokens": 37, "bias": True, "row_gap": 8}, TILES, 4),
        ({"tokens": 1, "top_k": 2, "experts": 8}, TILES, 2),
        ({"tokens": 75, "top_k": 2, "experts": 3, "dtype": torch.float16}, Tiles(64, 32, 32, 3), 2),
        ({"tokens": 17, "dtype": torch.bfloat16}, Tiles(16, 32, 16, 4), 16),
        ({"tokens": 11, "scales": "block", "quant": "block", "hidden": 96, "width": 64}, TILES, 3),
        ({"tokens": 40, "experts": 4, "scales": "block", "quant": "block", "hidden": 96, "width": 64}, Tiles(32, 64, 32), 3),
        ({"tokens": 1, "experts": 16, "scales": "block", "quant": "block", "hidden": 96, "width": 64}, TILES, 64),
    ],
    ids=["odd, far rows", "one route a block", "halves", "groups", "fp8 block", "fp8 halves", "fp8 one route"],
)  # fmt: skip
def test_spread_results_have_the_same_bits(layer: dict[str, object], tiles: Tiles, spread: int) -> None:
    made = Layer(**({"experts": 9, "hidden": 72, "width": 20, "top_k": 3} | layer))  # type: ignore[arg-type]
    plain = made.run(tiles)
    assert torch.equal(made.check(replace(tiles, spread=spread)), plain)


@pytest.mark.parametrize("quant", ["none", "block"])
@pytest.mark.parametrize(
    "ids", [[[3, 30], [7, 3], [30, 8]], [[4]] * 7, [[4]] * 19 + [[5]], [[1, 2], [3, 4]]],
    ids=["shared", "one expert", "more than a block", "distinct"],
)  # fmt: skip
def test_single_routes_of_one_expert_share_a_block(ids: list[list[int]], quant: str) -> None:
    """The same bits, and no route but the first of an expert in a block begins a block of its own."""
    more = {"scales": "block", "quant": "block"} if quant == "block" else {}
    tokens, top_k = len(ids), len(ids[0])
    layer = Layer(experts=80, hidden=32, width=32, tokens=tokens, top_k=top_k, bias=True, **more)  # type: ignore[arg-type]
    layer.ids = torch.tensor(ids, dtype=torch.int32)
    plain = layer.run(TILES)
    assert torch.equal(layer.check(replace(TILES, spread=2)), plain)
    # Without the blocks of all later routes, each expert's first sixteen rows are there.
    flat, seen = [expert for row in ids for expert in row], dict[int, int]()
    out = torch.full((len(flat), 64), float("nan"))
    blocks, tiles = assign(layer.ids, 16, 80), replace(TILES, block_n=64, spread=2)
    assert blocks.routes is None
    a = layer.x.repeat_interleave(top_k, 0).to(layer.tables[0].dtype)
    scale = None if quant == "none" else torch.ones(len(flat), 1)
    laid_out = split_gemm.prepare(a, layer.tables[0], out, blocks, tiles, 1, None, scale)
    planned = split_gemm._planned(laid_out, layer.tables[0], blocks, tiles, 1, torch.float32)
    planned.function[(1,)](*laid_out.arguments, **planned.constants)
    for route, expert in enumerate(flat):
        seen[expert] = seen.get(expert, 0) + 1
        assert bool(out[route].isfinite().all()) == (expert == flat[0] and seen[expert] <= 16)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 4), st.integers(1, 40), st.integers(1, 20), st.integers(2, 20),
       st.integers(1, 5))  # fmt: skip
def test_spread_of_any_shape(
    tokens: int, experts: int, top_k: int, hidden: int, width: int, spread: int, group: int
) -> None:
    layer = Layer(experts=experts, hidden=hidden, width=width, tokens=tokens, top_k=min(top_k, experts), row_gap=4)
    tiles = Tiles(16, 16, 16, group)
    assert torch.equal(layer.run(tiles), layer.run(replace(tiles, spread=spread)))


def test_a_spread_that_no_kernel_has_is_refused() -> None:
    for wrong in ({"spread": 0}, {"spread": 2, "kernel": "persistent"}):
        with pytest.raises(DwdpError, match="with a spread of") as caught:
            Tiles(16, 32, 32, **wrong)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert Tiles(**Tiles(16, 32, 32, spread=4).to_json()) == Tiles(16, 32, 32, spread=4)


@given(st.integers(0, 30), st.integers(1, 60), st.integers(1, 12), st.integers(0, 20))
def test_the_likelihood_is_the_binomial_one(rows: int, tokens: int, top_k: int, more: int) -> None:
    experts = top_k + more
    share = top_k / experts
    exact = sum(comb(tokens, n) * share**n * (1 - share) ** (tokens - n) for n in range(min(rows, tokens) + 1))
    assert likelihood(rows, tokens, top_k, experts) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("tokens", [1, 2, 8, 32, 64, 128, 150, 256, 360, 512, 800, 1024])
def test_blocks_cover_the_rows_of_experts(tokens: int) -> None:
    """Counted: of experts hit by random routings, at most some 1 % have more rows than a block."""
    made = torch.Generator().manual_seed(tokens)
    chosen = height(tokens, QWEN.top_k, QWEN.experts)
    over = rounds = 0
    for _ in range(20):
        ids = torch.rand(tokens, QWEN.experts, generator=made).topk(QWEN.top_k, 1).indices
        over += int((torch.bincount(ids.flatten(), minlength=QWEN.experts) > chosen).sum())
        rounds += QWEN.experts
    assert over / rounds <= 2 * (1 - COVERED)
    # And no taller than that needs.
    assert chosen == HEIGHTS[0] or likelihood(chosen // 2, tokens, QWEN.top_k, QWEN.experts) < COVERED


@settings(deadline=None)
@given(st.integers(0, 20000), st.integers(1, 512), st.integers(1, 16), st.sampled_from(sorted(SIZES)))
def test_direct_tiles_are_always_valid(tokens: int, experts: int, top_k: int, dtype: str) -> None:
    shape = configs.LayerShape(experts, 96, 64, 48, dtype, min(top_k, experts))
    block = (128, 64) if dtype == "fp8_block" else None
    tiles = direct_tiles_for(shape, tokens, CPU, block)
    assert fits(tiles, SIZES[dtype]) and tiles.kernel == "pointer" and tiles.spread > 1
    assert tiles.block_m == HEIGHTS[-1] or likelihood(tiles.block_m, tokens, shape.top_k, experts) >= COVERED
    assert block is None or tiles.block_k <= 64


def test_measured_tiles_serve_no_batch_whose_experts_have_more_rows(tmp_path: Path) -> None:
    flat, tall, plain = Tiles(16, 32, 64, spread=8), Tiles(128, 256, 64, 1, 8, spread=8), Tiles(64, 64, 64)
    tables.write(tmp_path / "cpu.json", QWEN.key, {64: (plain, 1.1)})
    tables.write(tmp_path / "cpu.json", direct_key(QWEN), {128: (flat, 1.1), 1024: (tall, 1.2)})
    chosen = {tokens: direct_tiles_for(QWEN, tokens, CPU, folder=tmp_path) for tokens in (64, 128, 180, 512, 2048)}
    assert height(128, 8, 128) == 16 < height(180, 8, 128) == 32
    assert list(chosen.values()) == [flat, flat, default_direct("bf16", 32), tall, tall]
    # Tables of direct reads and of the others do not mix.
    assert configs.tiles_for(QWEN, 64, CPU, folder=tmp_path) == plain
    assert configs.tiles_for(QWEN, 1024, CPU, folder=tmp_path) == configs.default_tiles("bf16", 1024)


def test_default_tiles_are_among_those_that_were_compiled() -> None:
    compiled = [case.tiles for case in compile_report.CASES]
    for dtype, rows in (("bf16", 16), ("bf16", 128), ("fp8_block", 16), ("fp8_block", 128)):
        assert default_direct(dtype, rows) in compiled


def test_the_script_for_gpus_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Search and measurement on a tiny layer; times mean nothing here."""
    from ci.bench import direct as gpu_direct

    command = ["ci/bench/direct.py", "--trial", "--search", "--dtype", "bf16", "--tokens", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu_direct.main() == 0
    said, written = capsys.readouterr().out, json.loads((tmp_path / "direct.json").read_text())
    assert "off by" not in said and said.count("held") == 2
    assert [(row["tokens"], row["held"], row["equal"]) for row in written["rows"]] == [(3, 4, True), (3, 7, True)]
    assert all(row["direct_ratio"] > 0 for row in written["rows"]) and written["rows"][0]["bytes"] > 0
    key, entries = next(iter(tables.read_table(tmp_path / "configs" / "cpu.json").items()))
    assert key.endswith("dtype=fp16,top_k=2,direct") and list(entries) == [4]
