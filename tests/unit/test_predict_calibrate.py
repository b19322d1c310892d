"""Calibration: known efficiencies are found again from the times that they give."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_dwdp.predict.cli import main
from vllm_dwdp.predict.hardware_file import FOLDER, load_hardware
from vllm_dwdp.predict.read_config import load_model
from vllm_dwdp.predict.verdict import Case
from vllm_dwdp.predict.work import Lengths

TRUE = {"grouped": 0.5, "matmul": 0.7, "link": 0.6, "elementwise_passes": 40.0}


def entry(way: str, rows: tuple[str, ...]) -> dict[str, Any]:
    chip = load_hardware("h200").with_efficiency(**TRUE)
    step = Case(load_model("gpt-oss-120b"), chip, 4, Lengths(8192), 32768).step(way)
    where = {"model": "gpt-oss-120b", "way": way, "ranks": 4, "isl": 8192, "tokens_per_step": 32768}
    return {**where, "milliseconds": {row: getattr(step, row) * 1e3 for row in rows}}


def test_efficiencies_are_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("attention", "grouped", "dense", "others")
    measured = tmp_path / "m.json"
    measured.write_text(json.dumps([entry("DP", rows), entry("DWDP", ("pull",))]))
    out = tmp_path / "mine.toml"
    assert main(["calibrate", str(measured), "--hardware", "H200", "--output", str(out)]) == 0
    assert "->" in capsys.readouterr().err
    found = load_hardware(str(out)).efficiency
    for key, value in TRUE.items():
        assert getattr(found, key) == pytest.approx(value, rel=0.01)
    assert main(["calibrate", str(measured), "--hardware", str(out), "--output", str(out)]) == 0
    assert out.read_text().count("[efficiency]") == 1


@pytest.mark.parametrize(
    "written",
    [
        "\n[efficiency]\nmemory = 0.5\n",
        "\n[efficiency]  # of last year\nmemory = 0.5\n# all of it\n",
        '\n[efficiency]\n\n  memory = 0.5\n\n  [sources]\n  mine = "of the tests"\n',
        "\n[ efficiency ]\nmatmul = 0.8\nmemory = 0.5",
    ],
)
def test_a_files_own_table_is_replaced_however_it_is_written(written: str, tmp_path: Path) -> None:
    text = (FOLDER / "h200.toml").read_text()
    if "[sources]" in written:
        text = text[: text.index("[sources]")]
    mine, measured, out = (tmp_path / name for name in ("mine.toml", "m.json", "out.toml"))
    mine.write_text(text.rstrip() + "\n" + written)
    measured.write_text(json.dumps([entry("DP", ("grouped",))]))
    assert main(["calibrate", str(measured), "--hardware", str(mine), "--output", str(out)]) == 0
    before, after = load_hardware(str(mine)), load_hardware(str(out))
    assert after.efficiency.memory == 0.5 and after.efficiency.matmul == before.efficiency.matmul
    assert after.efficiency.grouped == pytest.approx(0.5, rel=0.01) and after.sources == before.sources
    assert replace(after, efficiency=before.efficiency) == before


def test_efficiencies_that_are_no_table_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, measured = tmp_path / "mine.toml", tmp_path / "m.json"
    mine.write_text("efficiency = {memory = 0.5}\n" + (FOLDER / "h200.toml").read_text())
    measured.write_text(json.dumps([entry("DP", ("grouped",))]))
    assert main(["calibrate", str(measured), "--hardware", str(mine)]) == 2
    error = capsys.readouterr().err
    assert "no table [efficiency]" in error and str(mine) in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "no readable JSON"),
        ("[]", "must be a list"),
        (
            '[{"model": "gpt-oss-120b", "isl": 8, "tokens_per_step": 8, "milliseconds": {"grouped": -1}}]',
            "rows above 0",
        ),
        (
            '[{"model": "gpt-oss-120b", "isl": 8192, "tokens_per_step": 8192, "milliseconds": {"grouped": 0.1}}]',
            "the unit",
        ),
        ('[{"model": "gpt-oss-120b", "isl": 8, "tokens_per_step": 8, "milliseconds": {"merge": 1}}]', "has none"),
    ],
)
def test_wrong_measurements_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, says: str
) -> None:
    path = tmp_path / "m.json"
    path.write_text(content)
    assert main(["calibrate", str(path), "--hardware", "h200"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
