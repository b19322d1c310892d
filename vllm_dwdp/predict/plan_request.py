"""The arguments of `vllm-dwdp plan` -> a checked case."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from vllm_dwdp.config import AUTO
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hold import choose
from vllm_dwdp.predict.decode import TRAVEL_TOKENS, predicted_few
from vllm_dwdp.predict.formats import KV_BYTES
from vllm_dwdp.predict.hardware_file import load_hardware
from vllm_dwdp.predict.read_config import load_model
from vllm_dwdp.predict.strategies import Options
from vllm_dwdp.predict.travel import Few
from vllm_dwdp.predict.verdict import Case, check_case
from vllm_dwdp.predict.work import Lengths


@dataclass(frozen=True)
class PlanRequest:
    """What `plan` was asked. decode, travel_tokens: as in `DwdpConfig`."""

    case: Case
    decode_sequences: int
    cached_experts: int
    skew: float
    decode: str = "auto"
    travel_tokens: int = TRAVEL_TOKENS

    def few(self) -> Few:
        """Of how many tokens a step travels, or reads directly; raises DwdpError where tokens should travel and cannot."""
        case = self.case
        return predicted_few(
            case.model, case.hardware, case.ranks, case.share, view=case.view, decode=self.decode,
            travel_tokens=self.travel_tokens,
        )  # fmt: skip


def case_of(args: argparse.Namespace) -> PlanRequest:
    """Read model and hardware, and check the case; raises DwdpError."""
    if args.isl_std and args.length_ratio != 1.0:
        raise DwdpError(
            f"--isl-std {args.isl_std:g} and --length-ratio {args.length_ratio:g}: they are two ways to spread lengths; "
            "give one"
        )
    case = Case(
        model=load_model(args.model, args.expert_format, args.linear_format),
        hardware=load_hardware(args.hardware),
        ranks=args.ranks,
        lengths=Lengths(args.isl, args.length_ratio, args.isl_std),
        tokens=args.tokens_per_step,
        share=None if args.experts_per_rank == AUTO else args.experts_per_rank,
        view=args.weight_view,
        num_slots=args.num_slots,
        cached=args.prefix_cache_hits,
        options=Options(kv_element=KV_BYTES[args.kv_cache_dtype]),
        osl=args.osl,
        utilisation=args.gpu_memory_utilization,
    )
    check_case(case)
    if args.experts_per_rank == AUTO:
        case = replace(case, share=choose(case.facts()).share)
    request = PlanRequest(case, args.decode_sequences, args.cached_experts, args.skew, args.decode, args.travel_tokens)
    request.few()
    return request
