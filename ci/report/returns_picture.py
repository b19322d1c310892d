"""The picture of what ci/bench/returns.py found: `python -m ci.report.returns_picture RESULTS.json PICTURE.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm_dwdp.predict.plots import COLOURS, pyplot, save


def by_second(found: dict[str, Any], title: str) -> Any:
    """Tokens/s of both ranks, second by second; found: `apart` of the results."""
    figure, axis = pyplot().subplots(figsize=(9.0, 3.6))
    colours = (COLOURS["DWDP"], COLOURS["DEP"])
    for rank, (seconds, colour) in enumerate(zip(found["per_second"], colours, strict=True)):
        # The last second is not a whole one.
        whole = [tokens / 1e3 for tokens in seconds[:-1]]
        axis.step(range(len(whole)), whole, where="post", color=colour, linewidth=1.8, label=f"rank {rank}")
    starts = found["parts_at_s"]
    up = starts["rank 1 starts"] + found["return_s"]
    top = max(map(max, found["per_second"])) / 1e3
    for at, text in (
        (starts["rank 1 is dead"], "rank 1: SIGKILL"),
        (starts["rank 1 starts"], "started again"),
        (up, "answers"),
    ):
        axis.axvline(at, color="#888888", linewidth=0.8, linestyle="--")
        axis.text(at, 1.14 * top, f" {text}", fontsize=8, va="top")
    axis.set_ylim(0, 1.16 * top)
    axis.set_xlabel("seconds")
    axis.set_ylabel("1000 tokens/s")
    axis.legend(loc="lower right", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    return figure


def main() -> None:
    """Command line."""
    if len(sys.argv) not in (3, 4):
        raise SystemExit("usage: python -m ci.report.returns_picture RESULTS.json PICTURE.png [TITLE]")
    title = (
        sys.argv[3]
        if len(sys.argv) > 3
        else "A rank dies and returns; the other serves on (two H100s, prompts of 8K tokens)"
    )
    save(by_second(json.loads(Path(sys.argv[1]).read_text())["apart"], title), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
