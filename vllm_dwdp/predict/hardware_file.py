"""Hardware files: peak rates, bandwidths and link of one accelerator, with the source of each figure."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.fitted import FITTED, GROUPED_EFFICIENCY
from vllm_dwdp.predict.input_files import read_toml, understood
from vllm_dwdp.predict.units import parse_quantity

FOLDER: Final = Path(__file__).parent / "hardware"
TOPOLOGIES: Final = ("switch", "mesh")
#: [efficiency] keys: what `vllm-dwdp calibrate` fits, and what a file may state from a measurement.
EFFICIENCIES: Final = ("memory", "matmul", "grouped", "link", "elementwise_passes", "imbalance")
_KEYS: Final = {"name", "aliases", "memory", "memory_bandwidth", "board_power"}
_TABLES: Final = {"peak", "link", "interference", "efficiency", "sources"}
#: Ranks of a link domain, as far as anyone has built one, and more.
MOST_RANKS: Final = 4096
_LEAST: Final = 1e-4  # of an efficiency or a share of time
_LINK: Final = {"rate", "topology", "max_ranks", "latency", "copy_efficiency", "at_once"}


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that are reached; the meanings are those of `fitted.Fitted`. `grouped`: products of experts."""

    memory: float = FITTED.memory_efficiency
    matmul: float = FITTED.matmul_efficiency
    grouped: float = GROUPED_EFFICIENCY
    link: float = FITTED.link_efficiency
    elementwise_passes: float = FITTED.elementwise_passes
    imbalance: float = FITTED.imbalance


@dataclass(frozen=True)
class Hardware:
    """One accelerator. Bytes, bytes/s, FLOP/s, s, W; `link_rate` is one way, to all peers together.

    topology: 'switch' (any peer at the full rate) or 'mesh' (each of `max_ranks` - 1 peers has its part of the rate).
    at_once: ranks -> measured rate of one while all of them pull, over its rate alone (ci/bench/contention.py).
    attention_slowdown, matmul_slowdown: time under copies over time alone, from `slowdown_duty` of the time on.
    """

    name: str
    memory: float
    memory_bandwidth: float
    peak: dict[str, float]
    link_rate: float
    topology: str
    max_ranks: int
    link_latency: float
    attention_slowdown: float
    matmul_slowdown: float
    slowdown_duty: float
    board_power: float
    efficiency: Efficiency = field(default_factory=Efficiency)
    sources: dict[str, str] = field(default_factory=dict)
    at_once: dict[int, float] = field(default_factory=dict)

    def rate(self, compute: str) -> float:
        """Peak FLOP/s of a type; a type that the chip lacks is computed in BF16."""
        for name in {"fp4": ("fp4", "bf16"), "fp8": ("fp8", "bf16")}.get(compute, ("bf16",)):
            if name in self.peak:
                return self.peak[name]
        raise DwdpError(f"hardware {self.name} has no peak rate for bf16: add it under [peak]")

    def pull_rate(self, ranks: int) -> float:
        """Bytes/s at which one of `ranks` ranks can pull from all its peers, alone."""
        part = min(1.0, (ranks - 1) / (self.max_ranks - 1)) if self.topology == "mesh" else 1.0
        return self.link_rate * self.efficiency.link * part

    def with_efficiency(self, **changed: float) -> Hardware:
        """The same chip with other efficiencies."""
        return replace(self, efficiency=replace(self.efficiency, **changed))


def shipped() -> list[str]:
    """Names of the hardware files of this package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_hardware(name: str) -> Hardware:
    """A shipped file by name or alias (any case), or a path to a TOML file. Raises DwdpError in one line."""
    path = Path(name)
    if path.suffix != ".toml":
        path = FOLDER / f"{name.lower()}.toml"
        if not path.is_file():
            aliases = {
                a: p for p in FOLDER.glob("*.toml") for a in read_toml(p, "hardware file", "reinstall")["aliases"]
            }
            if name.lower() not in aliases:
                close = difflib.get_close_matches(name.lower(), [*shipped(), *aliases], n=1)
                hint = f"did you mean {close[0]}?" if close else f"shipped are {', '.join(shipped())}"
                raise DwdpError(f"hardware {name!r} is unknown: {hint}; or give the path of a .toml file")
            path = aliases[name.lower()]
    raw = read_toml(path, "hardware file", "give a shipped name or a .toml")
    return parse_hardware(raw, str(path))


def parse_hardware(raw: dict[str, Any], where: str) -> Hardware:
    """A hardware file's content; raises DwdpError that names the key and the file."""
    with understood(where):
        return _hardware(raw, where)


