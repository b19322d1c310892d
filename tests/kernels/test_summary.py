"""What the bench says at its end, and its base with our tiles."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_dwdp.kernels import tables
from vllm_dwdp.kernels.bench import compare as bench
from vllm_dwdp.kernels.bench.summary import NO_MODEL, Cell, beside_fastest, summarise
from vllm_dwdp.kernels.tiles import Tiles

CELL = Cell("m", "E=1", 128, "own", "t", "v", 100.0, 80.0, 1.25, 1.25, 5.0, 4.0, 0.5, 0.4, False, 0.0, 0.0, [1.25] * 5)


def test_one_line_for_each_number_of_tokens_says_whether_the_goal_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    slow = replace(CELL, tokens=1, ratios=[0.9] * 5)
    layer = replace(slow, model=NO_MODEL, tokens=128)
    rows = summarise([CELL, slow, layer])
    assert [(row["tokens"], row["ok"], row["models"]) for row in rows] == [(1, False, ["m"]), (128, True, ["m"])]
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("BELOW") and "0.900" in first
    assert second.endswith("ok") and "1.250" in second


def test_a_mean_above_one_with_a_low_bound_is_below() -> None:
    assert not summarise([replace(CELL, ratios=[0.8, 0.8, 1.2, 1.2, 1.2])])[0]["ok"]


def test_the_fastest_backend_becomes_the_base() -> None:
    answers = [
        {"model": "m", "tokens": 128, "backend": "DeepGEMM", "ratio": 1.1},
        {"model": "m", "tokens": 128, "backend": "CUTLASS", "ratio": 0.7},
        {"model": "m", "tokens": 128, "backend": "FlashInfer", "ratio": None},
        {"model": "m", "tokens": 128, "backend": "Triton (modular)", "ratio": 1.3},
        {"model": "other", "tokens": 128, "backend": "DeepGEMM", "ratio": 9.0},
    ]
    (found,) = beside_fastest([CELL], answers)
    assert (found.mode, found.base, found.base_tiles) == ("fastest", "DeepGEMM", "")
    assert found.ratio == pytest.approx(1.25 / 1.1) and found.base_us == pytest.approx(100 / 1.1)
    # vLLM with our tiles takes 85: DeepGEMM's 91 is no longer the fastest.
    alike = replace(CELL, mode="alike", base_us=85.0, ratios=[85 / 80] * 5)
    (found,) = beside_fastest([CELL, alike], answers)
    assert found.base == CELL.base and found.ratio == pytest.approx(85 / 80) and found.base_tiles == "v"


def test_alike_measures_both_sides_with_our_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tiles = bench.TINY_MODELS[0], Tiles(16, 32, 32)
    tables.write(tmp_path / "cpu.json", model.key(torch.float16), {3: (tiles, 1.5)})
    path, asked = tmp_path / "bench.out", []
    real = bench.vllm_experts

    def seen(problem: bench.Problem, batch: object, tiles: Tiles | None = None) -> torch.Tensor:
        asked.append(tiles)
        return real(problem, batch, tiles)  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "vllm_experts", seen)
    words = ["bench", "--tiny", "--device", "cpu", "--model", "tiny", "--tokens", "3", "--both", "--alike"]
    monkeypatch.setattr(sys, "argv", [*words, "--tables", str(tmp_path), "--json", str(path)])
    assert bench.main() == 0
    assert tiles in asked and None in asked
    written = json.loads(path.read_text())
    cells = {cell["mode"]: cell for cell in written["cells"] if cell["model"] == "tiny"}
    assert list(cells) == ["same", "own", "alike"] and {row["mode"] for row in written["summary"]} == set(cells)
    assert cells["same"]["base_tiles"] == cells["same"]["tiles"] == cells["own"]["base_tiles"]
    assert cells["own"]["tiles"] == cells["alike"]["tiles"] == "16x32x32 g1 4w3s"
    assert cells["alike"]["base_us"] <= cells["own"]["base_us"]
    assert all(cell["shape"] == model.key(torch.float16) and cell["bound"] > 0 for cell in cells.values())
    assert written["chip"]["name"] == "cpu"
