#!/usr/bin/env python3
"""The planner beside what servers did under load: results of ci/bench/loads.py. No GPU needed.

    python -m ci.report.loads_plan                             the files in docs/benchmarks
    python -m ci.report.loads_plan FILE... [--all] [--json FILE]

A point is a load on a system. All points of one kind of GPU are halved like the fields of a chess board of systems and
loads; the planner is fitted to one half, and each held-out point is predicted as shipped and fitted. Terms that may be
fitted: the efficiencies `matmul` and `grouped`, `latency` of a collective, and two that the planner lacks: `host`,
milliseconds of every step, and `launch`, milliseconds that a layer takes at least in a step with a prompt. Which are worth
it is told by the fitted half alone: parts of it are predicted from the others. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from ci.report.calibrate import error_text
from ci.report.loads_model import FOLDS, SETS, Terms, choose, errors, fit, halves, predict, shipped
from ci.report.loads_points import Run, runs
from ci.root import ROOT
from vllm_dwdp.errors import DwdpError

#: The goal: a prediction may be off by this part.
WITHIN: Final = 0.10
STORED: Final = tuple(
    ROOT / "docs" / "benchmarks" / f"{name}.json"
    for name in (
        "two-h100/loads-auto", "two-h100/loads-decode", "two-h100/loads-fp8", "two-h100/loads-many", "two-h100/loads-tp",
        "two-h100/direct-48-layers", "two-h100/travel-48-layers", "two-h100/travel-fp8-24-layers",
        "two-h200/loads-48-layers", "two-h200/loads-launcher", "two-h200/travel-48-layers", "two-h200/travel-mixed",
        "two-h200/travel-prompts", "two-h200/dpep-48-layers-decode", "four-h200/loads-48-layers",
    )
)  # fmt: skip


class Told(NamedTuple):
    """A point: tokens/s that the planner says as shipped and calibrated, their errors, the share of time in waits."""

    run: Run
    held_out: bool
    shipped: float
    calibrated: float
    waited: float

    @property
    def deviation(self) -> float:
        """Of the calibrated planner."""
        return self.calibrated / self.run.rate - 1

    @property
    def within(self) -> bool:
        """Whether the goal is kept."""
        return abs(self.deviation) <= WITHIN


def told(some: Sequence[Run], held: Sequence[Run], terms: Terms) -> list[Told]:
    """Each point of one kind of GPU."""
    plain, found = shipped(some[0].gpu), []
    for run in sorted(some):
        best = predict(run, terms)
        found.append(Told(run, run in held, predict(run, plain).rate, best.rate, best.waited))
    return found


def report(some: Sequence[Run], everything: bool) -> tuple[str, dict[str, Any]]:
    """(Markdown, the same as an object) of the points of one kind of GPU; raises DwdpError for too few."""
    to_fit, held = halves(some)
    if len(to_fit) < FOLDS or not held:
        raise DwdpError(
            f"{some[0].gpu}: {len(some)} points are too few to halve: give results of more loads and systems"
        )
    fitted = {names: fit(to_fit, names) for names in SETS if 2 * len(names) < len(to_fit)}
    chosen = choose(to_fit)
    points = told(some, held, fitted[chosen])
    lines = [
        "| fitted | matmul | grouped | latency, us | host, ms a step | launch, ms a layer | fitted half: mean (worst) error "
    ]
    lines[0] += "| held out | within 10 % |"
    lines.append("|---" * 9 + "|")
    for names, terms in fitted.items():
        bold = "**" if names == chosen else ""
        far = errors(held, terms)
        lines.append(
            f"| {bold}{', '.join(names) or 'nothing: as shipped'}{bold} | {terms.matmul:.3f} | {terms.grouped:.3f} "
            f"| {1e3 * terms.latency:.0f} | {terms.host:.2f} | {terms.launch:.2f} | {error_text(errors(to_fit, terms))} "
            f"| {bold}{error_text(far)}{bold} | {int(np.sum(np.abs(far) <= WITHIN))} of {len(held)} |"
        )
    lines += ["", "Bold: chosen by the fitted half alone.", ""]
    waits = any(point.run.waited is not None for point in points)
    lines.append("| file | load | system | tokens/s (range of turns) | as shipped | calibrated | within 10 % |")
    lines[-1] += " waited | planner |" if waits else ""
    lines.append("|---" * (9 if waits else 7) + "|")
    lines += [_line(point, waits) for point in points if everything or point.held_out]
    missed = [point for point in points if point.held_out and not point.within]
    lines += ["", f"Held out: {sum(p.held_out for p in points) - len(missed)} of {len(held)} within 10 %."]
    lines += [
        f"Missed: {point.run.file}, {point.run.load}, {point.run.system}: {point.calibrated:,.0f} for {point.run.rate:,.0f} "
        f"({point.deviation:+.0%})."
        for point in missed
    ]
    terms_of = {", ".join(names): asdict(terms) for names, terms in fitted.items()}
    rows = [{**point.run._asdict(), **point._asdict(), "run": None, "deviation": point.deviation} for point in points]
    return "\n".join(lines), {"chosen": list(chosen), "terms": terms_of, "points": rows}


def _line(point: Told, waits: bool) -> str:
    run = point.run
    kept = "" if not point.held_out else "yes" if point.within else "**no**"
    line = (
        f"| {run.file} | {run.load} | {run.system} | {run.rate:,.0f} ({run.low / run.rate - 1:+.0%} to "
        f"{run.high / run.rate - 1:+.0%}) | {point.shipped:,.0f} ({point.shipped / run.rate - 1:+.0%}) "
        f"| {point.calibrated:,.0f} ({point.deviation:+.1%}) | {kept or 'fitted'} |"
    )
    return f"{line} {_share(run.waited)} | {_share(point.waited if run.kind == 'dwdp' else None)} |" if waits else line


def _share(part: float | None) -> str:
    return "" if part is None else f"{100 * part:.2f} %"


def run(args: argparse.Namespace) -> None:
    """Read, fit, print."""
    found: list[Run] = []
    left_out: list[str] = []
    for path in args.results:
        some, why = runs(path)
        found += some
        left_out += why
    if not found:
        raise DwdpError(
            f"no load of {len(args.results)} files can be predicted: {left_out[0] if left_out else 'none ran'}"
        )
    objects = {}
    for gpu in sorted({each.gpu for each in found}):
        mine = [each for each in found if each.gpu == gpu]
        print(f"{gpu.upper()}: {len(mine)} points of {len({each.file for each in mine})} files.\n")
        text, objects[gpu] = report(mine, args.all)
        print(f"{text}\n")
    for line in left_out:
        print(f"Not predicted: {line}.")
    if args.json:
        args.json.write_text(json.dumps({**objects, "not predicted": left_out}, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", default=STORED, help="what ci/bench/loads.py --json wrote")
    parser.add_argument("--all", action="store_true", help="a line for each point of the fitted half too")
    parser.add_argument("--json", type=Path, help="also write everything there")
    try:
        run(parser.parse_args(argv))
    except DwdpError as e:
        print(f"loads_plan: error: {e}", file=sys.stderr)
        return 2
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        what = f"{type(e).__name__}: {e}".splitlines()[0]
        print(f"loads_plan: error: the input is not understood ({what}): give results of loads.py", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
