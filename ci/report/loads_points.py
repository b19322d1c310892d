"""What servers did under load (results of ci/bench/loads.py), as points that the planner can be asked about."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from ci.bench.models import MODELS, write_model
from ci.report.calibrate import read
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.read_config import load_model

#: Kinds of systems of which the planner has a step.
KINDS: Final = ("dwdp", "dpep", "tp", "replicas")
_MACHINE: Final = re.compile(r"(\d+) x NVIDIA ([A-Z]+\d+)\b.*")
_GROUPS: Final = re.compile(r"independent ranks in groups of (\d+)")
_HELD: Final = re.compile(r"dwdp rank \d+: (\d+) of \d+ experts in \d+ MoE layers.*?, view (\w+)")
_TRAVEL: Final = re.compile(
    r"one of at most (\d+) tokens \([^)]*\) reads missing experts where they are, or has their owners"
)
#: Of loads.py, where its command does not say.
_BATCHED: Final = 16384


class Run(NamedTuple):
    """A load on a system. gpu: name of a hardware file. ranks: that share experts or layers; 1 of replicas. held, travel: of
    DWDP, experts on a rank and the most tokens of a step that travel. cache: tokens of an engine's KV cache, None where
    that was not told. batched: most tokens of a step. rate, low, high: tokens/s, input and output, median and range of
    turns. waited: of DWDP, share of the time that compute stood still, as its counters say.
    """

    file: str
    gpu: str
    devices: int
    model: str
    load: str
    system: str
    kind: str
    ranks: int
    input: int
    output: int
    concurrency: int
    spread: float
    held: int
    travel: int
    cache: float | None
    batched: int
    rate: float
    low: float
    high: float
    waited: float | None

    @property
    def engines(self) -> int:
        """Of the whole machine."""
        return 1 if self.kind == "tp" else self.devices

    @property
    def at_a_time(self) -> float:
        """Requests of one engine at a time, as far as its KV cache holds them; less than 1: some engines are idle."""
        each = self.concurrency / self.engines
        if self.output == 1 or self.cache is None:
            return each
        return min(each, self.cache / (self.input + self.output))


@cache
def model_of(text: str) -> MoeModel:
    """'qwen3, 48 layers' -> its sizes; raises DwdpError for a model that ci/bench/models.py does not name."""
    name, _, layers = text.partition(", ")
    if name not in MODELS:
        raise DwdpError(f"model {text!r}: it is not one of {', '.join(MODELS)}")
    with tempfile.TemporaryDirectory(prefix="loads-plan-") as folder:
        return load_model(str(write_model(name, int(layers.split()[0]) if layers else None, Path(folder) / name)))


def runs(path: Path) -> tuple[list[Run], list[str]]:
    """(what the planner can be asked about, what it cannot and why); raises DwdpError for a file of something else."""
    found = read(path)
    for key in ("machine", "model", "systems", "loads", "summary", "starts", "command"):
        if key not in found:
            raise DwdpError(f"{path} has no {key!r}: give results of ci/bench/loads.py")
    told, left_out = [], []
    for load, system, row in _rows(found):
        where = f"{path.parent.name}/{path.stem}, {load['name']}, {system['name']}"
        try:
            told.append(_run(f"{path.parent.name}/{path.stem}", found, load, system, row))
        except DwdpError as why:
            left_out.append(f"{where}: {why}")
    return told, left_out


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    for load in found["loads"]:
        for system in found["systems"]:
            if row := found["summary"].get(load["name"], {}).get(system["name"]):
                yield load, system, row


def _run(file: str, found: Mapping[str, Any], load: Mapping[str, Any], system: Mapping[str, Any], row: Any) -> Run:
    machine = _MACHINE.fullmatch(found["machine"])
    if machine is None:
        raise DwdpError(f"machine {found['machine']!r} has no hardware file")
    if found.get("decode"):
        raise DwdpError("prefill apart from decode, of which `plan --disaggregated` has pools, not rates of one")
    if load.get("every"):
        raise DwdpError("requests come at fixed times: who keeps up does as many tokens as are asked for")
    if load.get("uneven"):
        raise DwdpError("ranks have different loads, of which the planner has no step")
    if system["kind"] not in KINDS:
        raise DwdpError(f"the planner has no {system['kind']}")
    model_of(found["model"])
    devices, start = int(machine[1]), found["starts"].get(system["name"], {})
    ranks, held, travel = _dwdp(start, system) if system["kind"] == "dwdp" else (devices, 0, 0)
    # Files from before engines were counted: all of a system's lines are one engine's, but of DP+EP each engine has its own.
    engines = start.get("engines") or (devices if system["kind"] in ("dpep", "replicas") else 1)
    tokens = start.get("kv_tokens")
    words = found["command"]
    return Run(
        file, machine[2].lower(), devices, found["model"], load["name"], system["name"], system["kind"],
        1 if system["kind"] == "replicas" else ranks, load["input"], load["output"], load["concurrency"],
        load.get("spread", 0.2), held, travel, tokens / engines if tokens else None,
        int(_word(words, "--batched-tokens") or _BATCHED), row["tokens_per_s"], row["tokens_per_s_low"],
        row["tokens_per_s_high"], row.get("dwdp", {}).get("exposed_wait_share"),
    )  # fmt: skip


def _dwdp(start: Mapping[str, Any], system: Mapping[str, Any]) -> tuple[int, int, int]:
    """(ranks of a group, experts held, most tokens that travel), as the launch told them."""
    log = "\n".join(start.get("dwdp", []))
    groups, held, travel = _GROUPS.search(log), _HELD.search(log), _TRAVEL.search(log)
    if groups is None or held is None:
        raise DwdpError("its log does not tell groups and experts held")
    if held[2] != "split":
        raise DwdpError(f"view {held[2]}: loads are predicted of the split view alone")
    return int(groups[1]), int(held[1]), int(travel[1]) if travel else 0


def _word(words: Sequence[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None
