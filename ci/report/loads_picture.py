"""The picture of what ci/bench/loads.py found: `python -m ci.report.loads_picture RESULTS.json PICTURE.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from ci.bench.load import Load
from ci.bench.results import first_tokens
from vllm_dwdp.predict.plots import COLOURS, pyplot, save

_KINDS: Final = {
    "tp": COLOURS["TP"],
    "tpep": "#b58bd1",
    "replicas": COLOURS["DP"],
    "dpep": COLOURS["DEP"],
    "dptp": "#d9a441",
}
_DWDP: Final = (COLOURS["DWDP"], "#5fae93", "#a6d3c3")


def ratio_by_load(found: dict[str, Any]) -> Any:
    """Bars: each system's tokens/s by the base's, by load, with the range over turns; None where nothing has a ratio."""
    base, rows = found["base"], found["summary"]
    timed = _timed(found)
    shown = [
        load
        for load in rows
        if load not in timed and any("ratio" in row for name, row in rows[load].items() if name != base)
    ]
    measured = {name for load in shown for name in rows[load]}
    others = [system["name"] for system in found["systems"] if system["name"] in measured - {base}]
    if not shown or not others:
        return None
    figure, axis = pyplot().subplots(figsize=(2.2 + 1.5 * len(shown), 4.0))
    axis.axhline(1.0, color=COLOURS["DEP"], lw=1.4, label=f"{base} = 1", zorder=1)
    width, colours = 0.8 / len(others), _colours(found)
    for place, name in enumerate(others):
        at = [i for i, load in enumerate(shown) if "ratio" in rows[load].get(name, {})]
        mine = [rows[shown[i]][name] for i in at]
        middle = [row["ratio"] for row in mine]
        bars = [[row["ratio"] - row["ratio_low"] for row in mine], [row["ratio_high"] - row["ratio"] for row in mine]]
        x = [i + width * (place - (len(others) - 1) / 2) for i in at]
        axis.bar(x, middle, 0.94 * width, yerr=bars, capsize=3, color=colours[name], label=name, zorder=2)
        for left, value, high in zip(x, middle, bars[1], strict=True):
            axis.text(left, value + high + 0.015, f"{value:.2f}", ha="center", va="bottom", fontsize=8)
    labels = [f"{name}\n{_label(found, name)}" for name in shown]
    axis.set_xticks(range(len(shown)), labels, fontsize=8)
    axis.grid(False, axis="x")
    axis.margins(y=0.12)
    axis.set_ylabel(f"tokens/s of {base} = 1")
    about = f"{found['machine']}, {found['model']}: steady load on real servers"
    figure.suptitle(f"{about}\nMedians of turns; bars: range over turns", x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=1 + len(others), fontsize=9)
    return figure


def first_tokens_by_load(found: dict[str, Any]) -> Any:
    """Of loads with times of their own: which part of the requests had its first token in how long; None without such."""
    timed = _timed(found)
    if not timed:
        return None
    figure, axes = pyplot().subplots(1, len(timed), figsize=(1.0 + 4.6 * len(timed), 3.8), squeeze=False, sharey=True)
    colours = _colours(found)
    for axis, load in zip(axes[0], timed, strict=True):
        for name, turns in found["turns"][load].items():
            values = sorted(1e3 * seconds for seconds in first_tokens(turns)[""])
            part = [100 * (i + 1) / len(values) for i in range(len(values))]
            axis.step(values, part, where="post", color=colours[name], lw=2, label=name)
        axis.set_xlim(left=0)
        axis.set_xlabel("milliseconds to the first token")
        axis.set_title(f"{load}: {_label(found, load)}", fontsize=9)
    axes[0][0].set_ylabel("% of requests")
    figure.suptitle(f"{found['machine']}, {found['model']}: requests at fixed times", x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, fontsize=9
    )
    return figure


def _timed(found: dict[str, Any]) -> list[str]:
    """Loads whose requests have times of their own: all systems that keep up do as many tokens."""
    return [load["name"] for load in found["loads"] if load.get("every") and found["turns"].get(load["name"])]


def _label(found: dict[str, Any], name: str) -> str:
    return next(Load(**load).describe() for load in found["loads"] if load["name"] == name)


def _colours(found: dict[str, Any]) -> dict[str, str]:
    """System -> its colour."""
    dwdp = iter(_DWDP * len(found["systems"]))
    return {each["name"]: _KINDS.get(each["kind"]) or next(dwdp) for each in found["systems"]}


def draw(results: Path, picture: Path) -> list[Path]:
    """The pictures that there was something to draw for: `picture`, and beside it one of first tokens."""
    found, drawn = json.loads(results.read_text()), []
    beside = picture.with_name(f"{picture.stem}-ttft{picture.suffix}")
    for figure, path in ((ratio_by_load(found), picture), (first_tokens_by_load(found), beside)):
        if figure is not None:
            save(figure, str(path))
            drawn.append(path)
    return drawn


if __name__ == "__main__":
    sys.exit(0 if draw(Path(sys.argv[1]), Path(sys.argv[2])) else "bench: nothing to draw")
