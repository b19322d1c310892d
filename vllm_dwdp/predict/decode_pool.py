"""Engines that only decode: what one does at a speed that users want, and how many a rate of requests takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vllm_dwdp.predict.hardware_file import Hardware
from vllm_dwdp.predict.memory_plan import UTILISATION, working_bytes
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.strategies import PLAIN, Options, data_parallel, dep, tensor_parallel
from vllm_dwdp.predict.travel import LAUNCHES_S
from vllm_dwdp.predict.work import decoding

#: Bytes/s of the KV cache from or to one GPU: a network card of 400 Gb/s for each.
TRANSFER_RATE: Final = "50 GB/s"
#: Requests of a rank that are looked at, and tokens of a step by which an engine's working memory goes.
_MOST_SEQUENCES: Final = 4096
_TOKENS: Final = 2048
#: Slots beyond the mean number of requests, in its standard deviations (arrivals at random).
_SPARE: Final = 2.0


@dataclass(frozen=True)
class DecodeEngine:
    """`ranks` GPUs run `way`; `sequences` requests of a rank (of the engine for TP) are the most at that speed and in that
    memory. step_s: seconds of a step with all of them."""

    way: str
    ranks: int
    sequences: int
    step_s: float

    @property
    def slots(self) -> int:
        """Requests of the engine."""
        return self.sequences * (1 if self.way == "TP" else self.ranks)

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens/s and GPU with all of them."""
        return self.slots / self.step_s / self.ranks

    def needed(self, rate: float, osl: int) -> int:
        """Engines for `rate` requests/s with `osl` tokens each, and some slots to spare."""
        running = rate * osl * self.step_s
        return max(1, math.ceil((running + _SPARE * math.sqrt(running)) / self.slots - 1e-9))


def decode_step_s(
    model: MoeModel, hardware: Hardware, way: str, ranks: int, sequences: int, context: float, options: Options = PLAIN
) -> float:
    """Of a step of 'DEP', 'TP' or 'DP'; sequences as in `DecodeEngine`."""
    work = decoding(sequences, context)
    if way == "DP":
        step = data_parallel(model, hardware, work, options=options)
    else:
        step = (dep if way == "DEP" else tensor_parallel)(model, hardware, work, ranks, options=options)
    return step.seconds + model.moe_layers * LAUNCHES_S


def sequences_in_memory(
    model: MoeModel,
    hardware: Hardware,
    way: str,
    ranks: int,
    tokens: int,
    options: Options = PLAIN,
    utilisation: float = UTILISATION,
) -> int:
    """Requests of `tokens` whose KV cache a rank holds (of the engine for TP)."""
    experts = model.experts * model.expert_bytes * model.moe_layers
    weights = (model.replicated_bytes + experts) / ranks if way == "TP" else model.replicated_bytes + experts / ranks
    left = hardware.memory * utilisation - weights - working_bytes(model, _TOKENS)
    attention = model.groups[0].attention
    # Heads are split; MLA's latent cache has none.
    split = min(ranks, attention.kv_heads) if way == "TP" and attention.kv_rank is None else 1
    return max(0, int(left * split / model.kv_bytes(tokens, options.kv_element)))


def _candidates(model: MoeModel, hardware: Hardware) -> Iterator[tuple[str, int]]:
    yield "DP", 1
    ranks = 2
    while ranks <= min(hardware.max_ranks, model.experts):
        yield "DEP", ranks
        if model.groups[0].attention.heads % ranks == 0:
            yield "TP", ranks
        ranks *= 2


def decode_engines(
    model: MoeModel,
    hardware: Hardware,
    isl: float,
    osl: int,
    tokens_per_user: float,
    options: Options = PLAIN,
    utilisation: float = UTILISATION,
) -> list[DecodeEngine]:
    """Every engine that gives each user that many tokens/s, with as many requests as it can; requests of `isl` and `osl`
    tokens, half of the answer there on average."""
    found = []
    for way, ranks in _candidates(model, hardware):
        whole = sequences_in_memory(model, hardware, way, ranks, math.ceil(isl + osl), options, utilisation)

        def step_s(sequences: int, way: str = way, ranks: int = ranks) -> float:
            return decode_step_s(model, hardware, way, ranks, sequences, isl + osl / 2, options)

        low, high = 0, min(whole, _MOST_SEQUENCES) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if step_s(middle) * tokens_per_user <= 1 else (low, middle)
        if low:
            found.append(DecodeEngine(way, ranks, low, step_s(low)))
    return found
