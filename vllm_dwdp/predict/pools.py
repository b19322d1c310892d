"""Disaggregated serving: how many GPUs compute prompts, under DWDP and under DEP, and how many decode, for a load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.decode_pool import DecodeEngine, decode_engines
from vllm_dwdp.predict.prefill_pool import PrefillGroup, prefill_group
from vllm_dwdp.predict.units import show_time
from vllm_dwdp.predict.verdict import Case, others_that_fit

WAYS: Final = ("DWDP", "DEP")


@dataclass(frozen=True)
class PoolRequest:
    """case: of prefill; its `osl` are the tokens of an answer. rate: requests/s of all. ttft_s: the most mean seconds to the
    first token. tokens_per_user: the least tokens/s that each user gets. transfer: bytes/s of the KV cache from one GPU."""

    case: Case
    rate: float
    ttft_s: float
    tokens_per_user: float
    transfer: float

    @property
    def transfer_s(self) -> float:
        """Seconds in which the KV cache of a prompt moves."""
        case = self.case
        return case.model.kv_bytes(case.lengths.mean, case.options.kv_element) / self.transfer


@dataclass(frozen=True)
class Pools:
    """What one way of prefill needs. groups: of prefill. engines: of decode. ttft_s: mean seconds to the first token."""

    prefill: PrefillGroup
    groups: int
    decode: DecodeEngine
    engines: int
    ttft_s: float
    rate: float
    osl: int

    @property
    def prefill_gpus(self) -> int:
        """GPUs that compute prompts."""
        return self.groups * self.prefill.ranks

    @property
    def decode_gpus(self) -> int:
        """GPUs that decode."""
        return self.engines * self.decode.ranks

    @property
    def gpus(self) -> int:
        """All."""
        return self.prefill_gpus + self.decode_gpus

    @property
    def tokens_per_gpu(self) -> float:
        """Output tokens/s over all GPUs."""
        return self.rate * self.osl / self.gpus

    @property
    def prefill_limit(self) -> float:
        """Output tokens/s per GPU of prefill that it could feed."""
        return self.prefill.prompts_per_s / self.prefill.ranks * self.osl

    @property
    def load(self) -> float:
        """Share of what the prefill pool can compute that is asked for."""
        return self.rate / self.groups / self.prefill.prompts_per_s

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "prefill": {"way": self.prefill.way, "ranks": self.prefill.ranks, "groups": self.groups,
                        "gpus": self.prefill_gpus, "load": self.load, "limit_tokens_per_gpu": self.prefill_limit},
            "decode": {"way": self.decode.way, "ranks": self.decode.ranks, "engines": self.engines,
                       "gpus": self.decode_gpus, "sequences": self.decode.sequences, "step_s": self.decode.step_s,
                       "limit_tokens_per_gpu": self.decode.tokens_per_gpu},
            "gpus": self.gpus,
            "ttft_s": self.ttft_s,
            "tokens_per_gpu": self.tokens_per_gpu,
        }  # fmt: skip


def decode_for(request: PoolRequest) -> tuple[DecodeEngine, int]:
    """(the engine that takes the fewest GPUs, how many of them); raises DwdpError where none is fast enough."""
    case, osl = request.case, request.case.osl
    isl, options, model = case.lengths.mean, case.options, case.model
    found = decode_engines(model, case.hardware, isl, osl, request.tokens_per_user, options, case.utilisation)
    if not found:
        raise DwdpError(
            f"no engine on {case.hardware.name} decodes one request of {model.name} at {request.tokens_per_user:g} tokens/s "
            "in its memory: lower --tokens-per-user, or take a smaller format or a larger chip"
        )
    # Of equally many GPUs, the engine that could do more.
    best = min(found, key=lambda engine: (engine.needed(request.rate, osl) * engine.ranks, -engine.tokens_per_gpu))
    return best, best.needed(request.rate, osl)


def pools(request: PoolRequest, prefill: Mapping[str, PrefillGroup] | None = None) -> dict[str, Pools | str]:
    """By way of prefill: what it needs, or why no number of GPUs does. prefill: groups of the case, where they are known.
    Raises DwdpError where nothing can do."""
    case = request.case
    decode, engines = decode_for(request)
    # The engine that decodes computes the first token too.
    after = request.transfer_s + decode.step_s
    least_kv = math.ceil(case.lengths.isl)
    fits = {*others_that_fit(case, least_kv), *(["DWDP"] if case.memory().kv_tokens >= least_kv else [])}
    found: dict[str, Pools | str] = {}
    for way in WAYS:
        if way not in fits:
            found[way] = f"a rank of {case.ranks} has no room for a prompt"
            continue
        group = prefill[way] if prefill else prefill_group(case, way)
        groups = group.needed(request.rate, request.ttft_s - after)
        if groups is None:
            found[way] = f"a prompt alone takes {show_time(group.ttft_s(0) + after)} to its first token"
            continue
        ttft = group.ttft_s(request.rate / groups) + after
        found[way] = Pools(group, groups, decode, engines, ttft, request.rate, case.osl)
    if all(isinstance(pool, str) for pool in found.values()):
        why = "; ".join(f"{way}: {pool}" for way, pool in found.items())
        if not fits & set(WAYS):
            raise DwdpError(f"no number of GPUs will do ({why}): add --ranks, or take a smaller format")
        raise DwdpError(f"no number of GPUs meets --ttft {show_time(request.ttft_s)} ({why}): raise it, or add --ranks")
    return found
