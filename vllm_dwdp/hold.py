"""How many experts a rank can hold beside the KV cache that was asked for (pure): `experts_per_rank: "auto"`.

With S of E experts held, a rank keeps S experts of every MoE layer, its dense weights, the peak of a step, and slots, which
hold the E - S missing experts of a layer (split), all E (contiguous) or are not there (in place). Where pages can be mapped
(composite) a slot holds what is missing too, and shares take pages at their ends; without a split-weight kernel that is the
view where it takes no more than contiguous. The rest is KV cache. The largest S is taken for which that rest is

* what the user asked for in bytes, where that is known exactly, or else
* at least 40 % of what dense weights and the estimated peak leave, and what one request of the longest length needs.

Where even a partition leaves less than the 40 %, a partition it is; less than what was asked for, or than one request
needs, is refused.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from vllm_dwdp.errors import DwdpError

#: Of the memory that dense weights and the estimated peak leave, the part that goes to the KV cache at least.
KV_PART: Final = 0.4
#: A KV cache below this part of what was promised is worth a WARNING.
KEPT: Final = 0.9

SlotsHold = Literal["missing", "all", "nothing"]


class Paged(NamedTuple):
    """Memory that may be mapped in pages, where slots hold all experts otherwise. ends: bytes, as those of MemoryFacts.
    most: the largest share beside which a whole page is missing for sure."""

    ends: float
    most: int


@dataclass(frozen=True)
class MemoryFacts:
    """What a rank knows of its memory before its layers are built; bytes unless said otherwise.

    experts: E of the MoE layer with the fewest. ranks: N. layers: number of MoE layers.
    limit: what the rank may use in all. dense: weights that every rank holds. peak: estimate of everything that is
        neither weights nor KV cache: activations of the largest step, runtime, graphs.
    expert: one expert of all MoE layers. slot_expert: one expert in all slots. slots_hold: experts of a layer in a slot;
        "nothing" where peers' pages are read in place.
    ends: what a share takes beside its experts where memory is mapped in pages. paged: where it is if that takes no more.
    kv_token: KV cache of one token. kv_request: of one request of the longest length. kv_asked: of all, where the user
        said so; None: a rule has to tell.
    """

    experts: int
    ranks: int
    layers: int
    limit: float
    dense: float
    peak: float
    expert: float
    slot_expert: float
    slots_hold: SlotsHold
    kv_token: float
    kv_request: float
    kv_asked: float | None = None
    ends: float = 0.0
    paged: Paged | None = None

    @property
    def least(self) -> int:
        """The smallest share, in experts: a partition's, rounded up."""
        return -(-self.experts // self.ranks)

    @property
    def rest(self) -> float:
        """Left for experts, slots and KV cache."""
        return self.limit - self.dense - self.peak - self.ends

    @property
    def demand(self) -> float:
        """KV cache without which there is no start."""
        return self.kv_request if self.kv_asked is None else self.kv_asked

    @property
    def goal(self) -> float:
        """KV cache that a larger share must leave."""
        return max(self.demand, KV_PART * self.rest) if self.kv_asked is None else self.kv_asked

    def in_pages(self, share: int) -> bool:
        """Whether `share` experts are held in pages, which take no more than slots of all experts."""
        return self.paged is not None and share <= self.paged.most and self.paged.ends <= share * self.slot_expert

    def slots(self, share: int) -> float:
        """Bytes of all slots, and of pages beside a share where both are instead of slots of all experts."""
        if self.paged is not None and self.in_pages(share):
            return (self.experts - share) * self.slot_expert + self.paged.ends
        count = {"missing": self.experts - share, "all": self.experts, "nothing": 0}[self.slots_hold]
        return count * self.slot_expert

    def kv(self, share: int) -> float:
        """Left for the KV cache with `share` experts held; negative where that does not fit."""
        return self.rest - share * self.expert - self.slots(share)

    def loads(self, share: int) -> bool:
        """Whether the share fits while it is loaded, when a layer of it is there twice but no slot and no KV cache is."""
        ends = self.paged.ends if self.paged is not None and self.in_pages(share) else self.ends
        return self.dense + ends + share * self.expert * (1 + 1 / self.layers) <= self.limit


@dataclass(frozen=True)
class Held:
    """A share, in experts of a layer, and what it means for the KV cache."""

    facts: MemoryFacts
    share: int

    @property
    def experts_per_rank(self) -> int | None:
        """The setting that gives this share; None, a partition, in place, where shares begin on pages."""
        return None if self.facts.slots_hold == "nothing" else self.share

    @property
    def kv(self) -> float:
        """Bytes that are left for the KV cache."""
        return self.facts.kv(self.share)

    @property
    def promised(self) -> float:
        """Bytes of KV cache to be measured by: the goal, or what the smallest share leaves of it."""
        return min(self.facts.goal, self.kv)

    @property
    def expert_cost(self) -> float:
        """Bytes of KV cache that one expert more takes."""
        facts = self.facts
        less = facts.slots_hold == "missing" or facts.in_pages(self.share)
        return facts.expert - (facts.slot_expert if less else 0)

    @property
    def all_fit(self) -> bool:
        """Whether a full replica would leave the KV cache its goal."""
        facts = self.facts
        return facts.rest - facts.experts * facts.expert >= facts.goal

    def describe(self) -> str:
        """One line: what was chosen, and what an expert more or less would cost in tokens of KV cache."""
        facts = self.facts
        line = f'experts_per_rank "auto": {self.share} of {facts.experts} experts'
        if facts.slots_hold == "nothing":
            line += ", a partition, since in place nothing is pulled and more would gain nothing"
        line += f"; about {_gib(self.kv)} left for the KV cache ({_tokens(self.kv, facts)} tokens), "
        line += "less than the goal of " if self.kv < facts.goal else "the goal is "
        line += f"{_gib(facts.goal)} ({_goal_is(facts)})"
        line += f"; one expert more costs, one less gives, {_tokens(self.expert_cost, facts)} tokens"
        if self.all_fit:
            line += f"; all {facts.experts} would fit: full replicas (--data-parallel-size without dwdp) are simpler"
        return line

    def figures(self) -> dict[str, float]:
        """The same as numbers: experts, bytes, tokens."""
        facts = self.facts
        return {
            "experts_per_rank": self.share,
            "kv": self.kv,
            "kv_tokens": self.kv / facts.kv_token,
            "kv_goal": facts.goal,
            "kv_tokens_per_expert": self.expert_cost / facts.kv_token,
            "all_fit": self.all_fit,
        }

    def shortfall(self, kv: float) -> str | None:
        """One line where profiling left `kv` bytes for the KV cache, below 90 % of what was promised; else None."""
        if kv >= KEPT * self.promised:
            return None
        line = (
            f'experts_per_rank "auto": profiling left {_gib(kv)} for the KV cache, where {_gib(self.promised)} were '
            "promised: activations or graphs take more than was estimated"
        )
        if self.expert_cost <= 0 or self.experts_per_rank is None or self.share == self.facts.least:
            return f"{line}; lower max_num_batched_tokens or use more ranks"
        fewer = math.ceil((self.promised - kv) / self.expert_cost)
        return f"{line}; about experts_per_rank {max(self.facts.least, self.share - fewer)} would keep it"


def choose(facts: MemoryFacts) -> Held:
    """The largest share in ceil(E/N)..E-1 that leaves the KV cache its goal, or else the smallest; in place the smallest.

    Raises DwdpError with the figures where the smallest leaves less than the user asked for, or than one request needs.
    """
    least = Held(facts, facts.least)
    if least.kv < facts.demand:
        raise DwdpError(
            f'experts_per_rank "auto": of {_gib(facts.limit)} even {least.share} of {facts.experts} experts leave '
            f"{_gib(max(0.0, least.kv))} for the KV cache, but {_gib(facts.demand)} is needed ({_demand_is(facts)}): "
            f"dense weights take {_gib(facts.dense)}, the share {_gib(least.share * facts.expert + facts.ends)}, slots "
            f"{_gib(facts.slots(least.share))}, activations and runtime about {_gib(facts.peak)}; use more ranks, or a "
            "smaller KV cache or max_model_len"
        )
    if facts.slots_hold == "nothing":
        return least
    fitting = (
        share
        for share in range(facts.experts - 1, least.share, -1)
        if facts.kv(share) >= facts.goal and facts.loads(share)
    )
    return Held(facts, next(fitting, least.share))


def _demand_is(facts: MemoryFacts) -> str:
    return "one request of max_model_len" if facts.kv_asked is None else "as asked for"


def _goal_is(facts: MemoryFacts) -> str:
    if facts.goal == facts.demand:
        return _demand_is(facts)
    return f"{KV_PART:.0%} of what dense weights and the estimated peak leave"


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def _tokens(nbytes: float, facts: MemoryFacts) -> str:
    return f"{int(nbytes / facts.kv_token):,}"
