"""What lies around the kernels: sorting, tables of tiles, the tuner, the statistics of the bench."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.kernels import configs, tables
from vllm_dwdp.kernels.bench import candidates, sanitize, tune
from vllm_dwdp.kernels.bench import compare as bench
from vllm_dwdp.kernels.bench.timing import Pairs, lower_bound
from vllm_dwdp.kernels.tiles import Tiles
from vllm_dwdp.kernels.torch_ops import Activation, activate, assign, quantize_fp8, room_for_routes

CPU = torch.device("cpu")
SHAPE = configs.LayerShape(128, 1536, 2048, 768, "bf16", 8)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 9).flatmap(
        lambda experts: st.tuples(st.just(experts), st.lists(st.integers(-1, experts - 1), min_size=1, max_size=60))
    ),
    st.sampled_from([1, 4, 16]),
)
def test_every_route_is_in_one_block_of_its_expert(drawn: tuple[int, list[int]], block: int) -> None:
    experts, ids = drawn
    blocks = assign(torch.tensor(ids)[:, None], block, experts)
    used = int(blocks.padded)
    if blocks.routes is None:
        assert len(ids) * 4 <= experts and blocks.experts.tolist() == ids and used == len(ids) * block
        return
    assert blocks.routes.shape == (room_for_routes(len(ids), block, experts),) and used % block == 0
    seen = []
    for begin in range(0, used, block):
        routes = [route for route in blocks.routes[begin : begin + block].tolist() if route < len(ids)]
        expert = int(blocks.experts[begin // block])
        # No block is empty, and all of its routes want the block's expert.
        assert routes and {ids[route] for route in routes} == {expert}
        seen += routes
    assert sorted(seen) == [route for route, expert in enumerate(ids) if expert >= 0]
    order = blocks.experts[: used // block].tolist()
    assert order == sorted(order)


@pytest.mark.parametrize("kind", ["block", "token", "tensor"])
def test_quantised_values_times_scales_are_the_values(kind: str) -> None:
    x = torch.randn(7, 70) * 10
    stored, scale = quantize_fp8(x, kind, 32)  # type: ignore[arg-type]
    assert stored.shape == x.shape
    assert scale.shape == {"block": (7, 3), "token": (7, 1), "tensor": (1,)}[kind]
    spread = scale.repeat_interleave(32, 1)[:, :70] if kind == "block" else scale
    # Three bits of mantissa; the smallest values lose more.
    assert ((stored.float() * spread - x).abs() <= x.abs() / 15 + spread * 2**-9).all()


def test_the_clamped_activation_is_that_of_gpt_oss() -> None:
    x = torch.tensor([[9.0, -9.0, -2.0, 0.5]])
    gate, up = torch.tensor([7.0, -2.0]), torch.tensor([-7.0, 0.5])
    expected = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    torch.testing.assert_close(activate(Activation("swigluoai", limit=7.0), x)[0], expected)
    with pytest.raises(DwdpError, match="set limit"):
        Activation("swigluoai")


def test_the_nearest_measured_batch_decides(tmp_path: Path) -> None:
    small, large = Tiles(16, 64, 64), Tiles(128, 128, 64, 16, 8, 3, "persistent")
    tune.write(tmp_path / "cpu.json", SHAPE.key, {1: (small, 1.2), 1024: (large, 1.05)})
    tune.write(tmp_path / "cpu.json", SHAPE._replace(experts=8).key, {1: (large, 1.5)})
    chosen = {tokens: configs.tiles_for(SHAPE, tokens, CPU, folder=tmp_path) for tokens in (1, 2, 3, 511, 512, 9999)}
    between = configs.default_tiles("bf16", 3), configs.default_tiles("bf16", 511)
    assert list(chosen.values()) == [small, small, *between, large, large]
    assert configs.tiles_for(SHAPE._replace(top_k=4), 1, CPU, folder=tmp_path) == configs.default_tiles("bf16", 1)
    assert configs.tiles_for(SHAPE, 1, CPU, folder=tmp_path, own=False) == configs.default_tiles("bf16", 1)


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text(json.dumps({"shapes": {SHAPE.key: {"1": {"tiles": {"block": 3}}}}}))
    with pytest.raises(
        DwdpError, match=r"cpu\.json is no table of tiles .*: write it with vllm_dwdp\.kernels\.bench\.tune"
    ):
        configs.tiles_for(SHAPE, 1, CPU, folder=tmp_path)


def test_shipped_tables_can_be_read() -> None:
    for path in tables.FOLDER.glob("*.json"):
        assert tables.read_table(path)


def test_vllms_names_and_ours() -> None:
    config = {
        "BLOCK_SIZE_M": 64,
        "BLOCK_SIZE_N": 128,
        "BLOCK_SIZE_K": 64,
        "GROUP_SIZE_M": 8,
        "num_warps": 8,
        "num_stages": 4,
    }
    assert Tiles.from_vllm(config) == Tiles(64, 128, 64, 8, 8, 4)
    assert Tiles.from_vllm(config).to_vllm() == config | {"SPLIT_K": 1}
    with pytest.raises(DwdpError, match="with waves_per_eu: not known"):
        Tiles.from_vllm(config | {"waves_per_eu": 2})
    with pytest.raises(DwdpError, match="block_n is 48"):
        Tiles(16, 48, 32)


def test_the_tuner_finds_the_best_of_a_made_landscape() -> None:
    """Speed is a product of one factor per thing, so that coordinate descent must reach the top."""
    best = {"block_m": 64, "block_n": 128, "num_stages": 4, "kernel": "persistent"}

    def speed(tiles: Tiles) -> float:
        return 1.1 ** sum(getattr(tiles, name) == value for name, value in best.items())

    asked = []

    def compare(candidate: Tiles, current: Tiles) -> float | None:
        asked.append(candidate)
        return None if candidate.block_k == 256 else speed(candidate) / speed(current)

    found, gain = tune.search(Tiles(16, 32, 64), 2, compare)
    assert {name: getattr(found, name) for name in best} == best
    assert gain == pytest.approx(1.1**4)
    assert len(asked) == len(set(asked)) < 80
    assert all(candidates.fits(tiles, 2) for tiles in asked)


def test_the_tuner_writes_each_row_and_goes_on_where_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On tiny layers; times mean nothing here, wrong results do, so that only the results are computed."""
    monkeypatch.setattr(
        tune, "listed", lambda routes, block: [Tiles(16, 32, 32), Tiles(32, 32, 32, kernel="persistent")]
    )
    monkeypatch.setattr(tune, "neighbours", lambda *_: iter([Tiles(16, 16, 32)]))
    monkeypatch.setattr(tune, "captured", lambda calls, _: list(calls))
    monkeypatch.setattr(tune, "seconds", lambda *_: 1e-3)
    monkeypatch.setattr(tune, "in_turns", lambda *_: Pairs([1.0], [1.0]))
    command = ["tune", "--tiny", "--device", "cpu", "--folder", str(tmp_path), "--tokens", "3", "--limit-s", "60"]
    monkeypatch.setattr(sys, "argv", [*command, "--model", "tiny-oss"])
    assert tune.main() == 0
    assert len(tune.read(tmp_path / "cpu.json")["shapes"]) == 1
    monkeypatch.setattr(sys, "argv", [*command, "--model", "tiny-oss", "tiny-fp8"])
    assert tune.main() == 0
    said = capsys.readouterr().out
    assert said.count("tiny-oss") == 1 and said.count("tiny-fp8") == 1 and "off by" not in said
    assert [list(entries) for entries in tune.read(tmp_path / "cpu.json")["shapes"].values()] == [["3"], ["3"]]
    tables.read_table(tmp_path / "cpu.json")


