"""The kernels compile for sm_90 and sm_100 on a machine without a GPU, use its matrix units and do not spill.

In a process of its own: what Triton interprets it cannot compile.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
#: Every kind of tile: flat and tall, sorted and single routes, 16 bits and FP8 with each kind of scales, both kernels.
CASES = ["qwen3-30b w13 one route", "gpt-oss", "fp8 block", "fp8 channel", "persistent", "halves", "spread"]


@pytest.mark.timeout(300)
def test_compiles_for_hopper_and_blackwell(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vllm_dwdp.kernels.bench.compile_report", "--json", str(path), "--case", *CASES]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) >= 2 * len(CASES)
    for row in rows:
        assert row["spilled"] == 0 and row["wide"] > 0 and not row["problem"], row
        if not row["tiles"].startswith("16x"):
            # Tiles of at least 64 rows: the big matrix instruction of either architecture, and no other.
            assert (row["wgmma"] if row["arch"] == 90 else row["tcgen05"]) > 0 == row["mma"], row
