"""A group's run under each way. DWDP's ranks have clocks of their own; DEP's and TP's have one together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import numpy as np

from vllm_dwdp.predict.sim.costs import Chunk, DwdpCurve, FewCosts, StepCost
from vllm_dwdp.predict.sim.engine import Engine, Log
from vllm_dwdp.predict.sim.requests import Request


@dataclass(frozen=True)
class Fault:
    """What is wrong with a rank: `slow` times slower, stalled from `stall_at` for `stall_for` s, dead at `dead_at`."""

    slow: float = 1.0
    stall_at: float = inf
    stall_for: float = 0.0
    dead_at: float = inf

    def end_of(self, started: float, seconds: float) -> float:
        """When `seconds` of work begun at `started` are done."""
        ended = started + seconds * self.slow
        if self.stall_at < ended and started < self.stall_at + self.stall_for:
            ended += self.stall_at + self.stall_for - max(started, self.stall_at)
        return ended


HEALTHY = Fault()
Times = Callable[[Chunk], tuple[float, float]]


@dataclass(frozen=True)
class Limits:
    """Of a run. seconds: arrivals and steps after it do not count. transfer_s: see `Engine`."""

    seconds: float
    tokens_per_step: int
    max_sequences: int
    transfer_s: float | None = None

    def engine(self, stream: list[Request], windows: tuple[int | None, ...]) -> Engine:
        """An engine within them."""
        return Engine(stream, self.tokens_per_step, self.max_sequences, windows, self.transfer_s)


def run_alone(
    stream: list[Request], times: Times, windows: tuple[int | None, ...], limits: Limits, fault: Fault
) -> Engine:
    """One engine that waits for nobody; `times` gives (seconds, seconds exposed) of a chunk."""
    engine = limits.engine(stream, windows)
    log, now, until = engine.log, 0.0, min(limits.seconds, fault.dead_at)
    while True:
        engine.admit(now)
        if not engine.has_work:
            now = engine.next_arrival()
            if now >= until:
                return engine
            continue
        seconds, exposed = times(engine.plan())
        ended = fault.end_of(now, seconds)
        if ended > until:
            log.busy += max(0.0, until - now)
            return engine
        log.steps += 1
        log.busy += seconds * fault.slow
        log.exposed += exposed
        # Rounding may leave a trifle.
        log.waited += max(0.0, ended - now - seconds * fault.slow - 1e-9)
        engine.finish(now, ended)
        now = ended


def run_dwdp(
    streams: list[list[Request]],
    cost: StepCost,
    curve: DwdpCurve | None,
    limits: Limits,
    faults: dict[int, Fault],
    few: FewCosts | None = None,
) -> Log:
    """A DWDP group, or full replicas where `curve` is None. few: steps that do not pull. Requests of a dead rank go on to
    the others in turn; its share stays readable, since mappings outlive their owner.
    """

    def times(chunk: Chunk) -> tuple[float, float]:
        if few is not None and chunk.tokens <= few.most:
            return cost.rest(chunk) + few.experts(chunk.tokens), 0.0
        alone = cost.seconds(chunk)
        return curve(alone) if curve is not None else (alone, 0.0)

    streams = [list(s) for s in streams]
    order = sorted(range(len(streams)), key=lambda r: faults.get(r, HEALTHY).dead_at)
    # Whoever dies behind the end of the run has not.
    alive = [r for r in order if faults.get(r, HEALTHY).dead_at >= limits.seconds]
    total = Log()
    for rank in order:
        fault = faults.get(rank, HEALTHY)
        engine = run_alone(streams[rank], times, cost.windows, limits, fault)
        if fault.dead_at < limits.seconds:
            left = engine.unfinished(fault.dead_at)
            for i, request in enumerate(left):
                if alive:
                    streams[alive[i % len(alive)]].append(request)
                else:
                    engine.log.lost += 1
            for r in alive:
                streams[r].sort()
        total.add(engine.log)
    return total


def run_dep(
    streams: list[list[Request]],
    cost: StepCost,
    collectives: tuple[float, float],
    imbalance: float,
    limits: Limits,
    faults: dict[int, Fault],
    rng: np.random.Generator,
) -> Log:
    """A DEP group: every step waits for its slowest rank, idle ranks join; a dead rank ends the group."""
    ranks = len(streams)
    engines = [limits.engine(s, cost.windows) for s in streams]
    until = min([limits.seconds, *(f.dead_at for f in faults.values())])
    now, total = 0.0, Log()
    noise: list[list[float]] = []
    while True:
        for engine in engines:
            engine.admit(now)
        if not any(engine.has_work for engine in engines):
            now = min(engine.next_arrival() for engine in engines)
            if now >= until:
                break
            continue
        chunks = [engine.plan() for engine in engines]
        tokens = [chunk.tokens for chunk in chunks]
        experts = cost.experts(sum(tokens) / ranks)
        if not noise:
            noise = np.maximum(0.2, 1 + imbalance * rng.standard_normal((256, ranks))).tolist()
        drawn = noise.pop()
        local = [(cost.rest(chunk) + experts) * x for chunk, x in zip(chunks, drawn, strict=True)]
        ended = max(
            faults.get(r, HEALTHY).end_of(now, seconds) if faults else now + seconds for r, seconds in enumerate(local)
        )
        slowest = ended - now
        ended += collectives[0] * max(tokens) + collectives[1]
        if ended > until:
            total.busy += sum(min(until - now, s) for s in local)
            break
        total.steps += ranks
        total.busy += sum(local)
        total.waited += slowest * ranks - sum(local)
        for engine in engines:
            engine.finish(now, ended)
        now = ended
    for engine in engines:
        # A group that ended early has lost what it was doing and what still arrives.
        if until < limits.seconds:
            engine.log.lost += len(engine.unfinished(until))
        total.add(engine.log)
    return total


def run_tp(
    streams: list[list[Request]],
    cost: StepCost,
    collectives: tuple[float, float],
    limits: Limits,
    faults: dict[int, Fault],
) -> Log:
    """One tensor-parallel engine with all of the group's requests; the slowest rank sets its pace."""
    ranks = len(streams)
    merged = sorted(request for stream in streams for request in stream)
    worst = Fault(
        slow=max([1.0, *(f.slow for f in faults.values())]),
        dead_at=min([inf, *(f.dead_at for f in faults.values())]),
        **_stall(faults),
    )

    def times(chunk: Chunk) -> tuple[float, float]:
        return cost.seconds(chunk) + collectives[0] * chunk.tokens + collectives[1], 0.0

    engine = run_alone(merged, times, cost.windows, limits, worst)
    log = engine.log
    if worst.dead_at < limits.seconds:
        log.lost += len(engine.unfinished(worst.dead_at))
    log.busy *= ranks
    log.waited *= ranks
    return log


def _stall(faults: dict[int, Fault]) -> dict[str, float]:
    stalled = [f for f in faults.values() if f.stall_for]
    if not stalled:
        return {}
    start = min(f.stall_at for f in stalled)
    return {"stall_at": start, "stall_for": max(f.stall_at + f.stall_for for f in stalled) - start}
