"""Pictures of what kernels.bench and ci/checks/gpu_ipc.py wrote: a figure each, or None where there is nothing to draw."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from vllm_dwdp.predict.plots import COLOURS, pyplot, token_axis
from vllm_dwdp.predict.units import show_count

PALETTE: Final = (*(COLOURS[k] for k in ("DWDP", "DEP", "TP", "pull")), "#8e4585", "#3f9fbf", "#a05a2c", "#222222")
MARKERS: Final = "osD^vPX*"
BASE: Final = COLOURS["DP"]
#: Modes of kernels.bench: what is compared.
MODES: Final = {
    "same": "vLLM's tiles on both sides",
    "own": "ours with tuned tiles, vLLM as it is",
    "alike": "tuned tiles on both sides",
    "fastest": "ours tuned, vLLM's fastest backend",
}
#: Bar -> (whether of the base, the modes that tell it, colour).
BARS: Final[dict[str, tuple[bool, tuple[str, ...], str]]] = {
    "vLLM as it is": (True, ("same", "own"), BASE),
    "vLLM, tuned tiles": (True, ("alike",), "#a9a9a9"),
    "vLLM's fastest backend": (True, ("fastest",), "#cfcfcf"),
    "ours, vLLM's tiles": (False, ("same",), "#7fb7a3"),
    "ours, tuned tiles": (False, ("own", "alike", "fastest"), COLOURS["DWDP"]),
}
SHARE_TOKENS: Final = 8192
WORDS: Final = {
    "plain": "plain vLLM", "pinned": "pinned host memory", "ipc": "CUDA IPC", "link": "NVLink",
    "nvlink": "NVLink", "mp": "worker in a process of its own",
}  # fmt: skip
Cell = dict[str, Any]
Draws = Callable[[np.random.Generator, int], Any]


class Run(NamedTuple):
    """A machine and what came from it. source: the file's name."""

    machine: str
    source: str
    found: dict[str, Any]

    @property
    def across(self) -> bool:
        """Whether ranks lay on several GPUs."""
        return "link" in self.source or (self.found.get("about", {}).get("gpus") or 1) > 1


def style(index: int) -> dict[str, Any]:
    """Colour and marker of line number `index`."""
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)], "ms": 5, "lw": 1.4}


