"""Plots for reports: the window by context length, the crossover map, and decode's Pareto. Needs matplotlib."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from vllm_dwdp.errors import DwdpError, install
from vllm_dwdp.predict.decode import decode_steps, predicted_few
from vllm_dwdp.predict.strategies import dwdp
from vllm_dwdp.predict.units import show_count
from vllm_dwdp.predict.verdict import Case, group_sizes
from vllm_dwdp.predict.work import Lengths, prefill

COLOURS: Final = {"DWDP": "#0b6e4f", "DEP": "#c1440e", "TP": "#3a5a98", "DP": "#7a7a7a", "pull": "#e0a030"}


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files; raises DwdpError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise DwdpError(f"--plot needs matplotlib: {install('predict')}, or leave --plot out") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "figure.dpi": 130, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.25, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False,
    })  # fmt: skip
    return plt


def names(stem: str, parts: tuple[str, ...]) -> list[str]:
    """'out.png' -> out-window.png, ...; raises DwdpError for a folder that is missing."""
    path = Path(stem)
    if not path.parent.is_dir():
        raise DwdpError(f"--plot {stem}: the folder {path.parent} does not exist: make it first")
    suffix = path.suffix or ".png"
    return [str(path.with_name(f"{path.stem}-{part}{suffix}")) for part in parts]


def save(figure: Any, path: str) -> None:
    """Write and forget a figure; raises DwdpError for a suffix that matplotlib does not know."""
    try:
        figure.savefig(path, bbox_inches="tight")
    except ValueError as e:
        raise DwdpError(f"--plot {path}: {e}") from None
    pyplot().close(figure)


def token_axis(axis: Any, ticks: list[int], which: str = "x") -> None:
    """A logarithmic axis of tokens with marks such as 8K."""
    one = axis.xaxis if which == "x" else axis.yaxis
    (axis.set_xscale if which == "x" else axis.set_yscale)("log", base=2)
    one.set_major_locator(pyplot().FixedLocator(ticks))
    one.set_minor_locator(pyplot().NullLocator())
    one.set_major_formatter(pyplot().FuncFormatter(lambda v, _: show_count(int(v))))


def plot_plan(case: Case, stem: str) -> list[str]:
    """Draw all plots of a plan; returns the files."""
    paths = names(stem, ("window", "crossover", "pareto"))
    for draw, path in zip((window_plot, crossover_plot, pareto_plot), paths, strict=True):
        save(draw(case), path)
    return paths


def _title(case: Case) -> str:
    return f"{case.model.name}, {case.ranks} x {case.hardware.name}"


def window_plot(case: Case) -> Any:
    """Compute of a layer against its pull, by the length of one prompt that fills the step."""
    most = min(case.model.context_limit or 131072, 131072)
    lengths = [n for n in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072) if n <= most]
    figure, axis = pyplot().subplots(figsize=(6.4, 3.8))
    steps = [dwdp(case.model, case.hardware, prefill(Lengths(n), n), case.ranks, case.share,
                  options=case.options) for n in lengths]  # fmt: skip
    windows, pulls = ([getattr(s, key) * 1e3 for s in steps] for key in ("window", "pull_layer"))
    axis.plot(lengths, windows, "o-", color=COLOURS["DWDP"], label="window: compute of one MoE layer")
    axis.plot(lengths, pulls, "--", color=COLOURS["pull"], lw=2, label="pull of one layer's missing experts")
    axis.fill_between(lengths, windows, pulls, where=np.less(windows, pulls), interpolate=True, color=COLOURS["pull"],
                      alpha=0.2, label="exposed")  # fmt: skip
    token_axis(axis, lengths)
    axis.set_yscale("log")
    axis.set(xlabel="tokens of the prompt (one per step)", ylabel="time per MoE layer (ms)",
             title=f"Long prompts hide the pulls\n{_title(case)}")  # fmt: skip
    axis.legend()
    return figure


def crossover_plot(case: Case) -> Any:
    """Gain over DEP by tokens per step and ranks; the line where both are equal."""
    plt = pyplot()
    tokens = [2**k for k in range(9, 18)]
    ranks = [n for n in group_sizes(case) if n <= 16 or case.hardware.max_ranks > 16]
    gains = np.array([[replace(case, ranks=n, share=None).gain("DEP", t) for t in tokens] for n in ranks])
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    # Tenfold ends would hide the region that matters.
    levels = np.linspace(-60, 60, 25)
    filled = axis.contourf(tokens, range(len(ranks)), (gains - 1) * 100, levels=levels, cmap="RdYlGn", extend="both")
    if gains.min() < 1 < gains.max():
        line = axis.contour(tokens, range(len(ranks)), gains, levels=[1.0], colors="black", linewidths=1.8)
        axis.clabel(line, fmt={1.0: "equal"})
    axis.plot([case.tokens], [ranks.index(case.ranks)], "k*", ms=13, clip_on=False, label="this plan")
    axis.set_yticks(range(len(ranks)), [str(n) for n in ranks])
    token_axis(axis, tokens)
    axis.grid(False)
    axis.set(xlabel="tokens per rank and step", ylabel="ranks of a group",
             title=f"Tokens per step decide whether DWDP beats DEP\n{case.model.name}, {case.hardware.name}, "
                   f"prompts of {show_count(case.lengths.isl)}")  # fmt: skip
    axis.legend(loc="lower left", frameon=True)
    bar = figure.colorbar(filled, ticks=range(-60, 61, 20))
    bar.set_label("tokens/s/GPU over DEP (%)")
    return figure


def pareto_plot(case: Case) -> Any:
    """Decode: tokens/s/user against tokens/s/GPU, over the number of requests per rank."""
    figure, axis = pyplot().subplots(figsize=(6.4, 3.8))
    lines: dict[str, list[tuple[float, float]]] = {}
    travel = predicted_few(case.model, case.hardware, case.ranks, case.share, view=case.view).travel
    for sequences in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        cached = max(0, case.model.experts - case.memory().share_experts) // 4
        for d in decode_steps(case.model, case.hardware, case.ranks, sequences, case.lengths.isl, share=case.share,
                              cached=cached, skew=1.0, 
                              travel=travel, options=case.options):  # fmt: skip
            lines.setdefault(d.way, []).append((1 / d.seconds, d.tokens_per_gpu))
    styles = {"DWDP, all": "-", "DWDP, on demand": "--", "DWDP, tokens travel": "-."}
    fits = case.memory(1).kv_tokens > case.lengths.isl
    for way, points in lines.items():
        if way.startswith("DP") and not fits:
            continue
        colour = COLOURS[way.split(",")[0].split(" ")[0]]
        style = ":" if "cached" in way else next((s for k, s in styles.items() if way.startswith(k)), "-")
        axis.plot(*zip(*points, strict=True), style, marker=".", color=colour, label=way)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set(xlabel="tokens/s of one user", ylabel="output tokens/s of one GPU",
             title="Decode: pulls cost more than they save at small batches\n"
                   f"{_title(case)}, context {show_count(case.lengths.isl)}, 1 to 512 requests a rank")  # fmt: skip
    axis.legend()
    return figure
