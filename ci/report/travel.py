#!/usr/bin/env python3
"""Fits the planner's three constants of tokens that travel to the layer bench (ci/bench/travel.py), and tells what each of
its rows is then predicted as. Engines under load are not read: they are held out (vllm_dwdp/predict/measured.py).

    python -m ci.report.travel
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from typing import Any, Final, NamedTuple

from ci.root import ROOT
from vllm_dwdp.predict import travel
from vllm_dwdp.predict.decode import layer_costs, travel_layer
from vllm_dwdp.predict.hardware_file import load_hardware
from vllm_dwdp.predict.read_config import load_model

#: Hardware file -> its rows. Half of the experts of Qwen3-30B-A3B's layer on either of two ranks.
FILES: Final = {"h100": "two-h100/travel-layer.json", "h200": "two-h200/travel-layer.json"}
_NAME: Final = re.compile(r"(local|travel), (other side idle|both at once|other side in long steps)(, rank \d)?")


class Measured(NamedTuple):
    """A row. seconds of a layer; beyond: of it what bytes and FLOP do not explain; predicted: seconds."""

    hardware: str
    what: str
    where: str
    tokens: int
    seconds: float
    beyond: float
    predicted: float


def rows() -> list[Measured]:
    """All rows that tell of a constant; `beyond` with the shipped constants taken out of `predicted`."""
    model, found = load_model("qwen3-30b-a3b"), []
    for name, file in FILES.items():
        hardware = load_hardware(name)
        costs = layer_costs(model, hardware, 2, 64)
        layer = travel_layer(model, hardware, 2, costs)
        read: dict[str, Any] = json.loads((ROOT / "docs" / "benchmarks" / file).read_text())
        for row in read["rows"]:
            named = _NAME.fullmatch(row["name"])
            if not named or (named[1] == "local" and named[2] != "other side idle"):
                continue
            tokens, seconds = row["tokens"], row["us"] * 1e-6
            if named[1] == "local":
                predicted, known = costs.local_s(tokens) + travel.LAUNCHES_S, travel.LAUNCHES_S
            elif named[2] == "other side in long steps":
                predicted, known = layer.seconds(tokens, prompts=1.0), travel.PROMPT_S
            else:
                predicted, known = layer.seconds(tokens, idle=named[2] == "other side idle"), travel.REQUEST_S
            found.append(Measured(name, named[1], named[2], tokens, seconds, seconds - predicted + known, predicted))
    return found


def constants(measured: list[Measured]) -> dict[str, float]:
    """Medians, in seconds."""

    def of(what: str, long: bool) -> float:
        chosen = [m.beyond for m in measured if m.what == what and (m.where == "other side in long steps") == long]
        return statistics.median(chosen)

    return {"LAUNCHES_S": of("local", False), "REQUEST_S": of("travel", False), "PROMPT_S": of("travel", True)}


def main() -> int:
    """Print."""
    measured = rows()
    print("| GPUs | layer | tokens | measured, us | planner, us | deviation |\n|---|---|---|---|---|---|")
    for m in measured:
        off = f"{m.predicted / m.seconds - 1:+.0%}"
        what = f"{m.what}, {m.where}"
        print(f"| {m.hardware} | {what} | {m.tokens} | {m.seconds * 1e6:.0f} | {m.predicted * 1e6:.0f} | {off} |")
    print()
    for name, seconds in constants(measured).items():
        print(f"{name}: fitted {seconds * 1e6:.1f} us, shipped {getattr(travel, name) * 1e6:.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
