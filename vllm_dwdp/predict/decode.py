"""Decode: what a step of B tokens costs if all missing experts are pulled, only those that are hit, or with a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.hardware_file import Hardware
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.roofline import local_time
from vllm_dwdp.predict.strategies import PLAIN, Options, balanced_share, dep, pull_bytes, tensor_parallel
from vllm_dwdp.predict.work import decoding


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
    options: Options = PLAIN,
) -> list[Decode]:
    """Each way to decode `sequences` requests per rank with `context` tokens each.

    cached: further experts per layer that a rank keeps, the most popular of those that it does not own.
    """
    held = balanced_share(model.experts, ranks) if share is None else share
    pull_bytes(model, ranks, held)
    if not 0 <= cached <= model.experts - held:
        raise DwdpError(
            f"a cache of {cached} experts: a rank that owns {held} of {model.experts} misses {model.experts - held}"
        )
    work = decoding(sequences, context)
    compute = float(local_time(model, hardware, work, **vars(options)).total.mean())
    rate, layers, latency = hardware.pull_rate(ranks), model.moe_layers, hardware.link_latency
    chance = popularity(model.experts, model.top_k, skew)
    # Owners hold every `ranks`-th expert by popularity: the missing ones are as popular as all.
    missing = np.sort(np.delete(chance, np.arange(0, model.experts, max(1, round(model.experts / held)))[:held]))[::-1]

    def pulled_step(way: str, experts: float, hidden: bool) -> Decode:
        moved = experts * model.expert_bytes
        wire = moved / rate + (latency if experts else 0.0)
        layer = compute / layers
        seconds = layers * (max(layer, wire) if hidden else layer + wire)
        return Decode(way, seconds, moved * layers, sequences / seconds)

    steps = [
        pulled_step("DWDP, all experts", model.experts - held, hidden=True),
        pulled_step("DWDP, on demand", expected_hit(missing, sequences), hidden=False),
    ]
    if cached:
        steps.append(
            pulled_step(f"DWDP, on demand, {cached} cached", expected_hit(missing[cached:], sequences), hidden=False)
        )
    group = dep(model, hardware, work, ranks, options=options)
    together = tensor_parallel(model, hardware, decoding(sequences * ranks, context), ranks, options=options)
    steps.append(Decode("DEP", group.seconds, 0.0, group.tokens_per_gpu))
    steps.append(Decode("TP", together.seconds, 0.0, together.tokens_per_gpu))
    steps.append(Decode("DP (full replica)", compute, 0.0, sequences / compute))
    return steps
