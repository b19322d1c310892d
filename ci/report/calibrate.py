#!/usr/bin/env python3
"""Fits the planner to half of the prefill steps of ci/bench/prefill.py and tells its error on the other half. No GPU needed.

    python -m ci.report.calibrate --slice-kib 4096                 docs/benchmarks/h200/prefill.json with ipc.json beside it
    python -m ci.report.calibrate FILE --hardware H100 --link-gbs 51

A point is a job and a prompt length. Terms that may be fitted: the efficiencies `matmul` (attention and dense products)
and `grouped` (experts), and `host`, milliseconds a step that the planner does not know of. Pulls run on during `host`.
Which of them are worth it is told by the fitted half alone: each of its points is predicted from the others. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from ci.report.planner import SETS, Planner, Point, Terms, halves, qwen3_layers
from ci.root import ROOT
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.hardware_file import load_hardware

DEFAULT: Final = ROOT / "docs" / "benchmarks" / "h200" / "prefill.json"
#: A word of a job's name -> the transport whose rate is its link's.
TRANSPORTS: Final = {"pinned": "cuda_pinned", "ipc": "cupy_ipc", "link": "cupy_ipc", "nvlink": "cupy_ipc"}
#: How a job copied, unless told: in slices as large as were measured. Before slices went by the layer it was 4 MiB.
SLICE_KIB: Final = 64 << 10


def read(path: Path) -> dict[str, Any]:
    """A JSON object; raises DwdpError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise DwdpError(f"{path} is no readable JSON ({e}): give a file that the GPU scripts wrote") from None
    if not isinstance(found, dict):
        raise DwdpError(f"{path} holds a {type(found).__name__}: give a file that the GPU scripts wrote")
    return found


def link_rates(ipc: dict[str, Any], slice_kib: int = SLICE_KIB) -> dict[str, float]:
    """GB/s by transport, at the slice size nearest to `slice_kib` with the fewest slices in flight."""
    best: dict[str, tuple[tuple[float, int], float]] = {}
    for row in ipc.get("rows", []):
        found = re.fullmatch(r"(\S+), (\d+) KiB, (\d+) in flight", str(row.get("name")))
        if row.get("part") == "rate" and found and row["value"] > 0:
            rank = abs(np.log2(int(found[2]) / slice_kib)), int(found[3])
            if found[1] not in best or rank < best[found[1]][0]:
                best[found[1]] = rank, float(row["value"])
    return {kind: rate for kind, (_, rate) in best.items()}


def points(
    prefill: dict[str, Any], rates: dict[str, float], link_gbs: float | None, device: bool = False
) -> tuple[list[Point], list[str]]:
    """(points by job and tokens, why jobs with prefill times were left out). link_gbs: in place of `rates`. device: the
    step's time on the GPU, without the front end and the scheduler, where the file has it."""
    found, left_out = [], []
    for job, row in sorted(prefill.items()):
        steps = row.get("prefill") if isinstance(row, dict) else None
        if not isinstance(steps, dict):
            continue
        words = job.replace(",", " ").split()
        share, view, gbs = None, "split", None
        if words[0] != "plain":
            named = re.match(r"(split|contiguous) (\d+)\b", job)
            if not named:
                left_out.append(f"{job}: its name does not tell view and experts held, as 'split 112 pinned' does")
                continue
            kind = next((TRANSPORTS[word] for word in words if word in TRANSPORTS), "")
            view, share, gbs = named[1], int(named[2]), link_gbs or rates.get(kind)
            if gbs is None:
                left_out.append(f"{job}: no rate of its link is known: give --ipc or --link-gbs")
                continue
        for length, cell in sorted(steps.items(), key=lambda item: int(item[0])):
            if device and "steps_device_s" not in cell:
                raise DwdpError(
                    f"{job} has no times on the GPU at {length} tokens: measure again, or leave --device out"
                )
            seconds = cell["steps_device_s"] if device else cell["seconds"]
            middle = statistics.median(seconds)
            spread = statistics.fmean(abs(turn / middle - 1) for turn in seconds)
            waited = 1e3 * cell.get("exposed_s", 0.0) / len(seconds)
            found.append(Point(job, int(length), share, view, gbs, 1e3 * middle, waited, spread))
    return found, left_out


def error_text(errors: Any) -> str:
    """Mean and worst, in percent."""
    return f"{100 * np.abs(errors).mean():.1f} % ({100 * np.abs(errors).max():.1f} %)"


