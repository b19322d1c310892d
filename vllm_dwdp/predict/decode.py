"""Decode: a step of B tokens if all missing experts are pulled, are read where they are, only those hit are pulled, or
tokens travel to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.direct import LayerCosts, direct_tokens
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.hardware_file import Hardware
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.roofline import local_time
from vllm_dwdp.predict.strategies import (
    PLAIN,
    Options,
    balanced_share,
    dep,
    dispatch_element,
    exposed_pull,
    pull_bytes,
    tensor_parallel,
)
from vllm_dwdp.predict.travel import LAUNCHES_S, Few, TravelLayer, few_tokens
from vllm_dwdp.predict.work import decoding

#: As a launch has it that does not say.
TRAVEL_TOKENS: Final = DwdpConfig().travel_tokens


def popularity(experts: int, top_k: int, skew: float) -> Any:
    """[E] probability that a token hits each expert, most popular first; they add up to top_k and none exceeds 1.

    skew 0: uniform. Otherwise proportional to rank ** -skew (Zipf), with the excess over 1 spread over the rest.
    """
    if skew < 0:
        raise DwdpError(f"the skew of the experts' popularity is {skew}: it must not be negative (0 is uniform)")
    weights = np.arange(1, experts + 1, dtype=float) ** -skew
    chance = np.zeros(experts)
    certain = 0
    while certain < top_k:
        rest = weights[certain:] / weights[certain:].sum() * (top_k - certain)
        over = int((rest > 1).sum())
        if not over:
            chance[certain:] = rest
            break
        certain += over
    chance[:certain] = 1.0
    return chance


def expected_hit(chance: Any, tokens: int) -> float:
    """Expected distinct experts that `tokens` independent tokens hit, of those whose chances are given."""
    return float(np.sum(1 - (1 - np.asarray(chance)) ** tokens))


def layer_costs(model: MoeModel, hardware: Hardware, ranks: int, held: int, other_s: float = 0.0) -> LayerCosts:
    """One MoE layer of a rank that holds `held` experts, at the rates of `hardware`; as a rank measures it at start."""
    efficiency, missing = hardware.efficiency, model.experts - held
    link = hardware.pull_rate(ranks)
    return LayerCosts(
        experts=model.experts,
        missing=missing,
        top_k=model.top_k,
        expert_bytes=model.expert_bytes,
        pull_s=missing * model.expert_bytes / link,
        link=link,
        memory=hardware.memory_bandwidth * efficiency.memory,
        flops=hardware.rate(model.expert_format.compute) * efficiency.grouped,
        flop=2.0 * model.top_k * model.expert_params,
        other_s=other_s,
    )


def travel_layer(model: MoeModel, hardware: Hardware, ranks: int, costs: LayerCosts) -> TravelLayer:
    """The same where tokens travel."""
    return TravelLayer(costs, ranks, model.hidden, max(1.0, dispatch_element(model)))


def predicted_few(
    model: MoeModel,
    hardware: Hardware,
    ranks: int,
    share: int | None = None,
    *,
    view: str = "split",
    decode: str = "auto",
    travel_tokens: int = TRAVEL_TOKENS,
) -> Few:
    """Steps of how many tokens travel, and read directly, on a rank that measures what the planner predicts."""
    held = balanced_share(model.experts, ranks) if share is None else share
    costs = layer_costs(model, hardware, ranks, held)

    def layer() -> TravelLayer:
        return travel_layer(model, hardware, ranks, costs)

    return few_tokens(model, view, decode, travel_tokens, direct_tokens(costs), layer)


@dataclass(frozen=True)
class Decode:
    """Seconds of a decode step of `sequences` tokens on a rank. `pulled`: bytes of all layers for the step."""

    way: str
    seconds: float
    pulled: float
    tokens_per_gpu: float


def decode_steps(
    model: MoeModel,
    hardware: Hardware,
    ranks: int,
    sequences: int,
    context: int,
    *,
    share: int | None = None,
    cached: int = 0,
    skew: float = 0.0,
    travel: int = 0,
    options: Options = PLAIN,
) -> list[Decode]:
    """Each way to decode `sequences` requests per rank with `context` tokens each.

    cached: further experts per layer that a rank keeps, the most popular of those that it does not own. travel: most tokens
    of a step whose tokens travel, 0 for none.
    """
    held = balanced_share(model.experts, ranks) if share is None else share
    pull_bytes(model, ranks, held)
    if not 0 <= cached <= model.experts - held:
        raise DwdpError(
            f"a cache of {cached} experts: a rank that owns {held} of {model.experts} misses {model.experts - held}"
        )
    work = decoding(sequences, context)
    local = local_time(model, hardware, work, **vars(options))
    rate, layers, latency = hardware.pull_rate(ranks), model.moe_layers, hardware.link_latency
    launches = layers * LAUNCHES_S
    compute = float(local.total.mean()) + launches
    chance = popularity(model.experts, model.top_k, skew)
    # What is missing is spread evenly over the experts by popularity, and so as popular as all.
    count = model.experts - held
    missing = chance[(2 * np.arange(count) + 1) * model.experts // (2 * max(1, count))]

    def pulled_step(way: str, experts: float, hidden: bool) -> Decode:
        moved = experts * model.expert_bytes
        wire = moved / rate + (latency if experts else 0.0)
        layer = compute / layers
        # Copies that are hidden run on all the time.
        duty = 1.0 if hidden else wire / (layer + wire)
        seconds = layers * (layer + exposed_pull(hardware, wire, layer if hidden else 0.0, ranks, duty)[1])
        return Decode(way, seconds, moved * layers, sequences / seconds)

    other = compute - launches - float(local.grouped.mean())
    costs = layer_costs(model, hardware, ranks, held, other / layers)
    hits = expected_hit(missing, sequences)
    direct, seconds = hits * model.expert_bytes * layers, layers * costs.direct_s(sequences, hits) + launches
    steps = [
        pulled_step("DWDP, all experts", model.experts - held, hidden=True),
        Decode("DWDP, direct reads", seconds, direct, sequences / seconds),
        pulled_step("DWDP, on demand", expected_hit(missing, sequences), hidden=False),
    ]
    if cached:
        steps.append(
            pulled_step(f"DWDP, on demand, {cached} cached", expected_hit(missing[cached:], sequences), hidden=False)
        )
    if sequences <= travel:
        seconds = layers * travel_layer(model, hardware, ranks, costs).seconds(sequences)
        steps.append(Decode("DWDP, tokens travel", seconds, 0.0, sequences / seconds))
    group = dep(model, hardware, work, ranks, options=options)
    together = tensor_parallel(model, hardware, decoding(sequences * ranks, context), ranks, options=options)
    for step in (group, together):
        seconds = step.seconds + launches
        steps.append(Decode(step.way, seconds, 0.0, sequences / seconds))
    steps.append(Decode("DP (full replica)", compute, 0.0, sequences / compute))
    return steps
