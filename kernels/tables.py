"""Measured tables of tiles, one JSON file per device: read, written, and lent to devices with the same compute units.

    {"device": {"name", "capability", "multiprocessors"}, "versions": {...},
     "shapes": {shape key: {tokens: {"gain", "tiles"}}}}

`gain` is how many times faster than vLLM's choice the tiles were; 1.0 where vLLM's choice stayed. A table without "device"
serves the device of its file name only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from vllm_dwdp.errors import DwdpError

from .tiles import Tiles

FOLDER = Path(__file__).parent / "configs"

#: Shape key -> tokens -> tiles.
Table = dict[str, dict[int, Tiles]]


class Chip(NamedTuple):
    """What tuned tiles depend on.

    name: as in file names, 'NVIDIA_H200'; 'cpu' for the interpreter, whose other fields are zero.
    capability: (9, 0) for Hopper.
    multiprocessors: how many of the GPU this device has.
    """

    name: str
    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 0

    def like(self, other: Chip) -> bool:
        """Whether a table of one serves the other: the same compute units, and as many. Memory may differ."""
        return self.multiprocessors > 0 and self[1:] == other[1:]


def chip_of(device: torch.device) -> Chip:
    """Of a device of this process."""
    if device.type != "cuda":
        return Chip(device.type)
    found = torch.cuda.get_device_properties(device)
    return Chip(_file_name(found.name), (found.major, found.minor), found.multi_processor_count)


def device_name(device: torch.device) -> str:
    """As in file names."""
    return chip_of(device).name


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


@lru_cache
def _parsed(path: Path) -> tuple[Chip, Table]:
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        shapes: dict[str, dict[str, dict[str, Any]]] = raw["shapes"]
        table = {
            key: {int(tokens): Tiles(**entry["tiles"]) for tokens, entry in entries.items()}
            for key, entries in shapes.items()
        }
        about = raw.get("device", {"capability": (0, 0), "multiprocessors": 0})
        major, minor = about["capability"]
        return Chip(path.stem, (int(major), int(minor)), int(about["multiprocessors"])), table
    except (KeyError, TypeError, ValueError) as error:
        raise DwdpError(f"{path} is no table of tiles ({error}): write it with vllm_dwdp.kernels.bench.tune") from error


def read_table(path: Path) -> Table:
    """Empty where there is no such file. Raises DwdpError for one that makes no sense."""
    return _parsed(path)[1] if path.exists() else {}


def merged(chip: Chip, tables: Iterable[tuple[Chip, Table]]) -> Table:
    """The rows for `chip`: its own tables' first, the gaps filled by chips like it, in the order given; no other's."""
    given = list(tables)
    ordered = [table for owner, table in given if owner.name == chip.name]
    ordered += [table for owner, table in given if owner.name != chip.name and owner.like(chip)]
    found: Table = {}
    for table in ordered:
        for key, entries in table.items():
            found[key] = entries | found.get(key, {})
    return found


@lru_cache
def measured(folder: Path, chip: Chip) -> Table:
    """What the tables in `folder`, and then the shipped ones, hold for `chip`. Reads each file once in a process.

    Raises:
        DwdpError: a table there makes no sense.
    """
    return merged(
        chip, [_parsed(path) for place in dict.fromkeys((folder, FOLDER)) for path in sorted(place.glob("*.json"))]
    )


def read(path: Path) -> dict[str, Any]:
    """A table as it is on disk at this moment, or an empty one."""
    return json.loads(path.read_text()) if path.exists() else {"shapes": {}}  # type: ignore[no-any-return]


def write(path: Path, key: str, found: Mapping[int, tuple[Tiles, float]], chip: Chip | None = None) -> None:
    """Put entries {tokens: (tiles, gain)} of one shape, measured on `chip`, beside those of a table or in their place."""
    whole = read(path)
    if chip is not None and chip.multiprocessors:
        whole["device"] = chip._asdict()
    whole["versions"] = {"torch": torch.__version__, "triton": triton.__version__}
    entries = whole["shapes"].setdefault(key, {})
    for tokens, (tiles, gain) in found.items():
        entries[str(tokens)] = {"gain": round(gain, 3), "tiles": tiles.to_json()}
    whole["shapes"][key] = dict(sorted(entries.items(), key=lambda entry: int(entry[0])))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n")