def interval(draw: Draws, size: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the `size` numbers that `draw` makes with a generator."""
    low, high = np.quantile(draw(np.random.default_rng(0), size), (0.025, 0.975))
    return float(low), float(high)


def medians(samples: Sequence[float]) -> Draws:
    """Medians of samples drawn again from `samples`."""
    return lambda rng, size: np.median(rng.choice(np.asarray(samples, float), (size, len(samples))), axis=1)


def finish(figure: Any, title: str, columns: int) -> Any:
    """The figure with a title over all and one legend of all axes under it."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    pairs = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in figure.axes]
    lines = {label: handle for pair in pairs for handle, label in pair}
    figure.legend(lines.values(), lines, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns, fontsize=9)
    return figure


def logarithmic(axis: Any, unit: str) -> None:
    """A y axis from 1, 2, 5, 10 ... that has a mark at both ends."""
    axis.set_yscale("log")
    least, most = axis.get_ylim()
    axis.set_yticks([m * 10**e for e in range(-2, 7) for m in (1, 2, 5) if least <= m * 10**e <= most])
    axis.yaxis.set_major_formatter(pyplot().FuncFormatter(lambda v, _: show_count(v) if v >= 1 else f"{v:g}"))
    axis.minorticks_off()
    axis.set_ylabel(f"{unit} (logarithmic)")


def kernel_ratios(first: Run, later: Run | None = None) -> Any:
    """vLLM's time by ours, by tokens and shape, a panel per mode. later: drawn as open marks."""
    runs = [first, later] if later else [first]
    cells: list[Cell] = [cell for run in runs for cell in run.found.get("cells", [])]
    modes = sorted({cell["mode"] for cell in cells}, key=lambda mode: (*MODES, mode).index(mode))
    if not modes:
        return None
    names, tokens = list(dict.fromkeys(c["model"] for c in cells)), sorted({c["tokens"] for c in cells})
    down, across = (2, 2) if len(modes) == 4 else (1, len(modes))
    size = (2.0 + 4.2 * across, 0.9 + 3.2 * down)
    figure, axes = pyplot().subplots(down, across, figsize=size, sharey=True, squeeze=False)
    for axis, mode in zip(axes.flat, modes, strict=True):
        axis.axhline(1.0, color="black", lw=1, label="equal")
        for run in runs:
            for index, name in enumerate(names):
                mine = [c for c in run.found.get("cells", []) if (c["model"], c["mode"]) == (name, mode)]
                if not mine:
                    continue
                mine.sort(key=lambda cell: cell["tokens"])
                # Beside each other, so that bars of several shapes can be told apart.
                at = [cell["tokens"] * 2 ** (0.22 * (index - (len(names) - 1) / 2)) for cell in mine]
                bounds = [c["bound"] if "bound" in c else interval(medians(c["ratios"]))[0] for c in mine]
                ratios = [cell["ratio"] for cell in mine]
                drops = [max(0.0, ratio - bound) for ratio, bound in zip(ratios, bounds, strict=True)]
                kind = style(index) | ({} if run is first else {"ls": "none", "ms": 9, "mew": 1.6, "fillstyle": "none"})
                label = name if run is first else f"{name} ({run.source})"
                axis.errorbar(at, ratios, yerr=[drops, [0.0] * len(at)], capsize=3, label=label, **kind)
        means = {row["tokens"]: row["mean"] for row in first.found.get("summary") or [] if row["mode"] == mode}
        if means:
            axis.plot(*zip(*sorted(means.items()), strict=True), "k:", lw=2, label="geometric mean")
        token_axis(axis, tokens)
        axis.set(xlabel="tokens of a forward", title=MODES.get(mode, mode), ylabel="vLLM's time / ours")
        axis.label_outer()
    where = f"{first.machine}: one MoE layer, split-weight kernels against vLLM's ({first.source})"
    note = "Above 1 ours is faster. Medians of turns; bars reach down to the lower 95 % bound."
    return finish(figure, f"{where}\n{note}", 3)


def kernel_shares(runs: Sequence[Run]) -> Any:
    """Bars: share of the rate of a large product at SHARE_TOKENS, by shape; from the last run that has the shape."""
    chosen: dict[str, tuple[Run, dict[str, Cell]]] = {}
    for run in runs:
        cells = [c for c in run.found.get("cells", []) if c["tokens"] == SHARE_TOKENS and c["share"]]
        chosen |= {c["model"]: (run, {o["mode"]: o for o in cells if o["model"] == c["model"]}) for c in cells}
    if not chosen:
        return None
    shares = {}
    for label, (base, told, _) in BARS.items():
        field = "base_share" if base else "share"
        shares[label] = [next((cell[m][field] for m in told if m in cell), None) for _, cell in chosen.values()]
    shown = {label: values for label, values in shares.items() if any(values)}
    figure, axis = pyplot().subplots(figsize=(7.6, 1.4 + 0.2 * len(chosen) * (len(shown) + 1)))
    height = 0.8 / len(shown)
    for place, (label, values) in enumerate(shown.items()):
        at = [row + height * (place - (len(shown) - 1) / 2) for row in range(len(chosen))]
        axis.barh(at, [value or 0.0 for value in values], 0.94 * height, color=BARS[label][2], label=label)
        for y, value in zip(at, values, strict=True):
            axis.text((value or 0.0) + 0.006, y, f"{value:.2f}" if value else "not measured", va="center", fontsize=8)
    labels = [name if run is runs[0] else f"{name}\n({run.source})" for name, (run, _) in chosen.items()]
    axis.set_yticks(range(len(chosen)), labels)
    axis.set_ylim(len(chosen) - 0.45, -0.55)
    axis.grid(False, axis="y")
    axis.set_xlim(0, 1.12 * max(value or 0.0 for values in shown.values() for value in values))
    axis.set_xlabel(
        "FLOP/s as a share of those of an 8192 x 8192 x 8192 product\nof the same type (BF16 or FP8) in the same run"
    )
    title = f"{runs[0].machine}: one MoE layer with {SHARE_TOKENS} tokens ({runs[0].source})"
    return finish(figure, title, 3)


def copy_rates(runs: Sequence[Run]) -> Any:
    """GB/s by slice size, a panel per kind of memory, a line per number of slices in flight."""
    panels: dict[str, dict[int, dict[int, float]]] = {}
    for run in runs:
        kinds = {
            "cuda_pinned": "pinned host memory",
            "cupy_ipc": "another GPU, NVLink" if run.across else "same GPU, CUDA IPC",
        }
        mine: dict[str, dict[int, dict[int, float]]] = {}
        for row in run.found.get("rows", []):
            found = re.fullmatch(r"(\S+), (\d+) KiB, (\d+) in flight", str(row.get("name")))
            if row.get("part") == "rate" and found:
                lines = mine.setdefault(kinds.get(found[1], found[1]), {})
                lines.setdefault(int(found[3]), {})[int(found[2])] = row["value"]
        panels = mine | panels
    if not panels:
        return None
    ordered = sorted(panels.items(), key=lambda panel: max(max(line.values()) for line in panel[1].values()))
    figure, axes = pyplot().subplots(1, len(panels), figsize=(1.2 + 3.9 * len(panels), 4.0), sharey=True, squeeze=False)
    depths = sorted({depth for lines in panels.values() for depth in lines})
    for axis, (name, lines) in zip(axes[0], ordered, strict=True):
        for index, depth in enumerate(depths):
            # Where more in flight changes nothing the lines lie on each other: larger marks below, smaller above.
            kind = style(index) | {"ms": 9 - 5 * index / max(1, len(depths) - 1)}
            points = sorted(lines.get(depth, {}).items())
            axis.plot([size for size, _ in points], [rate for _, rate in points], label=f"{depth} in flight", **kind)
        ticks = sorted({size for line in lines.values() for size in line})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{t // 1024} MiB" if t >= 1024 else f"{t} KiB" for t in ticks], rotation=40)
        axis.set(xlabel="bytes of a slice", title=name)
        logarithmic(axis, "GB/s")
        axis.label_outer()
    title = (
        f"{runs[0].machine}: copies of slices into a slot, as one CUDA graph ({', '.join(run.source for run in runs)})"
    )
    return finish(figure, title, len(depths))
