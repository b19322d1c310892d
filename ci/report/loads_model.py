"""The planner's rates of servers under load, with terms that it lacks, and the fit of those, for loads_plan.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np

from ci.report.loads_points import Run, model_of
from vllm_dwdp.predict.closed_loop import Loop, closed_loop
from vllm_dwdp.predict.fit import least_squares
from vllm_dwdp.predict.hardware_file import Hardware, load_hardware
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.strategies import Step, data_parallel, dep, dwdp, tensor_parallel
from vllm_dwdp.predict.travel import LAUNCHES_S
from vllm_dwdp.predict.work import Lengths, Work, decoding, prefill

#: The terms that may be fitted together, the fewest first.
SETS: Final[tuple[tuple[str, ...], ...]] = (
    (), ("host",), ("host", "launch"), ("host", "latency"), ("grouped", "host"), ("host", "launch", "latency"),
    ("matmul", "host", "launch"), ("grouped", "host", "launch"), ("grouped", "host", "launch", "latency"),
    ("matmul", "grouped", "host", "launch", "latency"),
)  # fmt: skip
#: A set is as good as the best one if its error is no more than this many times as large (plus a thousandth).
SAME: Final = 1.1
#: Parts of the fitted half, each predicted from the others.
FOLDS: Final = 5
_EFFICIENCIES: Final = ("matmul", "grouped")
_hardware: Final = cache(load_hardware)
#: Where a term starts that the planner does not have.
_START: Final = {"host": 1.0, "latency": 0.03}
#: `launch` is a bound: fits stop where it begins to matter for one point more, so that the best of several is taken.
_LAUNCHES: Final = (0.5, 1.0, 2.0)
#: Of a step's prompts, cut from a stream: 0.1 % from what 4,096 give.
_SAMPLES: Final = 512


@dataclass(frozen=True)
class Terms:
    """Shares of the peak, and milliseconds. host: of every step, in which the GPU does nothing. launch: that a layer takes
    at least in a step with a prompt. latency: of a collective of DP+EP, or of half an all-reduce of tensor parallelism.
    """

    matmul: float
    grouped: float
    latency: float
    host: float = 0.0
    launch: float = 0.0


class Predicted(NamedTuple):
    """rate: tokens/s, input and output, of the whole machine. waited: share of the time that compute waits for pulls of
    steps with prompts."""

    rate: float
    waited: float


def shipped(gpu: str) -> Terms:
    """As the hardware file has them, and nothing that the planner lacks."""
    hardware = _hardware(gpu)
    return Terms(hardware.efficiency.matmul, hardware.efficiency.grouped, 1e3 * hardware.link_latency)


def predict(run: Run, terms: Terms) -> Predicted:
    """A run's rate."""
    model = model_of(run.model)
    hardware = replace(_hardware(run.gpu), link_latency=terms.latency * 1e-3)
    hardware = hardware.with_efficiency(matmul=terms.matmul, grouped=terms.grouped)
    least, host = terms.launch * 1e-3 * model.layers, terms.host * 1e-3
    if run.output == 1:
        tokens = min(run.batched, max(run.input, round(run.at_a_time * run.input)))
        step = _step(run, model, hardware, _prompts(run.input, run.spread, tokens))
        seconds = max(step.seconds, least) + host
        return Predicted(
            min(run.engines, run.concurrency) * tokens / seconds * (1 + 1 / run.input), step.exposed / seconds
        )
    each, busy = max(1.0, run.at_a_time), min(float(run.engines), run.concurrency)
    prompt_s, decode_s, exposed_s = _loop(run, model, hardware, each)
    prompt_s, decode_s = max(prompt_s, least) + host, decode_s + host
    if run.kind == "dpep":
        # In lockstep: a step is as long as one with a prompt if any rank has one.
        part = 1 - (1 - min(1.0, each / run.output)) ** run.ranks
        turn = run.output * (part * prompt_s + (1 - part) * decode_s)
    else:
        turn = each * prompt_s + max(0.0, run.output - each) * decode_s
    return Predicted(busy * each * (run.input + run.output) / turn, each * exposed_s / turn)


