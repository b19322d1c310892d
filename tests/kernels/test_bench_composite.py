"""ci.bench.composite: its words, and that a copy with other bytes is told."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from ci.bench import composite
from vllm_dwdp.kernels.bench.shapes import TINY_MODELS

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
