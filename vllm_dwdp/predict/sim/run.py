"""Run a scenario: every way on the same arrivals, group by group."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np

from vllm_dwdp.predict.sim.costs import DwdpCurve, StepCost, dep_collectives, tp_collectives
from vllm_dwdp.predict.sim.engine import Log
from vllm_dwdp.predict.sim.groups import Limits, run_dep, run_dwdp, run_tp
from vllm_dwdp.predict.sim.requests import Request
from vllm_dwdp.predict.sim.scenario import Scenario

# What the seed of a group's streams and of DEP's imbalance differ by.
_ARRIVALS, _IMBALANCE = 0, 1


@dataclass(frozen=True)
class Result:
    """One way's figures. Seconds; tokens/s per accelerator; shares of the accelerators' time."""

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


def streams_of(scenario: Scenario, group: int) -> list[list[Request]]:
    """The requests of a group's ranks; the same for every way, and whatever else is simulated."""
    out = []
    for rank in range(group * scenario.group_size, (group + 1) * scenario.group_size):
        rng = np.random.default_rng([scenario.seed, _ARRIVALS, rank])
        out.append(scenario.stream.draw(scenario.seconds, rng))
    return out


def run_scenario(scenario: Scenario, progress: bool = False) -> list[Result]:
    """All ways of the scenario; `progress` shows a bar on stderr."""
    s = scenario
    limits = Limits(s.seconds, s.tokens_per_step, s.max_sequences)
    groups = s.ranks // s.group_size
    whole = StepCost(s.model, s.hardware, options=s.options)
    curve = DwdpCurve(s.model, s.hardware, s.group_size, s.share, s.merge, s.options)
    shared = StepCost(s.model, s.hardware, resident=s.model.experts / s.group_size, options=s.options)
    split = StepCost(s.model, s.hardware, split=s.group_size, options=s.options)
    logs = {way: Log() for way in s.ways}
    bar = _Bar(groups * len(s.ways), progress)
    for group in range(groups):
        streams = streams_of(s, group)
        first = group * s.group_size
        faults = {r - first: f for r, f in s.faults.items() if first <= r < first + s.group_size}
        for way in s.ways:
            if way == "DWDP":
                log = run_dwdp(streams, whole, curve, limits, faults)
            elif way == "DP":
                log = run_dwdp(streams, whole, None, limits, faults)
            elif way == "DEP":
                rng = np.random.default_rng([s.seed, _IMBALANCE, group])
                collectives = dep_collectives(s.model, s.hardware, s.group_size)
                log = run_dep(streams, shared, collectives, s.hardware.efficiency.imbalance, limits, faults, rng)
            else:
                # One engine with the group's memory: as many sequences as its ranks have together.
                wide = replace(limits, max_sequences=limits.max_sequences * s.group_size)
                log = run_tp(streams, split, tp_collectives(s.model, s.hardware, s.group_size), wide, faults)
            logs[way].add(log)
            bar.step()
    bar.close()
    return [result_of(way, log, s) for way, log in logs.items()]


def result_of(way: str, log: Log, s: Scenario) -> Result:
    """Sum up a log."""
    time = s.ranks * s.seconds
    return Result(
        way=way,
        requests=log.arrived,
        finished=log.finished,
        lost=log.lost,
        prompt_per_gpu=log.prompt_tokens / time,
        output_per_gpu=log.output_tokens / time,
        ttft=_percentiles(log.ttft, None),
        gap=_percentiles([t for t, _ in log.tokens], [n for _, n in log.tokens]),
        exposed=log.exposed / time,
        waiting=max(0.0, log.waited / time),
        idle=max(0.0, 1 - (log.busy + log.waited) / time),
        steps=log.steps,
    )


def _percentiles(values: list[float], weights: list[int] | None) -> tuple[float, float, float]:
    """50th, 90th and 99th; nan without values."""
    if not values:
        return (float("nan"),) * 3
    order = np.argsort(values)
    sorted_values = np.asarray(values)[order]
    counts = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)[order]
    reached = np.cumsum(counts) / counts.sum()
    at = [min(int(np.searchsorted(reached, q)), len(values) - 1) for q in (0.5, 0.9, 0.99)]
    return float(sorted_values[at[0]]), float(sorted_values[at[1]]), float(sorted_values[at[2]])


class _Bar:
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
