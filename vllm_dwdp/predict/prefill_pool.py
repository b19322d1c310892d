"""Engines that only compute prompts: how many a rate of requests takes, and how long a first token then is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.sim.requests import Stream
from vllm_dwdp.predict.sim.run import Fleet, streams_of
from vllm_dwdp.predict.sim.scenario import Scenario
from vllm_dwdp.predict.verdict import Case

#: Parts of what a group can compute, at which it is simulated; none is planned above the last.
LOADS: Final = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97)
#: Prompts that are simulated at no load: in all (fewer of those that take several steps), and of a rank at least. The
#: higher the load, the more.
_PROMPTS: Final = 2400
_OF_A_RANK: Final = 100
#: Steps of all ranks at all loads that are simulated at most: a minute or two.
_STEPS: Final = 15_000_000
_SEED: Final = 7


@dataclass(frozen=True)
class PrefillGroup:
    """A group of `ranks`. prompts_per_s: the most, with full steps. ttft: mean seconds until a prompt is done, at LOADS."""

    way: str
    ranks: int
    prompts_per_s: float
    ttft: tuple[float, ...]

    def ttft_s(self, prompts_per_s: float) -> float:
        """Mean seconds if so many prompts come to the group, at random; infinite above what is planned."""
        load = prompts_per_s / self.prompts_per_s
        return math.inf if load > LOADS[-1] else float(np.interp(load, LOADS, self.ttft))

    def needed(self, rate: float, ttft_s: float) -> int | None:
        """The fewest groups at which `rate` requests/s wait `ttft_s` on average at most; None if no number does."""
        if ttft_s < self.ttft[0]:
            return None
        # Waits grow with the load: up to which one do they last that long?
        index = int(np.searchsorted(self.ttft, ttft_s, side="right"))
        load = LOADS[-1]
        if index < len(LOADS):
            below, above = self.ttft[index - 1], self.ttft[index]
            load = LOADS[index - 1] + (LOADS[index] - LOADS[index - 1]) * (ttft_s - below) / (above - below)
        return max(1, math.ceil(rate / self.prompts_per_s / load - 1e-9))


def prefill_group(case: Case, way: str) -> PrefillGroup:
    """A group of prefill as the case has it, under 'DWDP' or 'DEP'. Raises DwdpError where prompts take too many steps."""
    prompt = case.lengths.mean * (1 - case.cached)
    most = case.ranks * case.step(way).tokens_per_gpu / prompt
    # DWDP's ranks do not wait for each other.
    simulated = min(case.ranks, 4) if way == "DWDP" else case.ranks
    scenario = Scenario(
        model=case.model, hardware=case.hardware, ranks=case.ranks, group_size=case.ranks, seconds=1.0, seed=_SEED,
        ways=(way,), tokens_per_step=case.tokens, max_sequences=case.tokens,
        stream=Stream(1.0, case.lengths, hit_rate=1.0 if case.cached else 0.0, hit_share=case.cached), faults={},
        share=case.share, merge=case.view == "contiguous", options=case.options,
    )  # fmt: skip
    # What has come is computed, however long it takes.
    parts = math.ceil(prompt / case.tokens)
    counts = [max(_OF_A_RANK, _PROMPTS / parts / simulated) / (1 - load) for load in LOADS]
    # Of all ranks for both ways, so that none is simulated where the other is refused.
    if (steps := parts * case.ranks * sum(counts)) > _STEPS:
        raise DwdpError(
            f"--tokens-per-step {case.tokens}: prompts take {parts:,} steps on average, so that {steps / 1e6:,.0f} million "
            f"would be simulated, of {_STEPS // 10**6} at most: raise it, or plan fewer --ranks"
        )
    fleet, waits = Fleet(scenario, until=math.inf), []
    for load, count in zip(LOADS, counts, strict=True):
        rate = load * most / case.ranks
        here = replace(scenario, seconds=count / rate, stream=replace(scenario.stream, rate=rate))
        waits.append(float(np.mean(fleet.run(way, 0, streams_of(here, 0, simulated)).ttft)))
    return PrefillGroup(way, case.ranks, most, tuple(np.maximum.accumulate(waits).tolist()))
