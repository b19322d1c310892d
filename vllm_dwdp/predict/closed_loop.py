"""A DWDP launch under a closed loop: as many requests at a time all along, each with a prompt and an answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from vllm_dwdp.direct import LayerCosts
from vllm_dwdp.predict.decode import TRAVEL_TOKENS, layer_costs, predicted_few, travel_layer
from vllm_dwdp.predict.hardware_file import Hardware
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.roofline import local_time
from vllm_dwdp.predict.strategies import dwdp
from vllm_dwdp.predict.travel import LAUNCHES_S
from vllm_dwdp.predict.work import Lengths, decoding, prefill

_ROUNDS: Final = 8


@dataclass(frozen=True)
class Loop:
    """`concurrency` requests at a time over all ranks, of `isl` tokens with answers of `osl`."""

    concurrency: float
    isl: int
    osl: int


class LoopRates(NamedTuple):
    """tokens_per_s: input and output, of all ranks. decode_s, prompt_s: of a step that only decodes, of one that admits a
    prompt. between_s: mean between two tokens of a request."""

    tokens_per_s: float
    decode_s: float
    prompt_s: float
    between_s: float


def closed_loop(
    model: MoeModel,
    hardware: Hardware,
    ranks: int,
    loop: Loop,
    *,
    share: int,
    decode: str = "auto",
    travel_tokens: int = TRAVEL_TOKENS,
) -> LoopRates:
    """Each request is admitted by a step with its prompt, in which the others of its rank get a token too; all other steps
    decode. Fewer requests than ranks leave the other ranks idle. travel_tokens: a step with a prompt may travel too."""
    busy = min(float(ranks), loop.concurrency)
    each = loop.concurrency / busy
    few = predicted_few(model, hardware, ranks, share, decode=decode, travel_tokens=travel_tokens)
    layers = model.moe_layers
    local = local_time(model, hardware, decoding(max(1, round(each)), loop.isl + loop.osl / 2))
    costs = layer_costs(model, hardware, ranks, share, float(local.total.mean() - local.grouped.mean()) / layers)
    work = prefill(Lengths(loop.isl), loop.isl)
    admits = dwdp(model, hardware, work, ranks, share)
    admitting = loop.isl + round(each) - 1  # tokens of a step with a prompt
    alone = local_time(model, hardware, work)
    prompt_costs = replace(costs, other_s=float(alone.total.mean() - alone.grouped.mean()) / layers)

    def travels_s(of: LayerCosts, tokens: float, prompts: float) -> float:
        return layers * travel_layer(model, hardware, ranks, of).seconds(tokens, idle=busy < ranks, prompts=prompts)

    def prompt_s(prompts: float) -> float:
        return travels_s(prompt_costs, admitting, prompts) if admitting <= few.travel else admits.seconds

    def step_s(prompts: float) -> float:
        way = few.way(round(each))
        if way == "travel":
            return travels_s(costs, each, prompts)
        return layers * ((costs.direct_s if way == "direct" else costs.pulled_s)(round(each)) + LAUNCHES_S)

    # Prompts that owners compute make requests late, and those make the share of prompts smaller.
    prompts, decode_s, admit_s, turn = 0.0, 0.0, 0.0, 1.0
    for _ in range(_ROUNDS):
        decode_s, admit_s = step_s(prompts), prompt_s(prompts)
        turn = each * admit_s + max(0.0, loop.osl - each) * decode_s
        prompts = 0.0 if busy < ranks else each * admits.compute / turn
    tokens = loop.concurrency * (loop.isl + loop.osl) / turn
    return LoopRates(tokens, decode_s, admit_s, turn / loop.osl)
