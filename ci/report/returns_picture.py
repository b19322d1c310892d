"""The picture of what ci/bench/returns.py found: `python -m ci.report.returns_picture RESULTS.json PICTURE.png`."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from ci.bench.load import Load
from ci.bench.steady import KILLED
from vllm_dwdp.predict.plots import COLOURS, pyplot, save


def by_second(found: dict[str, Any], title: str) -> Any:
    """Tokens/s of all ranks, second by second; found: `apart` of the results."""
    figure, axis = pyplot().subplots(figsize=(9.0, 3.6))
    there = itertools.cycle((COLOURS["DWDP"], COLOURS["TP"], COLOURS["DP"], COLOURS["pull"]))
    for rank, seconds in enumerate(found["per_second"]):
        colour = COLOURS["DEP"] if rank == KILLED else next(there)
        # The last second is not a whole one.
        whole = [tokens / 1e3 for tokens in seconds[:-1]]
        axis.step(range(len(whole)), whole, where="post", color=colour, linewidth=1.8, label=f"rank {rank}")
    starts = found["parts_at_s"]
    up = starts[f"rank {KILLED} starts"] + found["return_s"]
    top = max(map(max, found["per_second"])) / 1e3
    # In two rows: times may be close.
    for at, row, text in (
        (starts[f"rank {KILLED} is dead"], 1.16, f"rank {KILLED}: SIGKILL"),
        (starts[f"rank {KILLED} starts"], 1.08, "started again"),
        (up, 1.16, "answers"),
    ):
        axis.axvline(at, color="#888888", linewidth=0.8, linestyle="--")
        axis.text(at, row * top, f" {text}", fontsize=8, va="top")
    axis.set_ylim(0, 1.18 * top)
    axis.set_xlabel("seconds")
    axis.set_ylabel("1000 tokens/s")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(found["per_second"]), fontsize=9)
    return figure


def main() -> None:
    """Command line."""
    if len(sys.argv) not in (3, 4):
        raise SystemExit("usage: python -m ci.report.returns_picture RESULTS.json PICTURE.png [TITLE]")
    found = json.loads(Path(sys.argv[1]).read_text())
    save(by_second(found["apart"], sys.argv[3] if len(sys.argv) > 3 else title_of(found)), sys.argv[2])


def title_of(found: dict[str, Any]) -> str:
    """Says what was measured, and where."""
    who = "the other serves" if len(found["apart"]["per_second"]) == 2 else "the others serve"
    return f"A rank dies and returns; {who} on ({found['machine']}, {Load(**found['load']).describe()})"


if __name__ == "__main__":
    main()
