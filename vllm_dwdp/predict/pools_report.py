"""What `vllm-dwdp plan --disaggregated` prints."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any, Final

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.decode_pool import TRANSFER_RATE
from vllm_dwdp.predict.plan_report import percent, table
from vllm_dwdp.predict.pools import PoolRequest, Pools, pools
from vllm_dwdp.predict.units import parse_quantity, show_bytes, show_count, show_time
from vllm_dwdp.predict.verdict import Case

#: Flags that mean something with --disaggregated only, and what they are then by default.
FLAGS: Final[dict[str, Any]] = {"rate": None, "ttft": "2 s", "tokens_per_user": 20.0, "transfer_rate": TRANSFER_RATE}


#: Flags that say how one launch decodes; pools decode with engines of their own, without DWDP.
OF_ONE_LAUNCH: Final[dict[str, Any]] = {
    "decode_sequences": 64,
    "skew": 0.0,
    "cached_experts": 0,
    "decode": DwdpConfig().decode,
    "travel_tokens": DwdpConfig().travel_tokens,
}


def pool_request(args: argparse.Namespace, case: Case) -> PoolRequest | None:
    """What was asked; None without --disaggregated. Raises DwdpError for flags that do not go together."""
    given = {key: getattr(args, key) for key in FLAGS if getattr(args, key) is not None}
    if not args.disaggregated:
        for key in given:
            name = key.replace("_", "-")
            raise DwdpError(f"--{name} is of disaggregated serving: add --disaggregated, or leave it out")
        return None
    if "rate" not in given:
        raise DwdpError("--disaggregated needs --rate, the requests per second of all users together")
    if args.plot:
        raise DwdpError(f"--plot {args.plot}: pools have no picture; leave it or --disaggregated out")
    for key, usual in OF_ONE_LAUNCH.items():
        if (told := getattr(args, key)) != usual:
            raise DwdpError(
                f"--{key.replace('_', '-')} {told} says how a launch decodes, and with --disaggregated others do: leave "
                "one of them out"
            )
    values = {**FLAGS, **given}
    return PoolRequest(
        case=case,
        rate=values["rate"],
        ttft_s=parse_quantity(values["ttft"], "seconds", "--ttft"),
        tokens_per_user=values["tokens_per_user"],
        transfer=parse_quantity(values["transfer_rate"], "bytes/s", "--transfer-rate"),
    )


def _line(way: str, found: Pools | str) -> list[Any]:
    if isinstance(found, str):
        return [f"{way} prefill", "-", "-", "-", "-", "-", "-", "-"]
    decode = f"{found.engines} x {found.decode.way}{found.decode.ranks}"
    return [
        f"{way} prefill", f"{found.groups} x {way}{found.prefill.ranks}", f"{found.load:.0%}", decode, found.gpus,
        show_time(found.ttft_s), f"{found.tokens_per_gpu:,.0f}", f"{found.prefill_limit:,.0f}",
    ]  # fmt: skip


def pools_text(request: PoolRequest) -> str:
    """For a terminal, at most 110 columns."""
    case, found = request.case, pools(request)
    head = (
        f"{case.model.name} on {case.hardware.name}: {request.rate:g} requests/s of {show_count(case.lengths.mean)} tokens, "
        f"{show_count(case.osl)} out; first token after {show_time(request.ttft_s)} on average at most, "
        f"{request.tokens_per_user:g} tokens/s for each user"
    )
    lines: list[list[Any]] = [
        ["", "prefill", "load", "decode", "GPUs", "TTFT", "output tokens/s/GPU", "prefill alone could"]
    ]
    lines += [_line(way, pool) for way, pool in found.items()]
    parts = [textwrap.fill(head, 110, subsequent_indent="  "), "", table(lines)]
    sized = {way: pool for way, pool in found.items() if isinstance(pool, Pools)}
    parts += [f"  {way}: {pool}." for way, pool in found.items() if isinstance(pool, str)]
    if len(sized) == len(found):
        gain = sized["DWDP"].tokens_per_gpu / sized["DEP"].tokens_per_gpu
        parts.append(f"  DWDP over DEP as prefill: {percent(gain)} output tokens/s/GPU.")
    decode = next(iter(sized.values())).decode
    each = "an engine" if decode.way == "TP" else "a rank"
    moved = show_bytes(request.transfer_s * request.transfer)
    parts += [
        f"  Decode: up to {decode.sequences} requests {each}, {show_time(decode.step_s)} a step, "
        f"{decode.tokens_per_gpu:,.0f} tokens/s/GPU when full.",
        f"  A prompt's KV cache, {moved}, moves in {show_time(request.transfer_s)}.",
    ]
    return "\n".join(parts)


def pools_json(request: PoolRequest) -> dict[str, Any]:
    """The same as numbers; seconds, bytes, tokens."""
    case = request.case
    return {
        "model": case.model.name,
        "hardware": case.hardware.name,
        "rate": request.rate,
        "isl": case.lengths.mean,
        "osl": case.osl,
        "ttft_s": request.ttft_s,
        "tokens_per_user": request.tokens_per_user,
        "transfer_s": request.transfer_s,
        "pools": {
            way: {"reason": pool} if isinstance(pool, str) else pool.figures() for way, pool in pools(request).items()
        },
    }
