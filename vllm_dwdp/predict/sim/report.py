"""What `vllm-dwdp simulate` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from typing import Any, TypeVar

from vllm_dwdp.predict.plan_report import table
from vllm_dwdp.predict.sim.disaggregated import PoolsResult
from vllm_dwdp.predict.sim.run import Result
from vllm_dwdp.predict.sim.scenario import Scenario
from vllm_dwdp.predict.units import show_count, show_time

Figures = TypeVar("Figures", Result, PoolsResult)


def results_text(s: Scenario, results: list[Result]) -> str:
    """A table with one line per way, and what stands out."""
    lines: list[list[Any]] = [[
        "", "prompt tok/s/GPU", "output", "TTFT p50", "p90", "p99", "gap p50", "p99", "exposed", "waiting", "idle",
            "done", "lost",
    ]]  # fmt: skip
    for r in results:
        lines.append([
            r.way, f"{r.prompt_per_gpu:,.0f}", f"{r.output_per_gpu:,.0f}", *(_time(x) for x in r.ttft), _time(r.gap[0]),
            _time(r.gap[2]), f"{r.exposed:.1%}", f"{r.waiting:.1%}", f"{r.idle:.1%}", f"{r.finished}/{r.requests}", r.lost,
        ])  # fmt: skip
    load = s.stream
    head = [
        f"{s.model.name} on {s.ranks} x {s.hardware.name} in groups of {s.group_size}, {s.seconds:g} s, seed {s.seed}",
        f"each rank: {load.rate:g} requests/s ({'Poisson' if load.burst == 1 else f'bursts of {load.burst:g}'}), prompts "
        f"of {show_count(load.lengths.isl)} tokens, {load.osl} out, {show_count(s.tokens_per_step)} tokens per step"
        + (f"; faults on ranks {', '.join(map(str, sorted(s.faults)))}" if s.faults else ""),
        "",
    ]
    tail = [
        "",
        "  gap: between two tokens of a request. Shares of the GPUs' time: exposed, compute stood still for a pull;",
        "  waiting, for other ranks or in a stall; idle, no request. done: finished of arrived. lost: with a dead group.",
    ]
    tail += _against_dwdp(results, lambda r: r.prompt_per_gpu, "prompt")
    return "\n".join([*head, table(lines), *tail])


def pools_text(s: Scenario, results: list[PoolsResult]) -> str:
    """The same of a fleet with a pool that decodes."""
    pool, load = s.pool, s.stream
    assert pool is not None
    lines: list[list[Any]] = [[
        "prefill", "output tok/s/GPU", "TTFT p50", "p90", "p99", "gap p50", "p99", "transfer p50", "p99", "prefill idle",
            "decode idle", "done", "lost",
    ]]  # fmt: skip
    for r in results:
        lines.append([
            r.way, f"{r.output_per_gpu:,.0f}", *(_time(x) for x in r.ttft), _time(r.gap[0]), _time(r.gap[2]),
            _time(r.transfer[0]), _time(r.transfer[2]), f"{r.prefill_idle:.1%}", f"{r.decode_idle:.1%}",
            f"{r.finished}/{r.requests}", r.lost,
        ])  # fmt: skip
    engines = f"{pool.ranks // pool.group_size} x {pool.way}{pool.group_size}"
    head = [
        f"{s.model.name} on {s.hardware.name}: {s.ranks} GPUs in groups of {s.group_size} compute prompts, {pool.ranks} "
        f"decode ({engines}); {s.seconds:g} s, seed {s.seed}",
        f"each prefill rank: {load.rate:g} requests/s, prompts of {show_count(load.lengths.isl)} tokens, {load.osl} out",
        "",
    ]
    tail = [
        "",
        "  gap: between two tokens of a request. transfer: from the last of a KV cache sent to the step that takes it, with",
        "  any wait for a slot. Idle: shares of the time of each pool. done: finished of arrived. lost: with a dead group.",
    ]
    tail += _against_dwdp(results, lambda r: r.output_per_gpu, "output")
    return "\n".join([*head, table(lines), *tail])


def _against_dwdp(results: Sequence[Figures], per_gpu: Callable[[Figures], float], what: str) -> list[str]:
    """A line for every other way; per_gpu: tokens/s of `what`."""
    best = {r.way: r for r in results}
    dwdp = best.pop("DWDP", None)
    return [
        f"  DWDP against {way}: {per_gpu(dwdp) / per_gpu(r):.2f}x {what} tokens/s/GPU, "
        f"{dwdp.ttft[0] / r.ttft[0]:.2f}x median TTFT"
        for way, r in best.items()
        if dwdp is not None and per_gpu(r)
    ]


def _time(seconds: float) -> str:
    return "-" if isnan(seconds) else show_time(seconds)


def results_json(s: Scenario, results: Sequence[Result | PoolsResult]) -> dict[str, Any]:
    """The same as numbers; seconds and shares."""

    def clean(value: Any) -> Any:
        if isinstance(value, tuple):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and isnan(value) else value

    return {
        "model": s.model.name,
        "hardware": s.hardware.name,
        "ranks": s.ranks,
        "group_size": s.group_size,
        **({} if s.pool is None else {"decode_pool": vars(s.pool)}),
        "seconds": s.seconds,
        "seed": s.seed,
        "results": [{k: clean(v) for k, v in vars(r).items()} for r in results],
    }