def test_a_row_that_nothing_was_compared_for_is_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would hide what is known of devices like this one."""
    monkeypatch.setattr(tune, "listed", lambda routes, block: [Tiles(16, 32, 32)])
    monkeypatch.setattr(tune.Trials, "compare", lambda self, candidate, best: None)  # as where time is over
    path = tmp_path / "cpu.json"
    tune.tune(tune.TINY_MODELS[:1], [3], CPU, path)
    assert tune.read(path)["shapes"] == {}


def test_the_tuner_takes_no_tiles_whose_results_are_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, wrong = tune.own_experts, Tiles(16, 16, 16)

    def spoiled(problem: object, batch: object, tiles: Tiles, **given: object) -> torch.Tensor:
        return real(problem, batch, tiles, **given) * (1.5 if tiles == wrong else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(tune, "own_experts", spoiled)
    problem = tune.Problem(tune.TINY_MODELS[0], CPU, torch.float16)
    start = configs.default_tiles("fp16", 3)
    trials = tune.Trials(problem, 3, start, float("inf"))
    assert trials.compare(wrong, start) is None
    assert trials.compare(Tiles(16, 32, 32), start) is not None


def test_the_bound_lies_below_the_mean_and_narrows() -> None:
    few, many = [[0.9, 1.0, 1.1]] * 2, [[0.99, 1.0, 1.01] * 20] * 2
    assert lower_bound(few)[0] == lower_bound(many)[0] == pytest.approx(1.0)
    assert 0.9 <= lower_bound(few)[1] < lower_bound(many)[1] <= 1.0
    assert lower_bound([[2.0] * 3, [0.5] * 3]) == pytest.approx((1.0, 1.0))


def test_the_bench_runs_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    arguments = [
        "bench",
        "--tiny",
        "--device",
        "cpu",
        "--model",
        "tiny-fp8",
        "tiny-oss",
        "--tokens",
        "3",
        "--json",
        str(path),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench.main() == 0
    written = json.loads(path.read_text())
    assert [(cell["model"], cell["bitwise"]) for cell in written["cells"]] == [("tiny-fp8", True), ("tiny-oss", True)]
    assert all(cell["error"] < 1e-2 and cell["ratio"] > 0 for cell in written["cells"])
    assert written["summary"][0]["tokens"] == 3
    said = capsys.readouterr().out
    assert "tiny-oss" in said and "lower 95 % bound" in said


def test_the_bench_notices_wrong_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.own_experts

    def wrong(problem: object, batch: object, tiles: object, scattered: bool = True, **given: object) -> torch.Tensor:
        found = real(problem, batch, tiles, scattered, **given)  # type: ignore[arg-type]
        return found * 1.5 if scattered else found

    monkeypatch.setattr(bench, "own_experts", wrong)
    monkeypatch.setattr(sys, "argv", ["bench", "--tiny", "--device", "cpu", "--model", "tiny-oss", "--tokens", "2"])
    assert bench.main() == 1


def test_the_script_for_memory_checkers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every case is right; and a result that is not is told."""
    monkeypatch.setattr(sys, "argv", ["sanitize", "--device", "cpu"])
    assert sanitize.main() == 0
    said = capsys.readouterr().out
    assert said.count("right") == len(sanitize.CASES) and "persistent, half tiles" in said
    real = sanitize.split_gemm

    def wrong(a: torch.Tensor, table: object, out: torch.Tensor, *given: object, **named: object) -> None:
        real(a, table, out, *given, **named)  # type: ignore[arg-type]
        out[0, 0] += 1.0

    monkeypatch.setattr(sanitize, "split_gemm", wrong)
    monkeypatch.setattr(sys, "argv", ["sanitize", "--device", "cpu", "--case", "single"])
    assert sanitize.main() == 1
    assert "WRONG" in capsys.readouterr().out


def test_listed_tiles_fit_and_name_every_kind() -> None:
    for routes in (0.1, 8, 256):
        for block_scales, itemsize in ((False, 2), (True, 1)):
            tiles = candidates.listed(routes, block_scales)
            assert 4 < len(tiles) == len(set(tiles)) <= 12
            assert all(candidates.fits(one, itemsize) for one in tiles)
            assert any(one.kernel == "persistent" for one in tiles) == (routes > 48)
            # Scales per 128 columns: the kernel would cut a deeper tile.
            assert not block_scales or all(one.block_k <= 128 for one in tiles)


def test_every_tuned_model_has_its_key() -> None:
    """The tuner's key, made without a GPU's tables, is the one that a layer's tables are looked up with."""
    for model in bench.TINY_MODELS:
        problem = bench.Problem(model, CPU, torch.float16)
        assert configs.layer_shape(*problem.tables, model.top_k).key == model.key(torch.float16)
