"""Quantities with their unit, as hardware files and the command line write them: '900 GB/s', '10 PFLOP/s', '186 GB'."""

from __future__ import annotations

import math
import re
from typing import Final

from vllm_dwdp.errors import DwdpError

_PREFIX: Final = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY: Final = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
#: Dimension -> what follows the prefix, and an example for errors.
_UNITS: Final = {
    "bytes": ("B", "186 GB"),
    "bytes/s": ("B/s", "900 GB/s"),
    "flop/s": ("FLOP/s", "2.5 PFLOP/s"),
    "seconds": ("s", "300 s"),
    "watts": ("W", "1200 W"),
}
_QUANTITY: Final = re.compile(r"\s*(?P<number>[-+]?[0-9.]+(?:[eE][-+]?\d+)?)\s*(?P<unit>[A-Za-zµ/]+)\s*")
#: Beyond these a number is a slip of the keyboard, and would overflow further on.
_RANGES: Final = {
    "bytes": (1.0, 1e18),
    "bytes/s": (1e3, 1e18),
    "flop/s": (1e6, 1e21),
    "seconds": (1e-12, 1e9),
    "watts": (1e-3, 1e9),
}
MOST_COUNT: Final = 2**53
_COUNT: Final = re.compile(r"\s*(?P<number>[-+]?\d+(?:\.\d+)?)\s*(?P<suffix>[kKmM]?)\s*")
_SUFFIX: Final = {"": 1, "k": 1000, "K": 1024, "m": 10**6, "M": 2**20}


def parse_quantity(text: object, dimension: str, what: str) -> float:
    """`text` in base units (B, B/s, FLOP/s, s, W); raises DwdpError on a missing, foreign or mixed unit, and
    outside of what the dimension can have."""
    unit, example = _UNITS[dimension]
    if not isinstance(text, str) or not (found := _QUANTITY.fullmatch(text)):
        raise DwdpError(f"{what} is {text!r}: write a number and its unit, such as '{example}'")
    scale = _scale(found["unit"], unit, dimension)
    if scale is None:
        bits = " (bits: divide by 8)" if re.fullmatch(r"[kMGTP]?b(it)?(/s|ps)", found["unit"]) else ""
        raise DwdpError(f"{what} is {text!r}, in {found['unit']}{bits}: it must be in {dimension}, such as '{example}'")
    try:
        value = float(found["number"]) * scale
    except ValueError:
        raise DwdpError(f"{what} is {text!r}: {found['number']!r} is no number; write it as '{example}'") from None
    if not 0 < value < math.inf:
        raise DwdpError(f"{what} is {text!r}: it must be above 0, such as '{example}'")
    low, high = _RANGES[dimension]
    if not low <= value <= high:
        raise DwdpError(f"{what} is {text!r}: it must be in {low:g}..{high:g} {dimension}")
    return value


def _scale(given: str, unit: str, dimension: str) -> float | None:
    if dimension == "seconds":
        return {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "min": 60.0, "h": 3600.0}.get(given)
    if not given.endswith(unit):
        return None
    prefix = given[: -len(unit)]
    return {**_PREFIX, **_BINARY}.get(prefix)


def parse_count(text: object, what: str, least: int = 1) -> int:
    """A whole number such as 32768, 32K (x 1024) or 32k (x 1000), as vLLM's command line; raises DwdpError."""
    found = _COUNT.fullmatch(str(text))
    if isinstance(text, bool) or not found:
        raise DwdpError(f"{what} is {text!r}: write a whole number such as 32768 or 32K (no unit)")
    value = float(found["number"]) * _SUFFIX[found["suffix"]]
    if value > MOST_COUNT:
        raise DwdpError(f"{what} is {str(text)[:40]}: it must be at most {MOST_COUNT}")
    if value != int(value) or value < least:
        raise DwdpError(f"{what} is {text!r}: it must be a whole number >= {least}")
    return int(value)


def show_bytes(value: float) -> str:
    """Decimal units, as hardware vendors print them."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= limit:
            return f"{value / limit:.{1 if abs(value) < 100 * limit else 0}f} {unit}"
    return f"{value:.0f} B"


def show_time(seconds: float) -> str:
    """Seconds, milliseconds or microseconds with three digits."""
    for limit, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        # What rounds up to 1000 is shown in the next unit.
        if seconds >= limit * 0.9995:
            return f"{seconds / limit:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def show_count(value: float) -> str:
    """Tokens or requests: 8192 -> 8K, 1500 -> 1500, 2.5e6 -> 2.5M."""
    if value >= 1024 and value == int(value) and int(value) % 1024 == 0 and value < 2**20:
        return f"{int(value) // 1024}K"
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    if value >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.0f}"
