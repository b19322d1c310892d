#!/usr/bin/env python3
"""Draws what the GPU scripts measured. `python -m ci.report.gpu_figures [FOLDER]`; needs matplotlib, no GPU.

Reads from FOLDER (docs/benchmarks/h200) what is there of kernels.json and kernels-goal.json (python -m
vllm_dwdp.kernels.bench --json), ipc*.json (ci/checks/gpu_ipc.py) and prefill*.json (ci/bench/prefill.py), where "link" in a
name says that the ranks had a GPU each, and writes the pictures beside them. A picture without figures is left out, with one
line that says why.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ci.report.engine_pictures import decode, prefill
from ci.report.pictures import Run, copy_rates, kernel_ratios, kernel_shares
from ci.root import ROOT
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.plots import save

DEFAULT: Final = ROOT / "docs" / "benchmarks" / "h200"
FILES: Final = ("kernels", "kernels-goal", "ipc", "prefill")
COLOURS: Final = 128


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What there is of FILES; raises DwdpError for a file that is no JSON object, or if there is none."""
    found: dict[str, dict[str, Any]] = {}
    more = sorted(path.stem for kind in ("ipc-*", "prefill-*") for path in folder.glob(f"{kind}.json"))
    for name in dict.fromkeys((*FILES, *more)):
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        try:
            raw = json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise DwdpError(f"{path} is no readable JSON ({e}): run the script that wrote it again") from None
        if not isinstance(raw, dict):
            raise DwdpError(f"{path} holds a {type(raw).__name__}: it must be what the GPU script wrote")
        found[name] = raw
    if not found:
        raise DwdpError(f"{folder} has none of {', '.join(f'{name}.json' for name in FILES)}: give a folder with some")
    return found


def machine_of(found: dict[str, dict[str, Any]], folder: Path) -> str:
    """Of the first file that names its device, else the folder's name."""
    for raw in found.values():
        about = raw.get("about")
        device = raw.get("device") or (about.get("device") if isinstance(about, dict) else None)
        if isinstance(device, str):
            return device.replace("_", " ")
    return folder.resolve().name.upper()


def pictures(found: dict[str, dict[str, Any]], machine: str) -> dict[str, tuple[Any, str]]:
    """Name of a picture -> (its figure or None, the files that it needs)."""
    runs = {name: Run(machine, f"{name}.json", raw) for name, raw in found.items()}
    kernels = [runs[name] for name in ("kernels", "kernels-goal") if name in runs]
    copies = [run for name, run in runs.items() if name.startswith("ipc")]
    made: dict[str, tuple[Any, str]] = {
        "kernels-ratio": (kernel_ratios(*kernels) if kernels else None, "kernels.json"),
        "kernels-share": (kernel_shares(kernels) if kernels else None, "kernels.json"),
        "copy-rate": (copy_rates(copies) if copies else None, "ipc.json"),
    }
    for name in dict.fromkeys(("prefill", *(name for name in runs if name.startswith("prefill")))):
        for step, draw in (("prefill", prefill), ("decode", decode)):
            figure = draw(runs[name]) if name in runs else None
            made[step + name.removeprefix("prefill")] = figure, f"{name}.json"
        if name in runs and (figure := prefill(runs[name], "pairs")) is not None:
            made["pairs" + name.removeprefix("prefill")] = figure, f"{name}.json"
    return made


def write(figure: Any, path: Path) -> None:
    """As a PNG of few colours, which takes a third of the room."""
    save(figure, str(path))
    from PIL import Image  # comes with matplotlib

    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(COLOURS)
    few.save(path, optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--machine", help="its name in the titles (default: the device that a file names)")
    args = parser.parse_args(argv)
    try:
        found = read(args.folder)
        for name, (figure, source) in pictures(found, args.machine or machine_of(found, args.folder)).items():
            path = args.folder / f"{name}.png"
            if figure is None:
                why = "has no such figures" if (args.folder / source).exists() else "is not there"
                print(f"left out: {path.name}: {source} {why}")
                continue
            write(figure, path)
            print(f"drawn: {path} ({path.stat().st_size / 1e3:.0f} kB)")
    except DwdpError as e:
        print(f"gpu_report: error: {e}", file=sys.stderr)
        return 2
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        what = f"{type(e).__name__}: {e}".splitlines()[0]
        print(f"gpu_report: error: a file is not understood ({what}): give files of the GPU scripts", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
