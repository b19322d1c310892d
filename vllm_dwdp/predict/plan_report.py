"""What `vllm-dwdp plan` prints: a verdict, memory, the window, crossovers, decode."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hold import Held, choose
from vllm_dwdp.predict.decode import decode_steps
from vllm_dwdp.predict.hardware_file import Hardware
from vllm_dwdp.predict.memory_plan import MemoryPlan, largest_kv, smallest_group
from vllm_dwdp.predict.plan_request import PlanRequest
from vllm_dwdp.predict.strategies import Step, balanced_share, rate_at_once
from vllm_dwdp.predict.units import show_bytes, show_count, show_time
from vllm_dwdp.predict.verdict import (
    Case,
    Verdict,
    crossover_share,
    crossover_tokens,
    group_sizes,
    judge,
    others_that_fit,
)

WAYS = ("DWDP", "DEP", "TP", "DP")


def table(lines: list[list[Any]], indent: str = "  ") -> str:
    """Columns, the first to the left and the others to the right; the first line is the heading."""
    cells = [[str(c) for c in line] for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    out = []
    for line in cells:
        rest = (c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))
        out.append(indent + "  ".join([line[0].ljust(widths[0]), *rest]).rstrip())
    return "\n".join(out)


def percent(gain: float, error: float | None = None) -> str:
    """'+12 %', '-3 % +- 6'; beyond a doubling '3.1x'."""
    if gain >= 2:
        return f"{gain:.1f}x"
    return f"{(gain - 1) * 100:+.0f} %" + ("" if error is None else f" +- {error * 100:.0f}")


def headline(case: Case, v: Verdict) -> str:
    """One sentence with the recommendation."""
    where = f"{case.model.name} on {case.ranks} x {case.hardware.name}, {show_count(case.tokens)} tokens per step"
    if v.gain == 0:
        return f"DWDP: do not use it here ({where}): {v.reason}."
    if v.answer == "use it":
        against = (
            "the only way that fits; against DEP it would be" if v.reason.startswith("no other") else f"over {v.best}"
        )
        return f"DWDP: use it ({where}): {against} {percent(v.gain, v.error)} tokens/s/GPU."
    if v.answer == "marginal":
        return (
            f"DWDP: marginal ({where}): {percent(v.gain, v.error)} tokens/s/GPU over {v.best}, within the uncertainty."
        )
    return f"DWDP: do not use it here ({where}): {percent(v.gain, v.error)} tokens/s/GPU over {v.best}."


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 110, subsequent_indent="  ")


def plan_text(request: PlanRequest) -> str:
    """The report for a terminal, at most 110 columns."""
    case = request.case
    m = case.model
    v = judge(case)
    parts = [_wrapped(headline(case, v))]
    if v.gain:
        parts.append(_wrapped(f"  Why: {v.reason}."))
    if v.knob:
        parts.append(_wrapped(f"  Instead: {v.knob}."))
    parts += [
        "",
        f"Model: {m.total_params / 1e9:.1f} B parameters, {m.active_params / 1e9:.1f} B active; {m.moe_layers} of "
        f"{m.layers} layers route to {m.top_k} of {m.experts} experts; {m.attention_kind}",
        f"  experts {m.expert_format.name} ({m.expert_bytes / 1e6:.1f} MB each), attention {m.attention_format.name}, "
        f"other products {m.mlp_format.name}",
        "",
        f"Memory of a rank (limit {show_bytes(case.memory().limit)}, view {case.view}, {case.num_slots} slots)",
        _memory_table(case),
        _wrapped(_memory_summary(case)),
        "",
        _wrapped(f"One prefill step ({_lengths(case)}; mean over a rank)"),
        _step_table(case),
        "",
        "The window (per MoE layer) and the crossover",
        *_window_lines(case),
        "",
        f"Decode, {request.decode_sequences} requests a rank at {show_count(case.lengths.isl)} tokens of context",
        _decode_table(request),
        *request.few().lines(case.ranks),
    ]
    return "\n".join(parts)


def _lengths(case: Case) -> str:
    text = f"prompts of {show_count(case.lengths.isl)} tokens"
    if case.lengths.std:
        text += f", standard deviation {case.lengths.std:.0f}"
    elif case.lengths.ratio < 1:
        text += f", uniform from {case.lengths.ratio:g} of that"
    return text + (f", {case.cached:.0%} of each in the prefix cache" if case.cached else "")


def _plans(case: Case) -> list[MemoryPlan]:
    plans = [case.memory(1)]
    for ranks in group_sizes(case):
        least = balanced_share(case.model.experts, ranks)
        shares = {case.share if ranks == case.ranks and case.share else least}
        plans += [case.memory(ranks, share) for share in sorted(shares)]
    return plans


def _memory_table(case: Case) -> str:
    lines: list[list[Any]] = [["ranks", "experts", "replicated", "share", "slots", "working", "KV left", "KV tokens"]]
    for p in _plans(case):
        mark = " <" if p.ranks == case.ranks else ""
        fits = p.kv >= 0
        lines.append([
            f"{p.ranks}{mark}" if p.ranks > 1 else "1 (replica)", p.share_experts, show_bytes(p.replicated),
            show_bytes(p.share), show_bytes(p.slots), show_bytes(p.working),
            show_bytes(p.kv) if fits else "does not fit", show_count(p.kv_tokens) if fits else "-",
        ])  # fmt: skip
    return table(lines)


def _memory_summary(case: Case) -> str:
    plans, need = _plans(case), case.lengths.isl + case.osl
    least, most = smallest_group(plans, need), largest_kv(plans)
    if least is None:
        return f"  No group on {case.hardware.name} holds one request of {show_count(need)} tokens."
    small = "A full replica fits" if least.ranks == 1 else f"The smallest group that fits has {least.ranks} ranks"
    text = f"  {small} (one request of {show_count(need)} tokens); the largest KV cache is {show_bytes(most.kv)} at "
    text += f"{most.ranks} ranks." if most.ranks > 1 else "a full replica."
    if (held := held_by_auto(case)) is not None:
        text += f" With {held.describe()}."
    return text


def held_by_auto(case: Case) -> Held | None:
    """What `experts_per_rank: "auto"` would hold; None where not even a partition fits."""
    try:
        return choose(case.facts())
    except DwdpError:
        return None


def _step_table(case: Case) -> str:
    heads = [
        "",
        "attention",
        "experts",
        "dense",
        "others",
        "comm.",
        "sync",
        "merge",
        "exposed",
        "step",
        "tokens/s/GPU",
        "DWDP",
    ]
    lines: list[list[Any]] = [heads]
    fitting = {"DWDP", *others_that_fit(case, case.lengths.isl + case.osl)}
    base = case.step("DWDP")
    for way in WAYS:
        s = case.step(way)
        cells = (s.attention, s.grouped, s.dense, s.others, s.communication, s.synchronisation, s.merge, s.exposed)
        lines.append([
            way if way in fitting else f"{way} (no room)", *(_ms(x) for x in cells), f"{s.seconds * 1e3:.1f} ms",
            f"{s.tokens_per_gpu:,.0f}", "" if way == "DWDP" else percent(base.tokens_per_gpu / s.tokens_per_gpu),
        ])  # fmt: skip
    return table(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds else "-"


def _window_lines(case: Case) -> list[str]:
    s: Step = case.step("DWDP")
    state = "hidden" if s.exposed <= 0.001 * s.seconds else f"{show_time(s.exposed)} of a step exposed"
    moved = (case.model.experts - case.memory().share_experts) * case.model.expert_bytes
    at_once = f"{rate_at_once(case.hardware, case.ranks):.2f} of that while all {case.ranks} pull"
    apart = case.hardware.topology == "mesh"
    known = "not measured: a link for each pair" if apart else "not measured: the paper's model"
    known = "measured" if case.ranks in case.hardware.at_once else known
    lines = [
        f"  window {show_time(s.window)}, pull {show_time(s.pull_layer)} ({show_bytes(moved)} at "
        f"{show_bytes(case.hardware.pull_rate(case.ranks))}/s): {state}",
        f"  a rank alone pulls at that rate, and at {at_once} ({known})",
    ]
    for over in ("DEP", "TP", "DP"):
        tokens = crossover_tokens(case, over)
        text = (
            "nowhere up to 256K tokens" if tokens is None else f"from {show_count(tokens)} tokens per rank and step on"
        )
        line = f"  ahead of {over}: {text}"
        if over != "DP" and (tokens is None or tokens > case.tokens):
            share = crossover_share(case, over)
            if share is not None:
                line += f"; at {show_count(case.tokens)} tokens, with {share} experts per rank or more"
        lines.append(line)
    sizes = [n for n in group_sizes(case) if n <= 16 or n == case.ranks]
    gains = []
    for n in sizes:
        other = case if n == case.ranks else _resized(case, n)
        gains.append(f"{n}: {percent(other.gain('DEP'))}")
    lines.append(_wrapped("  over DEP by ranks: " + ", ".join(gains)))
    return lines


def _resized(case: Case, ranks: int) -> Case:
    from dataclasses import replace

    return replace(case, ranks=ranks, share=None)


def _decode_table(request: PlanRequest) -> str:
    lines: list[list[Any]] = [["", "pulled per step", "step", "tokens/s/user", "tokens/s/GPU"]]
    for d in _decode(request):
        lines.append([
            d.way, show_bytes(d.pulled) if d.pulled else "-", show_time(d.seconds), f"{1 / d.seconds:,.1f}",
            f"{d.tokens_per_gpu:,.0f}",
        ])  # fmt: skip
    return table(lines)


def _decode(request: PlanRequest) -> Any:
    case = request.case
    return decode_steps(
        case.model, case.hardware, case.ranks, request.decode_sequences, case.lengths.isl, share=case.share,
        cached=request.cached_experts, skew=request.skew, travel=request.few().travel, options=case.options,
    )  # fmt: skip


def plan_json(request: PlanRequest) -> dict[str, Any]:
    """The same as numbers; seconds, bytes, tokens."""
    case, v = request.case, judge(request.case)
    return {
        "model": case.model.name,
        "hardware": case.hardware.name,
        "ranks": case.ranks,
        "tokens_per_step": case.tokens,
        "verdict": {k: (None if isinstance(x, float) and math.isnan(x) else x) for k, x in v._asdict().items()},
        "parameters": {"total": case.model.total_params, "active": case.model.active_params},
        "auto": None if (held := held_by_auto(case)) is None else held.figures(),
        "memory": [{**vars(p), "kv": p.kv, "kv_tokens": p.kv_tokens} for p in _plans(case)],
        "steps": {
            w: {**vars(s), "seconds": s.seconds, "tokens_per_gpu": s.tokens_per_gpu}
            for w in WAYS
            for s in [case.step(w)]
        },
        "crossover": {
            o: {"tokens": crossover_tokens(case, o), "experts_per_rank": crossover_share(case, o)} for o in WAYS[1:]
        },
        "decode": [vars(d) for d in _decode(request)],
        "direct_tokens": request.few().direct,
        "travel_tokens": request.few().travel,
    }


def hardware_text(h: Hardware) -> str:
    """A hardware file with the source of each figure."""
    peaks = ", ".join(f"{k.upper()} {v / 1e15:.2f} PFLOP/s" for k, v in h.peak.items())
    eff = ", ".join(f"{k} {v:.3g}" for k, v in vars(h.efficiency).items())
    model = "1, a link for each pair" if h.topology == "mesh" else "the paper's model"
    at_once = ", ".join(f"{ranks} ranks {share:g}" for ranks, share in h.at_once.items())
    lines = [
        h.name,
        f"  memory {show_bytes(h.memory)} at {show_bytes(h.memory_bandwidth)}/s, board power {h.board_power:.0f} W",
        f"  peak rates, dense: {peaks}",
        f"  link {show_bytes(h.link_rate)}/s one way, {h.topology}, up to {h.max_ranks} ranks",
        f"  ranks that all pull, of the rate of one alone: {at_once or 'not measured'}; else {model}",
        f"  under copies: attention x {h.attention_slowdown}, products x {h.matmul_slowdown}",
        f"  efficiencies: {eff}",
        "  sources:",
        *(
            textwrap.fill(f"{k}: {v}", 110, initial_indent="    ", subsequent_indent="      ")
            for k, v in h.sources.items()
        ),
    ]
    return "\n".join(lines)
