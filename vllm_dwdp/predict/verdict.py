"""Does DWDP pay here? Gains over the other ways, where they cross, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hold import MemoryFacts
from vllm_dwdp.predict.hardware_file import Hardware
from vllm_dwdp.predict.memory_plan import UTILISATION, MemoryPlan, memory_facts, memory_plan, working_bytes
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.strategies import (
    PLAIN,
    Options,
    Step,
    balanced_share,
    data_parallel,
    dep,
    dwdp,
    tensor_parallel,
)
from vllm_dwdp.predict.units import show_bytes, show_count, show_time
from vllm_dwdp.predict.work import Lengths, Work, prefill

#: Relative error of a predicted ratio: root mean square of the held-out rows (docs/predict.md) on GB200 and B200; twice
#: that on chips that no published point covers; the AMD rows' own on AMD.
BASE_ERROR: Final = {"GB200 NVL72": 0.06, "B200": 0.10, "MI355X": 0.22, "MI300X": 0.22}
OTHER_ERROR: Final = 0.12
#: The efficiencies that are varied, by this much each way.
VARIED: Final = ("matmul", "grouped", "link")
VARIATION: Final = 0.15
GRID: Final = tuple(2**k for k in range(8, 19))


@dataclass(frozen=True)
class Case:
    """What a user asks about. `view`: split or contiguous; `share`: experts per rank, None for a partition; `copies_s`: of
    the copies of a step, merge copies among them, where a rank measured them."""

    model: MoeModel
    hardware: Hardware
    ranks: int
    lengths: Lengths
    tokens: int
    share: int | None = None
    view: str = "split"
    num_slots: int = 2
    cached: float = 0.0
    options: Options = PLAIN
    osl: int = 1
    utilisation: float = UTILISATION
    copies_s: float | None = None

    def work(self, tokens: int | None = None) -> Work:
        """Steps of prefill at full load."""
        return prefill(self.lengths, self.tokens if tokens is None else tokens, cached=self.cached)

    def step(self, way: str, tokens: int | None = None) -> Step:
        """A step of one way: 'DWDP', 'DEP', 'TP' or 'DP'; `tokens` per rank (per group for TP)."""
        work = self.work(tokens)
        if way == "DWDP":
            return dwdp(
                self.model, self.hardware, work, self.ranks, self.share,
                merge=self.view == "contiguous" and self.copies_s is None,
                copies_s=self.copies_s, options=self.options,
            )  # fmt: skip
        if way == "DEP":
            return dep(self.model, self.hardware, work, self.ranks, options=self.options)
        if way == "TP":
            return tensor_parallel(self.model, self.hardware, work, self.ranks, options=self.options)
        return data_parallel(self.model, self.hardware, work, options=self.options)

    def gain(self, over: str, tokens: int | None = None) -> float:
        """Tokens/s/GPU of DWDP over those of another way."""
        return self.step("DWDP", tokens).tokens_per_gpu / self.step(over, tokens).tokens_per_gpu

    def memory(self, ranks: int | None = None, share: int | None = None) -> MemoryPlan:
        """Memory of a rank; `ranks` 1 is a full replica."""
        n = self.ranks if ranks is None else ranks
        return memory_plan(
            self.model, self.hardware, n, share if ranks is not None else self.share, view=self.view,
            num_slots=self.num_slots, tokens=self.tokens, kv_element=self.options.kv_element,
            context=self.lengths.isl + self.osl, utilisation=self.utilisation,
        )  # fmt: skip

    def facts(self) -> MemoryFacts:
        """What `experts_per_rank: "auto"` would choose by here; one request of prompt and answer has to fit."""
        return memory_facts(
            self.model, self.ranks, limit=self.hardware.memory * self.utilisation, dense=self.model.replicated_bytes,
            peak=working_bytes(self.model, self.tokens), view=self.view, num_slots=self.num_slots, tokens=self.tokens,
            context=self.lengths.isl + self.osl, kv_element=self.options.kv_element,
        )  # fmt: skip


class Verdict(NamedTuple):
    """`answer`: 'use it', 'marginal', 'do not use it here'. `gain` over `best`, the best other way that fits.

    error: one standard deviation of `gain`. reason: one sentence. knob: what to turn, or ''.
    """

    answer: str
    gain: float
    error: float
    best: str
    reason: str
    knob: str


def threshold(wins: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least number in low..high from which on `wins`, to 2 %; None if it does not win at `high`."""
    if not wins(high):
        return None
    if wins(low):
        return low
    while high > low * 1.02 and high - low > 1:
        middle = max(low + 1, int(math.sqrt(low * high)))
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high


def crossover_tokens(case: Case, over: str) -> int | None:
    """Tokens per rank and step from which on DWDP is ahead; None: nowhere up to 256K."""
    return threshold(lambda tokens: case.gain(over, tokens) > 1, GRID[0], GRID[-1])


def crossover_share(case: Case, over: str) -> int | None:
    """The fewest experts per rank from which on DWDP is ahead; None: with none short of all."""
    least, most = balanced_share(case.model.experts, case.ranks), case.model.experts - 1
    return threshold(lambda share: replace(case, share=share).gain(over) > 1, least, most)


