"""Run a scenario: every way on the same arrivals, group by group."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_dwdp.predict.sim.costs import DwdpCurve, FewCosts, StepCost, dep_collectives, tp_collectives
from vllm_dwdp.predict.sim.engine import Log
from vllm_dwdp.predict.sim.groups import Limits, run_dep, run_dwdp, run_tp
from vllm_dwdp.predict.sim.requests import Request
from vllm_dwdp.predict.sim.scenario import Scenario

# What the seed of a group's streams and of DEP's imbalance differ by.
_ARRIVALS, _IMBALANCE = 0, 1


@dataclass(frozen=True)
class Result:
    """One way's figures. Seconds; tokens/s per accelerator; shares of the accelerators' time. requests: all that came."""

    way: str
    requests: int
    finished: int
    lost: int
    prompt_per_gpu: float
    output_per_gpu: float
    ttft: tuple[float, float, float]
    gap: tuple[float, float, float]
    exposed: float
    waiting: float
    idle: float
    steps: int


def streams_of(scenario: Scenario, group: int, ranks: int | None = None) -> list[list[Request]]:
    """The requests of a group's ranks, or of its first `ranks`; the same for every way, and whatever else is simulated."""
    out, first = [], group * scenario.group_size
    for rank in range(first, first + (scenario.group_size if ranks is None else ranks)):
        rng = np.random.default_rng([scenario.seed, _ARRIVALS, rank])
        out.append(scenario.stream.draw(scenario.seconds, rng))
    return out


def run_scenario(scenario: Scenario, progress: bool = False) -> list[Result]:
    """All ways of the scenario; `progress` shows a bar on stderr."""
    s, fleet = scenario, Fleet(scenario)
    groups = s.ranks // s.group_size
    logs = {way: Log() for way in s.ways}
    requests, bar = 0, Bar(groups * len(s.ways), progress)
    for group in range(groups):
        streams = streams_of(s, group)
        requests += sum(map(len, streams))
        for way in s.ways:
            logs[way].add(fleet.run(way, group, streams))
            bar.step()
    bar.close()
    return [result_of(way, requests, log, s) for way, log in logs.items()]


class Fleet:
    """What the groups of a scenario have in common. transfer_s: of a token's KV cache to another engine (None: it stays).
    until: in place of the scenario's end, after which nothing counts."""

    def __init__(self, scenario: Scenario, transfer_s: float | None = None, until: float | None = None) -> None:
        self._scenario = s = scenario
        self._limits = Limits(s.seconds if until is None else until, s.tokens_per_step, s.max_sequences, transfer_s)
        self._whole = StepCost(s.model, s.hardware, options=s.options)
        self._curve = DwdpCurve(s.model, s.hardware, s.group_size, s.share, s.merge, s.options)
        self._few = FewCosts(s.model, s.hardware, s.group_size, s.share, s.few())
        self._shared = StepCost(s.model, s.hardware, resident=s.model.experts / s.group_size, options=s.options)
        self._split = StepCost(s.model, s.hardware, split=s.group_size, options=s.options)

    def run(self, way: str, group: int, streams: list[list[Request]]) -> Log:
        """One group under one way."""
        s, limits = self._scenario, self._limits
        first = group * s.group_size
        faults = {r - first: f for r, f in s.faults.items() if first <= r < first + s.group_size}
        if way == "DWDP":
            return run_dwdp(streams, self._whole, self._curve, limits, faults, self._few)
        if way == "DP":
            return run_dwdp(streams, self._whole, None, limits, faults)
        if way == "DEP":
            rng = np.random.default_rng([s.seed, _IMBALANCE, group])
            collectives = dep_collectives(s.model, s.hardware, s.group_size)
            return run_dep(streams, self._shared, collectives, s.hardware.efficiency.imbalance, limits, faults, rng)
        # One engine with the group's memory and links: as many sequences as its ranks have together.
        link = None if limits.transfer_s is None else limits.transfer_s / s.group_size
        wide = replace(limits, max_sequences=limits.max_sequences * s.group_size, transfer_s=link)
        return run_tp(streams, self._split, tp_collectives(s.model, s.hardware, s.group_size), wide, faults)


def result_of(way: str, requests: int, log: Log, s: Scenario) -> Result:
    """Sum up a log."""
    time = s.ranks * s.seconds
    return Result(
        way=way,
        requests=requests,
        finished=log.finished,
        lost=log.lost,
        prompt_per_gpu=log.prompt_tokens / time,
        output_per_gpu=log.output_tokens / time,
        ttft=percentiles(log.ttft, None),
        gap=percentiles([t for t, _ in log.tokens], [n for _, n in log.tokens]),
        exposed=log.exposed / time,
        waiting=max(0.0, log.waited / time),
        idle=max(0.0, 1 - (log.busy + log.waited) / time),
        steps=log.steps,
    )


def percentiles(values: Sequence[float], weights: Sequence[float] | None) -> tuple[float, float, float]:
    """50th, 90th and 99th; nan without values."""
    if len(values) == 0:
        return (float("nan"),) * 3
    order = np.argsort(values)
    sorted_values = np.asarray(values)[order]
    counts = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)[order]
    reached = np.cumsum(counts) / counts.sum()
    at = [min(int(np.searchsorted(reached, q)), len(values) - 1) for q in (0.5, 0.9, 0.99)]
    return float(sorted_values[at[0]]), float(sorted_values[at[1]]), float(sorted_values[at[2]])


class Bar:
    """tqdm's bar where it is installed and wanted."""

    def __init__(self, total: int, wanted: bool) -> None:
        self._bar = None
        if wanted:
            try:
                from tqdm import tqdm
            except ImportError:
                print("simulating (tqdm would show progress)", file=sys.stderr)
            else:
                self._bar = tqdm(total=total, unit="group", desc="simulating", leave=False)

    def step(self) -> None:
        """One group of one way is done."""
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
