"""ci.bench.composite: its words, and that a copy with other bytes is told."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ci.bench import composite
from vllm_dwdp.kernels.bench.shapes import TINY_MODELS, fill
from vllm_dwdp.kernels.bench.timing import Pairs
from vllm_dwdp.kernels.torch_ops import FP8_MAX

ARGS = argparse.Namespace(cpu=True, tokens=[1], turns=1, turn_s=0.001)


@pytest.mark.parametrize("wrong", [False, True])
def test_results_are_compared(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tensor) if wrong else tensor.clone()

    monkeypatch.setattr(composite.Pages, "copy", copy)
    (row,) = composite.rows("bf16", TINY_MODELS[0], ARGS)
    assert row.alike and row.equal is not wrong and row.low <= row.ratio <= row.high and row.us > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokens", "0"], "--tokens 0: write 1 or more"),
        (["--turns", "0"], "--turns 0: write 1 or more"),
        (["--cpu"], "Marlin's kernels need a GPU"),
        (["--json", "/nowhere/x.json"], "there is no folder /nowhere"),
    ],
)
def test_words(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["composite", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stopped:
        composite.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_sides_are_torchs_memory_and_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio above 1 says that the pages are faster; `us` is their time."""
    names = iter(("torch", "again", "pages"))
    pairs = {("torch", "pages"): Pairs([2.0] * 9, [1.0] * 9), ("torch", "again"): Pairs([3.0], [4.0])}
    monkeypatch.setattr(composite, "captured", lambda calls, device: next(names))
    monkeypatch.setattr(composite, "in_turns", lambda base, own, *more: pairs[base, own])
    (row,) = composite.rows("bf16", TINY_MODELS[0], ARGS)
    assert (row.ratio, row.low, row.high, row.us, row.again) == (2.0, 2.0, 2.0, 1e6, 0.75)


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ({}, 0, "equal"),
        ({"equal": False}, 1, "DIFFERS"),
        ({"equal": False, "alike": False}, 0, "differs, as two alike do"),
        ({"low": 0.9, "ratio": 0.95, "high": 0.99}, 0, "equal"),
        ({"low": 0.9, "ratio": 0.95, "high": 0.98}, 1, "below 0.99: bf16, 1 tokens"),
    ],
)
def test_what_is_missed_is_told(
    more: dict[str, Any],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = composite.Row("bf16", 1, 10.0, 1.0, 0.99, 1.01, 1.0, True, True)._replace(**more)
    monkeypatch.setattr(composite, "rows", lambda *_: iter([row]))
    monkeypatch.setattr(composite, "machine", lambda cpu: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["composite", "--kinds", "bf16", "--json", str(tmp_path / "a.json")])
    assert composite.main() == status
    assert said in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == [row._asdict()]


def test_weights_are_drawn_so_that_products_come_out_near_1(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    fill(wide := torch.empty(2, 64, 400))
    assert wide.std().item() == pytest.approx(0.05, rel=0.05)
    ones: Callable[..., torch.Tensor] = torch.ones
    monkeypatch.setattr(torch, "randn", lambda *shape, device: ones(*shape, device=device) * 7)
    fill(packed := torch.empty(1, 2, 2, dtype=torch.float8_e4m3fn))
    assert (packed.float() == FP8_MAX).all()