def report(planner: Planner, all_points: Sequence[Point]) -> tuple[str, dict[str, Any]]:
    """(Markdown, the same as an object); raises DwdpError for too few points."""
    to_fit, held = halves(all_points)
    if min(len(to_fit), len(held)) <= max(map(len, SETS)):
        raise DwdpError(f"{len(all_points)} points are too few to halve: give a file with more jobs or prompt lengths")
    fitted, chosen = {names: planner.fit(to_fit, names) for names in SETS}, planner.choose(to_fit)
    other = planner.fit(held, chosen)
    lines = ["| fitted | matmul | grouped | host, ms a step | fitted half: mean (worst) error | held out |"]
    lines += ["|---" * 6 + "|"]
    rows: list[tuple[str, Terms, Any, Any]] = [
        (", ".join(names) or "nothing: as shipped", terms, planner.errors(to_fit, terms), planner.errors(held, terms))
        for names, terms in fitted.items()
    ]
    rows.append(("the chosen, halves exchanged", other, planner.errors(held, other), planner.errors(to_fit, other)))
    for name, terms, near, far in rows:
        bold = "**" if name == (", ".join(chosen) or "nothing: as shipped") else ""
        lines.append(
            f"| {bold}{name}{bold} | {terms.matmul:.3f} | {terms.grouped:.3f} | {terms.host:.1f} | {error_text(near)} "
            f"| {bold}{error_text(far)}{bold} |"
        )
    spread = 100 * statistics.fmean(point.spread for point in all_points)
    note = f"Bold: chosen by the fitted half alone. Turns of one point lie {spread:.1f} % from their median."
    lines += ["", note, ""]
    lines += ["| job | tokens | half | measured, ms | as shipped | calibrated | error | waited, ms | predicted |"]
    lines += ["|---" * 9 + "|"]
    best, told = fitted[chosen], []
    for point in sorted(all_points):
        half = "held out" if point in held else "fitted"
        was, (ms, exposed) = planner.predict(point, planner.shipped())[0], planner.predict(point, best)
        waits = "| | |" if point.share is None else f"| {point.waited:.1f} | {exposed:.1f} |"
        lines.append(
            f"| {point.job} | {point.tokens} | {half} | {point.ms:.1f} | {was:.1f} | {ms:.1f} "
            f"| {100 * (ms / point.ms - 1):+.1f} % {waits}"
        )
        told.append(
            {**point._asdict(), "half": half, "shipped_ms": was, "predicted_ms": ms, "predicted_wait_ms": exposed}
        )
    sets = [
        {"fitted": name, **asdict(terms), "fitted_errors": near.tolist(), "held_out_errors": far.tolist()}
        for name, terms, near, far in rows
    ]
    return "\n".join(lines), {"chosen": list(chosen), "sets": sets, "points": told}


def run(args: argparse.Namespace) -> None:
    """Read, fit, print."""
    prefill = {job: row for job, row in read(args.prefill).items() if any(p in job for p in args.only.split(","))}
    ipc = args.ipc or args.prefill.with_name(args.prefill.name.replace("prefill", "ipc"))
    rates = link_rates(read(ipc), args.slice_kib) if args.ipc or (ipc.exists() and ipc != args.prefill) else {}
    found, left_out = points(prefill, rates, args.link_gbs, args.device)
    if not found:
        raise DwdpError(
            f"{args.prefill} has no prefill times that the planner can tell: run ci/bench/prefill.py --json"
        )
    model = qwen3_layers()
    text, told = report(Planner(model, load_hardware(args.hardware), args.ranks), found)
    links = ", ".join(f"{job} {gbs:.1f} GB/s" for job, gbs in sorted({(p.job, p.gbs) for p in found if p.gbs}))
    where = f"--link-gbs {args.link_gbs:g}" if args.link_gbs else ipc.name
    print(f"{args.prefill.name}, {model.name}, {args.hardware}: {len(found)} points.", end=" ")
    print(f"Link ({where}): {links or 'none'}.\n")
    print(text)
    for line in left_out:
        print(f"\nLeft out: {line}.")
    if args.json:
        args.json.write_text(json.dumps({"from": args.prefill.name, "hardware": args.hardware, **told}, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefill", type=Path, nargs="?", default=DEFAULT, help="what ci/bench/prefill.py --json wrote")
    parser.add_argument("--hardware", default="h200", help="a shipped name or a .toml file (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="of the DWDP jobs (%(default)s)")
    parser.add_argument(
        "--ipc", type=Path, help="what ci/checks/gpu_ipc.py --json wrote (default: the ipc file beside it)"
    )
    parser.add_argument("--link-gbs", type=float, help="GB/s of the link of every DWDP job, in place of --ipc's")
    parser.add_argument("--slice-kib", type=int, default=SLICE_KIB, help="whose rate in --ipc is meant (%(default)s)")
    parser.add_argument("--device", action="store_true", help="the steps' times on the GPU, not what the client saw")
    parser.add_argument("--only", default="", help="jobs whose name contains this, by comma")
    parser.add_argument("--json", type=Path, help="also write everything there")
    try:
        run(parser.parse_args(argv))
    except DwdpError as e:
        print(f"gpu_calibrate: error: {e}", file=sys.stderr)
        return 2
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        what = f"{type(e).__name__}: {e}".splitlines()[0]
        print(
            f"gpu_calibrate: error: the input is not understood ({what}): give files of the GPU scripts",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
