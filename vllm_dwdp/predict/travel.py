"""Decode steps whose tokens travel: what a layer takes, and how a launch gets at missing experts, by tokens of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from vllm_dwdp.direct import LayerCosts, expected_hits
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.model import MoeModel

# Seconds, from the layer bench on two H100s and two H200s: medians of what `python -m ci.report.travel` prints. Engines are
# held out.
#: Of a MoE layer's kernels beyond what bytes and FLOP take, where all is local.
LAUNCHES_S: Final = 23.2e-6
#: Of a request, beside that: to ask, to notice, to wait, to merge.
REQUEST_S: Final = 24.4e-6
#: That a request waits for blocks of an owner which computes a prompt.
PROMPT_S: Final = 426.5e-6
#: Of what a direct read of few experts takes, what LayerCosts says of it: their blocks do not fill a link. 0.63 to 0.84 on
#: two H100s that both read, with 112 of 128 experts held and 8 to 64 tokens.
READ_PART: Final = 0.75
#: Tokens of the largest forward that reads though owners could compute: one was measured, and at eight reads are slower than
#: READ_PART allows for.
MOST_READ: Final = 2
#: Beyond what direct reads would take, a requester waits so long (layers/travel.py).
_BESIDE_S: Final = 100e-6
#: Experts that owners compute for others.
FORMATS: Final = ("bf16", "fp16", "fp32", "fp8_block")


def why_not(model: MoeModel, view: str) -> str | None:
    """None where tokens of that model can travel, as far as its config tells; else why they cannot."""
    if view == "contiguous":
        return "with the contiguous view every forward pulls"
    if model.expert_format.name not in FORMATS:
        return f"experts are {model.expert_format.name}, not one of {', '.join(FORMATS)}"
    return None


class Few(NamedTuple):
    """Most tokens of a step whose tokens travel, and of one that reads directly; larger ones pull. why: none travel. first:
    the least of a step whose tokens travel."""

    travel: int
    direct: int
    why: str | None = None
    first: int = 1

    def way(self, tokens: int) -> Literal["travel", "direct", "pulled"]:
        """Of a step of `tokens`."""
        if self.first <= tokens <= self.travel:
            return "travel"
        return "direct" if tokens <= self.direct else "pulled"

    def lines(self, ranks: int) -> list[str]:
        """For the report of a plan with so many ranks."""
        does = "pulls in every step"
        if self.direct:
            does = f"reads directly in steps of at most {self.direct:,} tokens a rank"
            if self.travel:
                span = f"{self.first:,} to {self.travel:,}" if self.first > 1 else f"at most {self.travel:,}"
                does = f"has tokens travel in steps of {span} tokens a rank"
                does += ", reads directly in smaller ones" if self.first > 1 else ""
                does += f", reads directly up to {self.direct:,}" if self.direct > self.travel else ""
            does += ", and pulls in larger ones"
        said = [f"  DWDP {does}."]
        if self.why is not None:
            said.append(f"  Tokens do not travel: {self.why}.")
        if self.travel and ranks > 4:
            said.append("  What travels was measured on two and four ranks only.")
        return said


def few_tokens(
    model: MoeModel, view: str, decode: str, travel_tokens: int, direct: int, layer: Callable[[], TravelLayer]
) -> Few:
    """As a launch decides by its settings; `direct`: up to how many tokens reads are faster than pulls. layer: one of its
    MoE layers, asked where it matters.

    Raises DwdpError where tokens should travel and cannot.
    """
    why = why_not(model, view)
    if decode == "travel" and why is not None:
        raise DwdpError(f"--decode travel, but {why}: use auto or direct")
    direct = 0 if view == "contiguous" else direct
    if decode == "direct":
        return Few(0, direct, "as --decode direct asks")
    if why is not None:
        return Few(0, direct, why)
    first = 1 if decode == "travel" else first_to_travel(layer(), travel_tokens)
    return Few(travel_tokens, max(direct, travel_tokens), first=first)


@dataclass(frozen=True)
class TravelLayer:
    """One MoE layer of a group of `ranks`; costs.other_s counts. hidden: values of a token; element: bytes of one as it
    travels to an owner; rows come back in 2 bytes."""

    costs: LayerCosts
    ranks: int
    hidden: int
    element: float

    def _experts_s(self, tokens: float, experts: float) -> float:
        """Of the work that one rank's tokens bring to `experts` of the layer."""
        costs = self.costs
        read = expected_hits(costs.experts, costs.top_k, tokens, experts) * costs.expert_bytes / costs.memory
        return float(max(read, tokens * costs.flop * experts / costs.experts / costs.flops))

    def _fixed_s(self, tokens: float) -> float:
        costs = self.costs
        if not costs.missing:
            return LAUNCHES_S
        there = (self.ranks - 1) * tokens * self.hidden * self.element
        back = tokens * costs.top_k * costs.missing / costs.experts * self.hidden * 2.0
        return LAUNCHES_S + REQUEST_S + (there + back) / costs.link

    def seconds(self, tokens: float, *, idle: bool = False, prompts: float = 0.0) -> float:
        """Of the layer for `tokens` of each rank. idle: owners have nothing of their own to do, and nobody else asks.
        prompts: share of the time in which owners compute prompts."""
        costs = self.costs
        own = self._experts_s(tokens, costs.experts - costs.missing)
        # Of every owner by each of the others: as much as a rank asks for in all.
        served = self._experts_s(tokens, costs.missing)
        work = max(own, served / (self.ranks - 1)) if idle else own + served
        layer = costs.other_s + self._fixed_s(tokens) + work
        direct = costs.direct_s(round(tokens)) + LAUNCHES_S
        late = 2 * direct - costs.other_s + _BESIDE_S
        return layer + prompts * (min(layer + PROMPT_S, max(late, layer)) - layer)


def first_to_travel(layer: TravelLayer, most: int) -> int:
    """Least tokens of a forward that has owners compute; fewer are faster read where they are. `most` at most.

    So where nearly all experts are held and a forward of one token or two misses hardly one. costs.other_s is 0.
    """
    end = min(most, MOST_READ + 1)
    for tokens in range(1, end):
        if layer.costs.direct_s(tokens) + LAUNCHES_S > READ_PART * layer.seconds(tokens):
            return tokens
    return end
