"""The kernels compile for sm_90 and sm_100 on a machine without a GPU, use its matrix units and do not spill.

In a process of its own: what Triton interprets it cannot compile.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
#: Every kind of tile: flat and tall, sorted and single routes, 16 bits and FP8 with each kind of scales, both kernels.
CASES = ["qwen3-30b w13 one route", "gpt-oss", "fp8 block", "fp8 channel", "persistent", "halves", "spread"]


def rows_of(report: str, tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    path = tmp_path / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"vllm_dwdp.kernels.bench.{report}", "--json", str(path), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return found


@pytest.mark.timeout(300)
def test_compiles_for_hopper_and_blackwell(tmp_path: Path) -> None:
    rows = rows_of("compile_report", tmp_path, "--case", *CASES)
    assert len(rows) >= 2 * len(CASES)
    for row in rows:
        assert row["spilled"] == 0 and row["wide"] > 0 and not row["problem"], row
        if not row["tiles"].startswith("16x"):
            # Tiles of at least 64 rows: the big matrix instruction of either architecture, and no other.
            assert (row["wgmma"] if row["arch"] == 90 else row["tcgen05"]) > 0 == row["mma"], row


def test_what_orders_requests_and_answers_is_compiled_for_both(tmp_path: Path) -> None:
    """Fences and scopes, which no interpreter misses."""
    rows = rows_of("travel_report", tmp_path)
    assert {row["name"] for row in rows} == {"ask", "ask fp8", "wait", "merge", "take", "answer"}
    assert [row for row in rows if row["spilled"] or row["problem"] or not row["registers"]] == []
