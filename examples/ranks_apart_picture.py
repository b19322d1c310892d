"""The picture of examples/ranks_apart.py: answers per second over time, and what happened when. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steady_load import Asked, rates

if TYPE_CHECKING:
    from ranks_apart import Mark


def check(path: str) -> None:
    """Raises SystemExit, in one line, where no picture can be drawn at the end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("ranks_apart: --picture needs matplotlib: pip install matplotlib, or leave it out")
    if Path(path).suffix not in (".svg", ".png") or not Path(path).absolute().parent.is_dir():
        raise SystemExit(f"ranks_apart: --picture {path}: name an .svg or .png in a folder that is there")


def draw(asked: Sequence[Asked], marks: Sequence[Mark], path: str) -> None:
    """Write it to `path`, the same bytes for the same figures."""
    from vllm_dwdp.predict.plots import COLOURS, pyplot

    plt = pyplot()
    plt.rcParams["svg.hashsalt"] = "ranks apart"
    begin, end = marks[0].at, marks[-1].at
    figure, axis = plt.subplots(figsize=(9.0, 3.6))
    line = rates(asked, begin, end)
    axis.plot(
        [at for at, _ in line], [rate for _, rate in line], color=COLOURS["DWDP"], lw=1.8, label="answers per second"
    )
    cuts = [each.ended - begin for each in asked if each.cut]
    fails = [each.ended - begin for each in asked if each.failed]
    axis.plot(cuts, [0] * len(cuts), "x", color=COLOURS["pull"], clip_on=False, label=f"streams cut off: {len(cuts)}")
    axis.plot(fails, [0] * len(fails), "o", color="black", clip_on=False, label=f"requests failed: {len(fails)}")
    for number, mark in enumerate(marks[1:-1], 1):
        axis.axvline(mark.at - begin, color="#555555", lw=0.9, ls=":")
        axis.text(mark.at - begin, 1.01, str(number), transform=axis.get_xaxis_transform(), ha="center", fontsize=9)
    axis.set_xlim(0, end - begin)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("seconds under load")
    axis.set_ylabel("answers per second")
    told = [f"{number}  {mark.what}" for number, mark in enumerate(marks[1:-1], 1)]
    axis.text(0, -0.22, "\n".join(told), transform=axis.transAxes, va="top", fontsize=9)
    axis.legend(loc="upper right", bbox_to_anchor=(1.0, -0.2), fontsize=9)
    metadata = {"Date": None} if path.endswith(".svg") else None
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata=metadata)
    plt.close(figure)
