"""ci/report/gpu_figures.py draws what GPU scripts wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from PIL import Image

from ci.report import engine_pictures as gpu_engine_pictures
from ci.report import gpu_figures as gpu_report
from ci.report import pictures as gpu_pictures
from ci.report import returns_picture
from ci.root import ROOT

MOST_BYTES = 120_000


def cell(model: str, tokens: int, mode: str, ratio: float) -> dict[str, Any]:
    ratios = [ratio - 0.02, ratio, ratio + 0.02]
    shares = {"share": 0.4 * ratio, "base_share": 0.4}
    return {"model": model, "tokens": tokens, "mode": mode, "ratio": ratio, "ratios": ratios, **shares}


def kernels() -> dict[str, Any]:
    cells = [cell(m, t, mode, 1.1) for m in ("a", "b") for t in (1, 8192) for mode in ("same", "own", "new mode")]
    return {
        "device": "NVIDIA_X1",
        "cells": cells,
        "summary": [{"mode": "same", "tokens": 1, "mean": 1.1, "bound": 1.0}],
    }


def ipc(rate: float = 20.0) -> dict[str, Any]:
    sizes, depths = (64, 4096), (1, 8)
    rows = [
        {"part": "rate", "name": f"{kind}, {size} KiB, {depth} in flight", "value": rate * depth * size / 4096}
        for kind in ("cuda_pinned", "cupy_ipc", "other")
        for size in sizes
        for depth in depths
    ]
    return {"about": {}, "rows": [*rows, {"part": "rate", "name": "wrong bytes", "value": 0}]}


def engine_cell(seconds: float, **more: float) -> dict[str, Any]:
    return {"median_s": seconds, "seconds": [seconds] * 3, **more}


def engines() -> dict[str, Any]:
    tokens = {"8": {"tokens_per_s": 90.0, "all": [80.0, 90.0, 95.0]}}
    waited = engine_cell(0.04, exposed_s=0.03)
    return {
        "about": {"gpus": 1},
        "plain graphs": {"prefill": {"4096": engine_cell(0.02), "8192": engine_cell(0.03)}, "decode": tokens},
        "split 64 pinned": {"prefill": {"8192": engine_cell(0.06), "4096": waited}, "pairs": {"4096": waited}},
        "an odd name": {"decode": tokens, "error": "not done after 120 s"},
    }


def test_engines_are_compared_with_plain_ones_of_their_group() -> None:
    def row(group: int, seconds: float) -> dict[str, Any]:
        return {"group": group, "prefill": {"4096": engine_cell(seconds)}}

    found = {"plain": row(1, 0.01), "plain again": row(1, 0.01), "split 64 ipc": row(1, 0.02)}
    found |= {"plain, group 2": row(2, 0.05), "split 64 pinned, group 2": row(2, 0.1), "odd, group 3": row(3, 0.1)}
    run = gpu_pictures.Run("x1", "prefill.json", found)
    jobs = gpu_engine_pictures.jobs_with(run, "prefill")
    told = {job: gpu_engine_pictures.ratio(run, jobs, job, 4096, "plain") for job in jobs}
    assert {job: found and round(found[0], 3) for job, found in told.items()} == {
        "plain": 1.0, "plain again": 1.0, "split 64 ipc": 0.5, "plain, group 2": None, "split 64 pinned, group 2": 0.5,
        "odd, group 3": None,
    }  # fmt: skip


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps(content))
    return folder


def test_pictures_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = {"cells": [cell("a", 8192, "own", 1.4)], "summary": None}
    write(tmp_path, kernels=kernels(), kernels_goal=later, ipc=ipc(), ipc_nvlink=ipc(300.0))
    write(tmp_path, prefill=engines(), prefill_nvlink=engines())
    assert gpu_report.main([str(tmp_path)]) == 0
    names = {"kernels-ratio", "kernels-share", "copy-rate", "prefill", "decode", "pairs"}
    names |= {"prefill-nvlink", "decode-nvlink", "pairs-nvlink"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    assert capsys.readouterr().out.count("drawn: ") == len(names)
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size < MOST_BYTES
        with Image.open(path) as picture:
            picture.verify()
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 600
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 8


def test_what_is_missing_is_left_out_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, prefill={"plain": {"decode": {}, "prefill": {"1024": engine_cell(0.1)}}}, ipc={"rows": []})
    assert gpu_report.main([str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["prefill.png"]
    lines = capsys.readouterr().out.splitlines()
    assert "left out: kernels-ratio.png: kernels.json is not there" in lines
    assert "left out: copy-rate.png: ipc.json has no such figures" in lines
    assert "left out: decode.png: prefill.json has no such figures" in lines
    assert not any("nvlink" in line for line in lines)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has none of kernels.json"),
        ("{", "no readable JSON"),
        ("[]", "holds a list"),
        ('{"cells": [1]}', "not understood"),
    ],
)
def test_bad_files_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "kernels.json").write_text(content)
    assert gpu_report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_figures_are_those_of_the_files() -> None:
    run = gpu_pictures.Run("x1", "kernels.json", kernels())
    ratios = gpu_pictures.kernel_ratios(run)
    assert [axis.get_title("left") for axis in ratios.axes][-1] == "new mode"
    assert [line.get_ydata().tolist() for line in ratios.axes[0].lines if line.get_marker() == "o"] == [[1.1, 1.1]]
    later = gpu_pictures.Run("x1", "kernels-8192.json", {"cells": [cell("a", 8192, "own", 1.5)]})
    shares = gpu_pictures.kernel_shares([run, later])
    assert [text.get_text() for text in shares.axes[0].texts] == ["0.40"] * 2 + ["not measured", "0.44", "0.60", "0.44"]
    rates = gpu_pictures.copy_rates([gpu_pictures.Run("x1", "ipc.json", ipc())])
    assert [axis.get_title("left") for axis in rates.axes] == ["pinned host memory", "same GPU, CUDA IPC", "other"]
    assert rates.axes[0].lines[1].get_ydata() == pytest.approx([2.5, 160.0])
    times, ratio, waits = gpu_engine_pictures.prefill(gpu_pictures.Run("x1", "prefill.json", engines())).axes
    assert [line.get_ydata() for line in times.lines] == [pytest.approx([20, 30]), pytest.approx([40, 60])]
    assert ratio.lines[0].get_ydata() == pytest.approx([0.5, 0.5])
    assert waits.lines[1].get_ydata() == pytest.approx([25.0])
    pairs = gpu_engine_pictures.prefill(gpu_pictures.Run("x1", "prefill.json", engines()), "pairs")
    assert pairs.axes[2].lines[1].get_ydata() == pytest.approx([12.5])  # per rank


def test_lower_bounds_are_those_of_the_medians() -> None:
    low, high = gpu_pictures.interval(gpu_pictures.medians([1.0] * 9 + [5.0]))
    assert (low, high) == (1.0, 1.0)
    low, high = gpu_pictures.interval(gpu_pictures.medians(list(np.linspace(0.9, 1.1, 21))))
    assert 0.9 < low < 0.99 and 1.01 < high < 1.1


def test_names_in_words() -> None:
    label = gpu_engine_pictures.job_label
    assert label("split 64 link, 1 MiB") == "DWDP split, 64 experts held, NVLink, slices of 1 MiB"
    assert label("plain again") == "plain vLLM, again"
    assert gpu_report.machine_of({"kernels": kernels()}, Path("h200")) == "NVIDIA X1"
    assert gpu_report.machine_of({"ipc": ipc()}, Path("h200")) == "H200"


def test_a_rank_that_returns() -> None:
    found = {
        "per_second": [[9000, 8000, 9000, 10], [9000, 0, 4000, 10]],
        "parts_at_s": {"before": 0.0, "rank 1 is dead": 0.9, "rank 1 starts": 1.5, "after": 2.5},
        "return_s": 0.7,
    }
    [axis] = returns_picture.by_second(found, "title").axes
    assert [line.get_ydata() for line in axis.lines[:2]] == [pytest.approx([9, 8, 9]), pytest.approx([9, 0, 4])]
    assert [line.get_xdata()[0] for line in axis.lines[2:]] == pytest.approx([0.9, 1.5, 2.2])
    stored = json.loads((ROOT / "docs/benchmarks/two-h100/returns.json").read_text())
    assert len(returns_picture.by_second(stored["apart"], "title").axes[0].lines) == 5
    assert returns_picture.title_of(stored) == (
        "A rank dies and returns; the other serves on (2 x NVIDIA H100 80GB HBM3, 8192 / 1, 8 at a time)"
    )
