"""Tables of tiles: which device a table serves, and which rows the tuner searches first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.kernels import configs, tables
from vllm_dwdp.kernels.bench import tune
from vllm_dwdp.kernels.bench.shapes import MODELS
from vllm_dwdp.kernels.tables import Chip
from vllm_dwdp.kernels.tiles import Tiles

H200 = Chip("NVIDIA_H200", (9, 0), 132)
H100 = Chip("NVIDIA_H100_80GB_HBM3", (9, 0), 132)
GH200 = Chip("NVIDIA_GH200_480GB", (9, 0), 132)
OTHERS = (
    Chip("NVIDIA_H100_PCIe", (9, 0), 114),
    Chip("NVIDIA_H20", (9, 0), 78),
    Chip("NVIDIA_B200", (10, 0), 148),
    Chip("made_up", (8, 0), 132),
    Chip("cpu"),
)
SMALL, LARGE, WIDE = Tiles(16, 64, 64), Tiles(128, 128, 64, 16, 8, 3, "persistent"), Tiles(64, 256, 64)


def test_a_device_with_the_same_units_takes_a_table_and_no_other_does() -> None:
    given = [(H200, {"a": {1: SMALL}})]
    assert tables.merged(H200, given) == tables.merged(H100, given) == tables.merged(GH200, given) == given[0][1]
    for chip in OTHERS:
        assert tables.merged(chip, given) == {}
        # A table that does not say what it was measured on serves its own name alone.
        assert tables.merged(chip, [(Chip("old"), {"a": {1: SMALL}})]) == {}


def test_own_rows_go_first_and_gaps_are_filled() -> None:
    own, lent = {"a": {1: WIDE}}, {"a": {1: SMALL, 8192: LARGE}, "b": {16: SMALL}}
    found = tables.merged(H100, [(H200, lent), (H100, own)])
    assert found == {"a": {1: WIDE, 8192: LARGE}, "b": {16: SMALL}}
    # What was given stays as it was.
    assert own == {"a": {1: WIDE}} and lent["a"][1] == SMALL


def test_shipped_rows_serve_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a launch: by the device's name, and without reading the files again."""
    shape = configs.LayerShape(128, 1536, 2048, 768, "bf16", 8)
    found = tables.measured(tables.FOLDER, H100)
    own, lent = (tables.read_table(tables.FOLDER / f"{chip.name}.json")[shape.key] for chip in (H100, H200))
    assert set(own) < set(lent), "else choose a shape of which the H100's own table lacks rows"
    assert found[shape.key] == {**lent, **own}
    assert all(tables.measured(tables.FOLDER, chip) == {} for chip in OTHERS)
    monkeypatch.setattr(tables.json, "loads", lambda _: pytest.fail("read twice"))
    assert tables.measured(tables.FOLDER, H100) is found
    monkeypatch.setattr(configs, "chip_of", lambda _: H100)
    chosen = configs.tiles_for(shape, 8192, torch.device("cpu"))
    assert chosen == found[shape.key][8192] != configs.default_tiles("bf16", 8192)


def test_a_written_table_says_what_it_was_measured_on(tmp_path: Path) -> None:
    path = tmp_path / f"{H200.name}.json"
    tables.write(path, "a", {1: (SMALL, 1.2)}, H200)
    tables.write(path, "a", {16: (LARGE, 1.1)})
    assert json.loads(path.read_text())["device"] == {"name": H200.name, "capability": [9, 0], "multiprocessors": 132}
    assert tables.measured(tmp_path, GH200)["a"] == {1: SMALL, 16: LARGE}
    assert tables.read_table(path) == {"a": {1: SMALL, 16: LARGE}}


def test_a_device_that_makes_no_sense_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(json.dumps({"shapes": {}, "device": {"capability": 9}}))
    with pytest.raises(DwdpError, match=r"odd\.json is no table of tiles"):
        tables.measured(tmp_path, H100)


def test_a_cpu_is_no_chip_with_units() -> None:
    assert tables.chip_of(torch.device("cpu")) == Chip("cpu") and tables.device_name(torch.device("cpu")) == "cpu"


def test_the_tuner_begins_with_rows_that_no_table_has() -> None:
    known = tables.measured(tables.FOLDER, H100)
    rows = tune.wanted(MODELS, tune.TOKENS, torch.bfloat16, {}, known)
    assert len(rows) == len(MODELS) * len(tune.TOKENS)
    missing = [count not in known.get(model.key(torch.bfloat16), {}) for model, count in rows]
    assert missing == sorted(missing, reverse=True)
    # Rows that the device's own file has are not searched again.
    own = {model.key(torch.bfloat16): {"1": {}} for model in MODELS}
    assert all(count != 1 for _, count in tune.wanted(MODELS, tune.TOKENS, torch.bfloat16, own, known))