def _loop(run: Run, model: MoeModel, hardware: Hardware, each: float) -> tuple[float, float, float]:
    """Seconds of a step with a prompt, of one that decodes, and of the former in which compute waits for pulls, on an engine
    with `each` requests at a time."""
    prompt = _step(run, model, hardware, _prompts(run.input, 0.0, run.input))
    if run.kind == "dwdp":
        # Groups do not touch each other.
        loop = Loop(run.ranks * each if run.at_a_time >= 1 else run.concurrency, run.input, run.output)
        decode = "travel" if run.travel else "direct"
        rates = closed_loop(
            model, hardware, run.ranks, loop, share=run.held, decode=decode, travel_tokens=run.travel or 1
        )
        return rates.prompt_s, rates.decode_s, prompt.exposed if math.isclose(rates.prompt_s, prompt.seconds) else 0.0
    decodes = _step(run, model, hardware, decoding(round(each), run.input + run.output / 2))
    return prompt.seconds, decodes.seconds + model.moe_layers * LAUNCHES_S, 0.0


def _step(run: Run, model: MoeModel, hardware: Hardware, work: Work) -> Step:
    if run.kind == "dwdp":
        return dwdp(model, hardware, work, run.ranks, run.held)
    if run.kind == "replicas":
        return data_parallel(model, hardware, work)
    return (dep if run.kind == "dpep" else tensor_parallel)(model, hardware, work, run.ranks)


@cache
def _prompts(mean: int, spread: float, tokens: int) -> Work:
    """A step of `tokens`, cut from prompts of about `mean` tokens."""
    lengths = Lengths(round(mean * (1 + spread)), (1 - spread) / (1 + spread)) if spread else Lengths(mean)
    work = prefill(lengths, tokens)
    return Work(work.new[:_SAMPLES], work.context[:_SAMPLES])


def halves(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """(to fit, held out), as on a chess board of systems by file and of loads, so that both see every system and load."""
    systems = sorted({(run.file, run.system) for run in runs})
    loads = sorted({run.load for run in runs})
    parts: tuple[list[Run], list[Run]] = ([], [])
    for run in sorted(runs):
        parts[(systems.index((run.file, run.system)) + loads.index(run.load)) % 2].append(run)
    return parts


def errors(runs: Sequence[Run], terms: Terms) -> Any:
    """[runs] predicted by measured, less 1."""
    return np.array([predict(run, terms).rate / run.rate - 1 for run in runs])


def rms(runs: Sequence[Run], terms: Terms) -> float:
    """Typical error: root mean square of logarithms, so that half and double are as wrong as each other."""
    return float(np.sqrt(np.mean(np.log1p(errors(runs, terms)) ** 2)))


def fit(runs: Sequence[Run], names: Sequence[str]) -> Terms:
    """The terms `names` fitted to `runs`, all of one GPU, the rest as shipped."""
    base = shipped(runs[0].gpu)
    start = replace(base, **{name: _START[name] for name in names if name in _START})
    starts = [replace(start, launch=least) for least in _LAUNCHES] if "launch" in names else [start]
    return min((_fit_from(start, runs, names) for start in starts), key=lambda terms: rms(runs, terms))


def _fit_from(start: Terms, runs: Sequence[Run], names: Sequence[str]) -> Terms:
    def terms(values: Any) -> Terms:
        # x / (1 + x): no efficiency may exceed 1.
        pairs = zip(names, (float(value) for value in values), strict=True)
        return replace(start, **{name: x / (1 + x) if name in _EFFICIENCIES else x for name, x in pairs})

    def residuals(values: Any) -> Any:
        return np.log1p(errors(runs, terms(values)))

    begin = [(name, getattr(start, name)) for name in names]
    values = [min(x, 0.99) / (1 - min(x, 0.99)) if name in _EFFICIENCIES else x for name, x in begin]
    return terms(least_squares(residuals, values, rounds=15)) if names else start


def left_out(runs: Sequence[Run], names: Sequence[str]) -> float:
    """Typical error of each part of `runs` when `names` are fitted to the others."""
    squares = 0.0
    for part in range(FOLDS):
        rest = [run for number, run in enumerate(runs) if number % FOLDS != part]
        these = [run for number, run in enumerate(runs) if number % FOLDS == part]
        if these:
            squares += len(these) * rms(these, fit(rest, names)) ** 2
    return float(np.sqrt(squares / len(runs)))


def choose(runs: Sequence[Run]) -> tuple[str, ...]:
    """The fewest terms worth fitting, by the runs given alone."""
    typical = {names: left_out(runs, names) for names in SETS if 2 * len(names) < len(runs)}
    return next(names for names, error in typical.items() if error <= SAME * min(typical.values()) + 1e-3)
