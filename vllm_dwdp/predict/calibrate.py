"""Fit a hardware file's efficiencies to measured times, and write the file with an [efficiency] table."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Final

import numpy as np

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.fit import least_squares
from vllm_dwdp.predict.hardware_file import FOLDER, Hardware, load_hardware
from vllm_dwdp.predict.input_files import read_json
from vllm_dwdp.predict.read_config import load_model
from vllm_dwdp.predict.strategies import Options, Step
from vllm_dwdp.predict.units import parse_count
from vllm_dwdp.predict.verdict import Case
from vllm_dwdp.predict.work import Lengths

#: Row of a measured step -> the efficiency that it tells of.
ROWS: Final = {
    "attention": "matmul",
    "dense": "matmul",
    "grouped": "grouped",
    "others": "elementwise_passes",
    "communication": "link",
    "pull": "link",
    "synchronisation": "imbalance",
}
#: Below this a measurement is in another unit, not slow.
LEAST_EFFICIENCY: Final = 0.001
MOST_STEPS: Final = 1000
_KEYS: Final = {"model", "way", "ranks", "isl", "tokens_per_step", "experts_per_rank", "milliseconds"}
_EXAMPLE: Final = (
    '[{"model": "...", "way": "DWDP", "ranks": 4, "isl": 8192, "tokens_per_step": 32768, '
    '"milliseconds": {"grouped": 340}}]'
)


def calibrate(measured: str, hardware: str) -> tuple[str, str]:
    """(the TOML text of the calibrated file, a summary). `measured`: a JSON list of steps, each with rows in ms.

    Only efficiencies of which a row tells are fitted. Raises DwdpError.
    """
    start = load_hardware(hardware)
    entries = _read(measured)
    cases = [_case(entry, start, measured, i) for i, entry in enumerate(entries)]
    names = sorted({ROWS[row] for entry in entries for row in entry["milliseconds"] if row in ROWS})
    if not names:
        raise DwdpError(f"{measured} has no row that tells of an efficiency: give some of {', '.join(ROWS)}")

    def steps(values: Any) -> list[Step]:
        changed = dict(zip(names, (float(v) for v in values), strict=True))
        chip = start.with_efficiency(**changed)
        return [
            Case(c.model, chip, c.ranks, c.lengths, c.tokens, c.share, options=c.options).step(way) for way, c in cases
        ]

    def errors(values: Any) -> Any:
        out = []
        for entry, step in zip(entries, steps(values), strict=True):
            for row, ms in entry["milliseconds"].items():
                predicted = step.seconds if row == "step" else getattr(step, row)
                # Logarithms: half and double are as wrong as each other.
                out.append(np.log(max(predicted * 1e3, 1e-9) / ms))
        return np.array(out)

    before = [getattr(start.efficiency, name) for name in names]
    fitted = least_squares(errors, before)
    for name, value in zip(names, fitted, strict=True):
        if name != "elementwise_passes" and name != "imbalance" and value > 1:
            raise DwdpError(
                f"{measured} asks for {name} = {value:.2f} of the peak of {start.name}: check the unit (ms), the model's "
                "formats and the hardware's peak rates"
            )
        if value < LEAST_EFFICIENCY:
            raise DwdpError(
                f"{measured} asks for {name} = {value:.2g} of the peak of {start.name}: check the unit (ms)"
            )
    text = _with_table(hardware, {n: float(v) for n, v in zip(names, fitted, strict=True)})
    was, now = (float(np.exp(np.sqrt(np.mean(errors(v) ** 2))) - 1) for v in (before, fitted))
    changes = ", ".join(f"{n} {b:.3g} -> {v:.3g}" for n, b, v in zip(names, before, fitted, strict=True))
    return text, f"{start.name}: {changes}; typical error of a row {was:.0%} -> {now:.0%}"


def _read(path: str) -> list[dict[str, Any]]:
    raw = read_json(path, f"write {_EXAMPLE}")
    if not isinstance(raw, list) or not raw or not all(isinstance(e, dict) and set(e) <= _KEYS for e in raw):
        raise DwdpError(f"{path} must be a list of steps with the keys {', '.join(sorted(_KEYS))}: write {_EXAMPLE}")
    if len(raw) > MOST_STEPS:
        raise DwdpError(f"{path} has {len(raw)} steps: at most {MOST_STEPS} are fitted; leave some out")
    for entry in raw:
        rows = entry.get("milliseconds")
        known = {*ROWS, "merge", "step"}
        good = isinstance(rows, dict) and rows and set(rows) <= known
        if not good or not all(_positive(v) for v in rows.values()):
            raise DwdpError(f"{path}: milliseconds is {rows!r}: rows above 0, of {', '.join(sorted(known))}")
    return raw


def _share(entry: dict[str, Any], where: str) -> int | None:
    value = entry.get("experts_per_rank")
    return None if value is None else parse_count(value, f"{where}: experts_per_rank")


def _positive(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < math.inf


def _case(entry: dict[str, Any], hardware: Hardware, path: str, index: int) -> tuple[str, Case]:
    where = f"{path}, step {index}"
    way = entry.get("way", "DWDP")
    if way not in ("DWDP", "DEP", "TP", "DP"):
        raise DwdpError(f"{where}: way is {way!r}: it must be DWDP, DEP, TP or DP")
    case = Case(
        load_model(str(entry.get("model"))), hardware, parse_count(entry.get("ranks", 2), f"{where}: ranks"),
        Lengths(parse_count(entry.get("isl"), f"{where}: isl")),
        parse_count(entry.get("tokens_per_step"), f"{where}: tokens_per_step"), _share(entry, where),
        options=Options(),
    )  # fmt: skip
    for row in entry["milliseconds"]:
        if row != "step" and not getattr(case.step(way), row):
            raise DwdpError(f"{where}: {row} was measured, but {way} on {case.ranks} ranks has none: leave it out")
    return way, case


def _with_table(hardware: str, values: dict[str, float]) -> str:
    """The file's text with its [efficiency] table replaced; what the table already had for other keys stays."""
    path = Path(hardware)
    if path.suffix != ".toml":
        chip = load_hardware(hardware).name
        path = next(p for p in FOLDER.glob("*.toml") if load_hardware(str(p)).name == chip)
    text = path.read_text()
    import tomllib

    merged = {**tomllib.loads(text).get("efficiency", {}), **values}
    kept, inside = [], False
    for line in text.splitlines():
        if head := re.match(r"\s*\[\s*([^\]]*?)\s*\]", line):
            inside = head[1] == "efficiency"
        if not inside:
            kept.append(line)
    text = "\n".join(kept).rstrip()
    lines = "".join(f"{key} = {value:.4f}\n" for key, value in sorted(merged.items()))
    made = f"{text}\n\n[efficiency]\n# Fitted by vllm-dwdp calibrate.\n{lines}"
    try:
        tomllib.loads(made)
    except ValueError:
        raise DwdpError(
            f"{hardware} has efficiencies that are no table [efficiency] of their own: write them so"
        ) from None
    return made