def group_sizes(case: Case) -> list[int]:
    """Group sizes worth looking at: up to the link's, up to the experts."""
    most = min(case.hardware.max_ranks, case.model.experts)
    sizes = [n for n in (2, 3, 4, 6, 8, 12, 16, 24, 32, 36, 48, 64, 72) if n <= most]
    return sorted({*sizes, case.ranks})


def uncertainty(case: Case, over: str) -> float:
    """One standard deviation of the gain: published points that were held out, and efficiencies varied by 15 %."""
    middle = case.gain(over)
    squares = (BASE_ERROR.get(case.hardware.name, OTHER_ERROR) * middle) ** 2
    for name in VARIED:
        value = getattr(case.hardware.efficiency, name)
        low, high = (
            replace(case, hardware=case.hardware.with_efficiency(**{name: min(1.0, value * f)})).gain(over)
            for f in (1 - VARIATION, 1 + VARIATION)
        )
        squares += ((high - low) / 2) ** 2
    return math.sqrt(squares)


def others_that_fit(case: Case, least_kv: int) -> list[str]:
    """Ways other than DWDP that leave `least_kv` tokens of KV cache on a rank."""
    model, limit = case.model, case.memory(1)
    per_rank = limit.replicated + limit.share / case.ranks + limit.working
    ways = [way for way in ("DEP",) if (limit.limit - per_rank) / limit.kv_bytes_per_token >= least_kv]
    split = (limit.replicated + limit.share) / case.ranks + limit.working
    heads_allow = model.groups[0].attention.heads % case.ranks == 0
    if heads_allow and (limit.limit - split) / limit.kv_bytes_per_token * case.ranks >= least_kv:
        ways.append("TP")
    if limit.kv_tokens >= least_kv:
        ways.append("DP")
    return ways


def _what_fits(case: Case, least_kv: int) -> str:
    """What makes room: more ranks, else fewer tokens per step, fewer slots, or what the user knows best."""
    fits = [n for n in group_sizes(case) if n > case.ranks and case.memory(n).kv_tokens >= least_kv]
    if fits:
        return f"--ranks {fits[0]}"
    tokens = case.tokens // 2
    while tokens >= 1024:
        if replace(case, tokens=tokens).memory().kv_tokens >= least_kv:
            return f"--tokens-per-step {tokens}"
        tokens //= 2
    if case.num_slots > 2 and replace(case, num_slots=2).memory().kv_tokens >= least_kv:
        return "--num-slots 2"
    if case.view == "contiguous" and replace(case, view="split").memory().kv_tokens >= least_kv:
        return "--weight-view split"
    shorter = ", or a shorter context" if case.memory().kv > 0 else ""
    return f"a smaller weight format (--expert-format){shorter}, or a larger chip"


def judge(case: Case) -> Verdict:
    """The recommendation for a case; raises DwdpError only for impossible settings."""
    least_kv = case.lengths.isl + case.osl
    plan = case.memory()
    others = others_that_fit(case, least_kv)
    if plan.kv_tokens < least_kv:
        room = show_bytes(max(plan.kv, 0))
        return Verdict(
            "do not use it here", 0.0, 0.0, others[0] if others else "",
            f"it does not fit: {show_bytes(plan.used)} of {show_bytes(plan.limit)} are taken before the KV cache; "
            f"{room} left hold {show_count(plan.kv_tokens)} tokens of the {show_count(least_kv)} that one request needs",
            _what_fits(case, least_kv),
        )  # fmt: skip
    if not others:
        error = uncertainty(case, "DEP")
        return Verdict("use it", case.gain("DEP"), error, "DEP", "no other way fits into the memory", "")
    gains = {way: case.gain(way) for way in others}
    best = min(gains, key=lambda way: gains[way])
    gain, error = gains[best], uncertainty(case, best)
    step = case.step("DWDP")
    hidden = step.pull_layer <= step.window
    pull = f"a pull takes {show_time(step.pull_layer)} a layer, the window that hides it {show_time(step.window)}"
    if gain - error > 1:
        return Verdict("use it", gain, error, best, pull, "")
    needed = crossover_tokens(case, best)
    if needed is not None and needed > case.tokens:
        knob = f"--max-num-batched-tokens {needed} or more (DWDP is ahead from there on)"
    elif best == "DP":
        knob = "full replicas: the whole model fits on every rank"
    elif (share := crossover_share(case, best)) is not None and gain < 1:
        knob = f"experts_per_rank {share} or more, if memory allows"
    else:
        knob = {"DEP": "--enable-expert-parallel", "TP": f"--tensor-parallel-size {case.ranks}"}[best]
    if gain + error < 1:
        why = pull if not hidden else f"{best} does without what DWDP pays for: {pull}"
        return Verdict("do not use it here", gain, error, best, why, knob)
    return Verdict("marginal", gain, error, best, pull, knob)


def check_case(case: Case) -> None:
    """Raise DwdpError for settings that no machine can have."""
    most = min(case.hardware.max_ranks, case.model.experts)
    if not 2 <= case.ranks <= most:
        raise DwdpError(
            f"--ranks {case.ranks}: a group on {case.hardware.name} with {case.model.experts} experts has 2..{most} ranks"
        )
    if case.model.context_limit and case.lengths.isl + case.osl > case.model.context_limit:
        raise DwdpError(
            f"--isl {case.lengths.isl} and --osl {case.osl} exceed the {case.model.context_limit} positions of "
            f"{case.model.name}: shorten them"
        )
    case.step("DWDP")