def _hardware(raw: dict[str, Any], where: str) -> Hardware:
    known_keys(raw, _KEYS | _TABLES, where, "")
    peak, link, under = _table(raw, "peak", where), _table(raw, "link", where), _table(raw, "interference", where)
    known_keys(peak, {"bf16", "fp8", "fp4"}, where, "peak.")
    known_keys(link, _LINK, where, "link.")
    known_keys(under, {"attention", "matmul", "duty"}, where, "interference.")
    given = _table(raw, "efficiency", where) if "efficiency" in raw else {}
    known_keys(given, set(EFFICIENCIES), where, "efficiency.")
    efficiency = {key: _number(given, key, where, "efficiency.", _LEAST, 1000) for key in given}
    for key in ("memory", "matmul", "grouped", "link"):
        if efficiency.get(key, 1) > 1:
            raise DwdpError(f"{where}: efficiency.{key} is {efficiency[key]}: a share of the peak cannot exceed 1")
    if "copy_efficiency" in link:
        efficiency.setdefault("link", _number(link, "copy_efficiency", where, "link.", _LEAST, 1))
    if _need(link, "topology", where, "link.") not in TOPOLOGIES:
        raise DwdpError(f"{where}: link.topology is {link['topology']!r}: it must be one of {', '.join(TOPOLOGIES)}")
    ranks = _need(link, "max_ranks", where, "link.")
    if isinstance(ranks, bool) or not isinstance(ranks, int) or not 2 <= ranks <= MOST_RANKS:
        raise DwdpError(f"{where}: link.max_ranks is {ranks!r}: it must be a whole number >= 2, and <= {MOST_RANKS}")

    def quantity(table: dict[str, Any], key: str, dimension: str, prefix: str = "") -> float:
        return parse_quantity(_need(table, key, where, prefix), dimension, f"{where}: {prefix}{key}")

    return Hardware(
        name=str(_need(raw, "name", where, "")),
        memory=quantity(raw, "memory", "bytes"),
        memory_bandwidth=quantity(raw, "memory_bandwidth", "bytes/s"),
        peak={key: quantity(peak, key, "flop/s", "peak.") for key in peak},
        link_rate=quantity(link, "rate", "bytes/s", "link."),
        topology=link["topology"],
        max_ranks=ranks,
        link_latency=quantity(link, "latency", "seconds", "link."),
        attention_slowdown=_number(under, "attention", where, "interference.", 1, 10),
        matmul_slowdown=_number(under, "matmul", where, "interference.", 1, 10),
        slowdown_duty=_number(under, "duty", where, "interference.", _LEAST, 1),
        board_power=quantity(raw, "board_power", "watts"),
        efficiency=Efficiency(**efficiency),
        sources=_table(raw, "sources", where) if "sources" in raw else {},
        at_once=_at_once(_table(link, "at_once", where), ranks, where) if "at_once" in link else {},
    )


def _at_once(raw: dict[str, Any], most: int, where: str) -> dict[int, float]:
    known_keys(raw, {str(ranks) for ranks in range(2, most + 1)}, where, "link.at_once.")
    return {int(ranks): _number(raw, ranks, where, "link.at_once.", _LEAST, 1) for ranks in raw}


def _table(raw: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = _need(raw, key, where, "")
    if not isinstance(value, dict):
        raise DwdpError(f"{where}: {key} is {value!r}: it must be a table [{key}]")
    return value


def _need(table: dict[str, Any], key: str, where: str, prefix: str) -> Any:
    if key not in table:
        raise DwdpError(f"{where}: {prefix}{key} is missing: add it (any shipped file in {FOLDER.name}/ shows how)")
    return table[key]


def _number(table: dict[str, Any], key: str, where: str, prefix: str, low: float, high: float) -> float:
    value = _need(table, key, where, prefix)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise DwdpError(f"{where}: {prefix}{key} is {value!r}: it must be a number above 0 in {low:g}..{high:g}")
    return float(value)


def known_keys(table: dict[str, Any], known: set[str], where: str, prefix: str) -> None:
    """Raise DwdpError for a key of a TOML table that is not `known`, with the nearest one."""
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
            raise DwdpError(f"{where}: {prefix}{key} is unknown: {hint}")
