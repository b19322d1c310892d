"""Plots of a simulation: the Pareto of the ways over load, and a timeline of one forward with copies under it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np

from vllm_dwdp.predict.plots import COLOURS, names, pyplot, save
from vllm_dwdp.predict.sim.flows import simulate_layers
from vllm_dwdp.predict.sim.run import Result, run_scenario
from vllm_dwdp.predict.sim.scenario import Scenario
from vllm_dwdp.predict.strategies import dwdp, pull_bytes
from vllm_dwdp.predict.units import show_count
from vllm_dwdp.predict.work import prefill

_LOADS: Final = (0.25, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3)
_LAYERS: Final = 6


def plot_results(s: Scenario, results: list[Result], stem: str) -> list[str]:
    """Draw into files that start with `stem`; the load curve runs one group at several loads."""
    del results
    paths = names(stem, ("load", "timeline"))
    save(load_plot(s), paths[0])
    save(timeline_plot(s), paths[1])
    return paths


def load_plot(s: Scenario) -> Any:
    """Median TTFT against throughput as the load grows."""
    figure, axis = pyplot().subplots(figsize=(6.4, 3.8))
    curves: dict[str, list[tuple[float, float]]] = {way: [] for way in s.ways}
    one = replace(s, ranks=s.group_size, faults={}, seconds=min(s.seconds, 300.0))
    for part in _LOADS:
        for r in run_scenario(replace(one, stream=replace(s.stream, rate=s.stream.rate * part))):
            curves[r.way].append((r.prompt_per_gpu, r.ttft[0]))
    for way, points in curves.items():
        axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[way], label=way)
    axis.set_yscale("log")
    axis.set(xlabel="prompt tokens/s of one GPU", ylabel="median time to first token (s)",
             title=f"Waiting grows where a way runs out of capacity\n{s.model.name}, groups of {s.group_size} x "
                   f"{s.hardware.name}, prompts of {show_count(s.stream.lengths.isl)}")  # fmt: skip
    axis.legend()
    return figure


def timeline_plot(s: Scenario) -> Any:
    """Some layers of one forward of a group: compute of every rank, and the pulls under it."""
    plt = pyplot()
    work = prefill(s.stream.lengths, s.tokens_per_step)
    step = dwdp(s.model, s.hardware, work, s.group_size, s.share, merge=s.merge, options=s.options)
    shown = min(s.group_size, 4)
    rng = np.random.default_rng(s.seed)
    windows = step.window * (1 + 0.05 * rng.standard_normal((s.group_size, _LAYERS)))
    starts = list(rng.uniform(0, step.window, s.group_size))
    pulled = pull_bytes(s.model, s.group_size, s.share)
    # What ranks cost each other is in the planner's time of a pull.
    run = simulate_layers(windows, pulled, pulled / step.pull_layer if pulled else 1.0,
                          sliced=True, starts=starts, seed=s.seed, keep=True)  # fmt: skip
    figure, axis = plt.subplots(figsize=(7.6, 0.75 * shown + 1.6))
    looks = {
        "compute": (COLOURS["DWDP"], 0.0, 0.42),
        "wait": ("#d62828", 0.0, 0.42),
        "pull": (COLOURS["pull"], 0.42, 0.24),
    }
    for span in run.spans:
        if span.rank >= shown:
            continue
        colour, offset, height = looks[span.what]
        start, length = span.start * 1e3, (span.end - span.start) * 1e3
        shade = 1.0 if span.layer % 2 or span.what == "wait" else 0.7
        axis.broken_barh([(start, length)], (span.rank + offset, height), color=colour, alpha=shade, lw=0)
        if span.what != "wait":
            axis.text(start + length / 2, span.rank + offset + height / 2, str(span.layer), ha="center", va="center",
                      fontsize=7, color="white" if span.what == "compute" else "black")  # fmt: skip
    labels = {"compute": "compute of a layer", "pull": "pull of the next layer's experts", "wait": "exposed wait"}
    present = [what for what in labels if any(span.what == what for span in run.spans)]
    axis.legend([plt.Rectangle((0, 0), 1, 1, color=looks[what][0]) for what in present], [labels[what] for what in present],
                loc="upper center", bbox_to_anchor=(0.5, -0.14 if shown > 2 else -0.3), ncols=3)  # fmt: skip
    axis.set_yticks([r + 0.33 for r in range(shown)], [f"rank {r}" for r in range(shown)])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    hidden = (
        "Pulls lie under compute, and no rank waits for another" if "wait" not in present else "Compute waits for pulls"
    )
    axis.set(xlabel="ms", title=f"{hidden}\n{s.model.name}, {s.group_size} x {s.hardware.name}, "
             f"{show_count(s.tokens_per_step)} tokens per step, first {_LAYERS} MoE layers")  # fmt: skip
    return figure
