"""The picture of what ci/bench/travel.py found: `python -m ci.report.travel_picture RESULTS.json PICTURE.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from vllm_dwdp.predict.plots import COLOURS, pyplot, save

#: What a bar stands for: its label, and the start and the rest of the row's name.
_BARS: Final = (
    ("all experts local", "local", "idle", COLOURS["DP"]),
    ("tokens travel, owner idle", "travel", "idle", "#a6d3c3"),
    ("tokens travel, both ask each other", "travel", "both at once, rank 0", COLOURS["DWDP"]),
    ("tokens travel, owner in long steps", "travel", "long steps", "#5fae93"),
    ("read over the link", "direct", "idle", COLOURS["DEP"]),
)


def by_tokens(rows: list[dict[str, Any]], title: str) -> Any:
    """Bars: microseconds of a layer, by number of tokens."""
    sizes = sorted({row["tokens"] for row in rows if row["name"].startswith("travel")})
    figure, axis = pyplot().subplots(figsize=(9.0, 4.0))
    width = 0.85 / len(_BARS)
    for place, (label, way, where, colour) in enumerate(_BARS):
        found = {row["tokens"]: row["us"] for row in rows if row["name"].startswith(way) and where in row["name"]}
        x = [i + width * (place - (len(_BARS) - 1) / 2) for i, size in enumerate(sizes) if size in found]
        height = [found[size] for size in sizes if size in found]
        axis.bar(x, height, 0.94 * width, color=colour, label=label)
        for left, value in zip(x, height, strict=True):
            axis.text(left, value, f"{value:.0f}", ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(sizes)), [f"{size} token{'s' * (size > 1)}" for size in sizes])
    axis.grid(False, axis="x")
    axis.set_ylabel("microseconds of a MoE layer")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, fontsize=9)
    return figure


def main() -> None:
    """Command line."""
    if len(sys.argv) not in (3, 4):
        raise SystemExit("usage: python -m ci.report.travel_picture RESULTS.json PICTURE.png [TITLE]")
    title = sys.argv[3] if len(sys.argv) > 3 else "Half of 128 experts on the other GPU (Qwen3-30B-A3B's layer, BF16)"
    save(by_tokens(json.loads(Path(sys.argv[1]).read_text())["rows"], title), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
