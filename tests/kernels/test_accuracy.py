"""The comparison with float64: what is right passes, and what is broken is told."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_dwdp.kernels import tables
from vllm_dwdp.kernels.bench import accuracy, exact, precompile, shapes
from vllm_dwdp.kernels.tiles import Tiles


def run(monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    words = ["accuracy", "--device", "cpu", "--tiny", "--seed", "1", *more]
    monkeypatch.setattr(sys, "argv", words)
    return accuracy.main()


@pytest.mark.full  # two minutes, of a tool
def test_every_kind_of_layer_is_near_float64(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = shapes.TINY_MODELS[0]
    tables.write(tmp_path / "cpu.json", tiny.key(torch.float16), {24: (Tiles(16, 32, 32), 1.1)})
    path = tmp_path / "accuracy.out"
    assert run(monkeypatch, "--json", str(path), "--tables", str(tmp_path)) == 0
    written = json.loads(path.read_text())
    rows = written["rows"]
    assert {(row["model"], row["tokens"]) for row in rows} == {(m.name, n) for m in shapes.TINY_MODELS for n in (24, 1)}
    assert [row["who"] for row in rows if row["model"] == "tiny" and row["tokens"] == 24] == ["vLLM", "same", "tuned"]
    assert all(row["bitwise"] and not row["broken"] for row in rows if row["who"] == "same")
    assert all(row["modelled"] < row["error"] for row in rows if row["model"] == "tiny-fp8")
    assert len({row["seed"] for row in rows}) == 6 and written["seed"] == 1
    said = capsys.readouterr().out
    assert "accuracy: 6 cases, 13 results, 0 broken; 0 cases left out for time; seed 1" in said


@pytest.mark.parametrize("model", ["tiny-fp8", "tiny-oss"])
def test_experts_that_are_mixed_up_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    class Mixed(shapes.Problem):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            first = self.tables[0]
            self.tables[0] = replace(first, addresses=first.addresses.roll(1))

    monkeypatch.setattr(accuracy, "Problem", Mixed)
    assert run(monkeypatch, "--shapes", model, "--tokens", "5") == 1
    said = capsys.readouterr().out
    assert "not vLLM's bits" in said and "error above" in said and "a token's error above" in said
    assert "1 broken" in said


@pytest.mark.parametrize("tokens", [9, 200])
def test_one_wrong_token_and_unwritten_values_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokens: int
) -> None:
    """Also a token that is not in the sample."""
    real, spoil = exact.own_experts, {"by": 1.3}

    def spoiled(problem: shapes.Problem, batch: shapes.Batch, tiles: Tiles, **given: Any) -> torch.Tensor:
        result = real(problem, batch, tiles, **given)
        sampled = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[: exact.SAMPLED].tolist()
        others = [row for row in range(tokens) if row not in sampled]
        result[(others or sampled)[0]] *= spoil["by"]
        return result

    seed = accuracy.case_seed(1, "tiny", tokens)
    monkeypatch.setattr(exact, "own_experts", spoiled)
    words = ("--shapes", "tiny", "--tokens", str(tokens))
    monkeypatch.setattr(accuracy, "TINY_MODELS", shapes.TINY_MODELS[:1])
    assert run(monkeypatch, *words) == 1
    said = capsys.readouterr().out
    assert "a token 0.3" in said and ("a token's error above" in said) == (tokens == 9)
    spoil["by"] = float("nan")
    assert run(monkeypatch, *words) == 1
    assert "64 values not written, or not finite" in capsys.readouterr().out


def test_a_case_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = accuracy.case

    def failing(problem: shapes.Problem, *given: Any) -> list[exact.Row]:
        if problem.model.name == "tiny":
            raise torch.OutOfMemoryError("too much")
        return real(problem, *given)

    monkeypatch.setattr(accuracy, "case", failing)
    assert run(monkeypatch, "--tokens", "1", "--shapes", "tiny", "oss") == 1
    said = capsys.readouterr().out
    assert "BROKEN: OutOfMemoryError: too much" in said and "3 cases, 5 results, 1 broken" in said


def test_kernels_are_compiled_beforehand_for_both_tiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a GPU does; compilation itself is left out."""
    model = shapes.TINY_MODELS[2]
    tables.write(tmp_path / "cpu.json", model.key(torch.float16), {24: (Tiles(16, 32, 32), 1.1)})
    compiled: list[Tiles] = []
    monkeypatch.setattr(precompile, "compile_gemm", lambda *given, **_: compiled.append(given[4]))
    launched: list[int] = []
    monkeypatch.setattr(precompile, "vllm_experts", lambda _, batch: launched.append(batch.ids.shape[0]))
    problem = shapes.Problem(model, torch.device("cpu"), torch.float16)
    precompile.compile_shape(problem, (24, 1), tmp_path, 4)
    # Both GEMMs of each; one token has no tiles of its own.
    assert len(compiled) == 6 and compiled.count(Tiles(16, 32, 32)) == 2
    assert sorted(launched) == [1, 24]


def test_no_case_is_begun_when_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--limit-s", "-1") == 1
    assert "0 cases, 0 results, 0 broken; 6 cases left out for time" in capsys.readouterr().out


def test_the_distance_of_all_and_of_the_worst_row() -> None:
    expected = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    found = expected + torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    overall, worst = exact.distance(found, expected)
    assert worst == pytest.approx(0.2) and overall == pytest.approx((1 / 2525) ** 0.5)
    assert all(value != value for value in exact.distance(found * float("nan"), expected))
