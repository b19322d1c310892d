"""Up to how many tokens a forward reads missing experts where they are, instead of pulling them (pure).

    direct   max(missing experts that are hit / link, experts that are hit / memory, compute)
    pulled   max(gap + pull of the layer, experts that are hit / memory, compute)

A pull moves every missing expert, however few tokens there are, and hides behind the compute of the layer before; a direct
read moves what is hit, and hides behind nothing but the own experts of the same kernel. So few tokens read and many pull.
Distinct experts that tokens hit are expected ones, of a router that hits all equally: E * (1 - (1 - k/E)^tokens). What is
left out on both sides: the rest of the layer, behind which a pull hides too, and the launches that a CUDA graph spares.
"""

from dataclasses import dataclass
from typing import Any, Final

#: Part of the rate of large copies that kernels reach when they read over the same link: 0.93 in BF16 and 0.91 in FP8 from
#: 32 to 512 tokens over NVLink (docs/benchmarks/two-h100.md).
KERNEL_PART: Final = 0.9

#: Rows of an expert up to which one block of the kernel takes them all, so that a weight crosses the link once.
ROWS_IN_A_BLOCK: Final = 64

#: Between the release of a slot and the first byte of the next pull into it, the launch of a graph of copies: an estimate.
GAP_S: Final = 50e-6


def expected_hits(experts: int, top_k: int, tokens: Any, of: float | None = None) -> Any:
    """Distinct ones of `of` experts (all, if not given) that `tokens` tokens are expected to hit, of `experts` in all.

    tokens: a number, or an array of them, which gives an array.
    """
    return (experts if of is None else of) * (1.0 - (1.0 - top_k / experts) ** tokens)


@dataclass(frozen=True)
class LayerCosts:
    """One MoE layer on one rank.

    experts, missing: E, and those of them that are not resident. expert_bytes: of one expert.
    pull_s: of all missing experts. link, memory: bytes/s of copies from peers, and of own memory. flops: FLOP/s.
    flop: of one token in the layer's experts. other_s: of the rest of the layer, where it is known.
    """

    experts: int
    missing: int
    top_k: int
    expert_bytes: float
    pull_s: float
    link: float
    memory: float
    flops: float
    flop: float
    other_s: float = 0.0

    def local_s(self, tokens: int) -> float:
        """The experts' compute where all are resident."""
        read = expected_hits(self.experts, self.top_k, tokens) * self.expert_bytes / self.memory
        return float(max(read, tokens * self.flop / self.flops))

    def direct_s(self, tokens: int, hits: float | None = None) -> float:
        """The layer where missing experts are read from their owners. hits: those that are hit, of an uneven router."""
        if hits is None:
            hits = expected_hits(self.experts, self.top_k, tokens, self.missing)
        remote = float(hits * self.expert_bytes / (KERNEL_PART * self.link))
        return self.other_s + max(remote, self.local_s(tokens))

    def pulled_s(self, tokens: int) -> float:
        """The layer in a row of layers that are pulled."""
        return max(self.pull_s + GAP_S, self.other_s + self.local_s(tokens))

    def most_tokens(self) -> int:
        """The most tokens at which a weight is read once: the rows of an expert fit one block."""
        return max(1, ROWS_IN_A_BLOCK * self.experts // self.top_k)


def direct_tokens(costs: LayerCosts) -> int:
    """The most tokens up to which every forward is at least as fast direct as pulled; 0 where none is."""
    best = 0
    for tokens in _sizes(costs.most_tokens()):
        if costs.direct_s(tokens) > costs.pulled_s(tokens):
            break
        best = tokens
    return best


def _sizes(most: int) -> list[int]:
    """1, 2, 4, then in steps of 8 and of 16, as vLLM's sizes of CUDA graphs."""
    return [n for n in (1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)) if n <= most]
