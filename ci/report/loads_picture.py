"""The picture of what ci/bench/loads.py found: `python -m ci.report.loads_picture RESULTS.json PICTURE.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from vllm_dwdp.predict.plots import COLOURS, pyplot, save

_KINDS: Final = {"tp": COLOURS["TP"], "replicas": COLOURS["DP"], "dpep": COLOURS["DEP"]}
_DWDP: Final = (COLOURS["DWDP"], "#5fae93", "#a6d3c3")


def ratio_by_load(found: dict[str, Any]) -> Any:
    """Bars: each system's tokens/s by the base's, by load, with the range over turns; None where nothing has a ratio."""
    base, rows = found["base"], found["summary"]
    kinds = {system["name"]: system["kind"] for system in found["systems"]}
    shown = [load for load in rows if any("ratio" in row for name, row in rows[load].items() if name != base)]
    others = [name for name in kinds if name != base]
    if not shown or not others:
        return None
    figure, axis = pyplot().subplots(figsize=(2.2 + 1.5 * len(shown), 4.0))
    axis.axhline(1.0, color=COLOURS["DEP"], lw=1.4, label=f"{base} = 1", zorder=1)
    width, dwdp = 0.8 / len(others), iter(_DWDP * len(others))
    for place, name in enumerate(others):
        at = [i for i, load in enumerate(shown) if "ratio" in rows[load].get(name, {})]
        mine = [rows[shown[i]][name] for i in at]
        middle = [row["ratio"] for row in mine]
        bars = [[row["ratio"] - row["ratio_low"] for row in mine], [row["ratio_high"] - row["ratio"] for row in mine]]
        x = [i + width * (place - (len(others) - 1) / 2) for i in at]
        colour = _KINDS.get(kinds[name]) or next(dwdp)
        axis.bar(x, middle, 0.94 * width, yerr=bars, capsize=3, color=colour, label=name, zorder=2)
        for left, value, high in zip(x, middle, bars[1], strict=True):
            axis.text(left, value + high + 0.015, f"{value:.2f}", ha="center", va="bottom", fontsize=8)
    loads = {load["name"]: load for load in found["loads"]}
    labels = [f"{n}\n{loads[n]['input']} / {loads[n]['output']}, {loads[n]['concurrency']} at a time" for n in shown]
    axis.set_xticks(range(len(shown)), labels, fontsize=8)
    axis.grid(False, axis="x")
    axis.margins(y=0.12)
    axis.set_ylabel(f"tokens/s of {base} = 1")
    about = f"{found['machine']}, {found['model']}: steady load on real servers"
    figure.suptitle(f"{about}\nMedians of turns; bars: range over turns", x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=1 + len(others), fontsize=9)
    return figure


def draw(results: Path, picture: Path) -> bool:
    """Whether there was something to draw."""
    figure = ratio_by_load(json.loads(results.read_text()))
    if figure is not None:
        save(figure, str(picture))
    return figure is not None


if __name__ == "__main__":
    sys.exit(0 if draw(Path(sys.argv[1]), Path(sys.argv[2])) else "bench: nothing to draw")
