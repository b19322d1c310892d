"""Engines that only decode: prompts come with their KV cache, and leave with the last token."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field
from math import ceil, exp, inf, log, sqrt
from typing import Any, Final

from vllm_dwdp.predict.sim.costs import Chunk, StepCost, dep_collectives, tp_collectives
from vllm_dwdp.predict.sim.scenario import Scenario
from vllm_dwdp.predict.strategies import expected_maximum
from vllm_dwdp.predict.travel import LAUNCHES_S

#: Times between tokens are counted in classes of half a per cent.
_CLASS: Final = 0.005


@dataclass
class DecodeLog:
    """What happened. ttft: seconds from a request's arrival to its first token. gaps: class of seconds -> tokens. waits:
    seconds from the last of a KV cache sent to the step that takes the request. busy: seconds of all ranks."""

    ttft: array[float] = field(default_factory=lambda: array("d"))
    waits: array[float] = field(default_factory=lambda: array("d"))
    gaps: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    finished: int = 0
    busy: float = 0.0

    def add(self, other: DecodeLog) -> None:
        """Take over another log's figures."""
        self.ttft += other.ttft
        self.waits += other.waits
        for key, tokens in other.gaps.items():
            self.gaps[key] = self.gaps.get(key, 0.0) + tokens
        self.tokens += other.tokens
        self.finished += other.finished
        self.busy += other.busy

    def add_gaps(self, seconds: float, tokens: float) -> None:
        """So many tokens came that long after the ones before them."""
        key = round(log(seconds) / _CLASS)
        self.gaps[key] = self.gaps.get(key, 0.0) + tokens

    def gap_values(self) -> tuple[list[float], list[float]]:
        """(seconds, tokens) of each class."""
        return [exp(key * _CLASS) for key in self.gaps], list(self.gaps.values())


class DecodeCosts:
    """Seconds of an engine's step by its requests and the tokens that they look back on, which add in equal measure."""

    def __init__(self, s: Scenario) -> None:
        assert s.pool is not None
        pool, model, hardware = s.pool, s.model, s.hardware
        tp, self.ranks = pool.way == "TP", pool.group_size
        self.slots = pool.max_sequences * pool.group_size
        resident = model.experts / pool.group_size if pool.way == "DEP" else None
        cost = StepCost(model, hardware, resident=resident, split=self.ranks if tp else 1, options=s.options)
        collectives, waits = (0.0, 0.0), 1.0
        if tp:
            collectives = tp_collectives(model, hardware, self.ranks)
        elif self.ranks > 1:
            collectives = dep_collectives(model, hardware, self.ranks)
            waits += expected_maximum(self.ranks) * hardware.efficiency.imbalance
        nothing = (0.0,) * len(cost.windows)

        def step_s(count: int, look_back: float) -> float:
            # DEP's requests are spread evenly; the slowest rank has those that are left over.
            each, share = (count, count) if tp else (ceil(count / self.ranks), count / self.ranks)
            local = cost.rest(Chunk(each, nothing, each, look_back * each)) + cost.experts(share)
            together = collectives[0] * each + collectives[1]
            return float(local * waits + together + model.moe_layers * LAUNCHES_S)

        self._step_s, self._known = step_s, dict[int, tuple[float, float]]()
        # Windows of attention are full: prompts are longer.
        self._far = s.stream.lengths.mean + s.stream.osl

    def step(self, count: int, context: float) -> tuple[float, float]:
        """(seconds of a step, how much longer the next one is). context: tokens that all `count` requests look back on."""
        if count not in self._known:
            near_s, far_s = self._step_s(count, self._far), self._step_s(count, 2 * self._far)
            self._known[count] = 2 * near_s - far_s, (far_s - near_s) / (self._far * count)
        base, slope = self._known[count]
        return base + slope * context, slope * count


def run_decode(
    costs: DecodeCosts, came: Any, sent: Any, tokens: Any, osl: int, transfer_s: float, until: float
) -> DecodeLog:
    """One engine. came, sent, tokens: [requests] in the order of `sent`: when a request came to prefill, when the last of
    its KV cache was sent, and the tokens of its prompt. transfer_s: of a token's KV cache into one of its ranks; what
    several prefill ranks send at once shares the engine's links."""
    out, running = DecodeLog(), deque[tuple[int, float]]()
    at, now, step, context, received = 0, 0.0, 0, 0.0, 0.0
    part = transfer_s / costs.ranks
    arrivals = list(zip(came.tolist(), sent.tolist(), tokens.tolist(), strict=True))
    ready = inf

    def next_ready() -> float:
        nonlocal received
        if at == len(arrivals):
            return inf
        received = max(received + arrivals[at][2] * part, arrivals[at][1])
        return float(received)

    ready = next_ready()
    while True:
        new = 0
        while ready <= now and len(running) < costs.slots:
            running.append((step + osl, arrivals[at][2]))
            context += arrivals[at][2]
            out.waits.append(now - arrivals[at][1])
            new, at = new + 1, at + 1
            ready = next_ready()
        count = len(running)
        if not count:
            now = ready
            if now >= until:
                break
            continue
        seconds, more = costs.step(count, context)
        # All alike until a request ends or another one can come in.
        steps = running[0][0] - step
        if count < costs.slots and ready < inf:
            steps = min(steps, _steps_until(ready - now, seconds, more))
        lasted = steps * seconds + more * steps * (steps - 1) / 2
        if now + lasted > until:
            steps = _steps_until(until - now, seconds, more) - 1
            if steps < 1:
                out.busy += max(0.0, until - now) * costs.ranks
                break
            lasted = steps * seconds + more * steps * (steps - 1) / 2
        out.ttft.extend([now + seconds - came_at for came_at, _, _ in arrivals[at - new : at]])
        if count * steps > new:
            out.add_gaps(lasted / steps, count * steps - new)
        out.tokens += count * steps
        out.busy += lasted * costs.ranks
        now, step, context = now + lasted, step + steps, context + count * steps
        while running and running[0][0] <= step:
            context -= running.popleft()[1] + osl
            out.finished += 1
    return out


def _steps_until(seconds: float, first: float, more: float) -> int:
    """The fewest steps, one at least, that last that long: the first takes `first`, each further one `more` longer."""
    if seconds <= first:
        return 1
    if more <= 0:
        return ceil(seconds / first)
    b = first - more / 2
    return max(1, ceil((sqrt(b * b + 2 * more * seconds) - b) / more))
