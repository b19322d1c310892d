"""Pictures of what gpu_prefill.py wrote: prefill by prompt length, decode by requests at once."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from gpu_pictures import BASE, WORDS, Cell, Run, finish, interval, logarithmic, medians, style
from gpu_prefill import REAL

from vllm_dwdp.predict.plots import pyplot, token_axis


def job_label(job: str) -> str:
    """A job's name in words: 'split 112 pinned' is 'DWDP split, 112 experts held, pinned host memory'."""
    named = re.match(r"(split|contiguous) (\d+)\b", job)
    words = re.sub(r"(\d+) ([KM]iB)", r"slices_of_\1_\2", job[named.end() if named else 0 :].replace(",", " "))
    first = [f"DWDP {named[1]}, {named[2]} experts held"] if named else []
    return ", ".join(first + [WORDS.get(word, word.replace("_", " ")) for word in words.split()])


def jobs_with(run: Run, step: str) -> dict[str, dict[int, Cell]]:
    """Job -> its cells of a step by prompt length or batch, in the file's order."""
    found = {}
    for job, row in run.found.items():
        cells = row.get(step) if isinstance(row, dict) else None
        if isinstance(cells, dict) and cells:
            found[job] = {int(key): cell for key, cell in sorted(cells.items(), key=lambda item: int(item[0]))}
    return found


def job_style(run: Run, job: str) -> dict[str, Any]:
    """The same in every picture of a file; grey for plain vLLM."""
    return style(list(run.found).index(job)) | ({"color": BASE} if job.startswith("plain") else {})


def about(run: Run) -> str:
    """The model and where the ranks lie, for a title."""
    where = "a GPU for each of two ranks" if run.across else "two ranks on one GPU"
    return f"{REAL['num_layers']} layers of Qwen3-30B-A3B's shape, {where} ({run.source})"


def prefill(run: Run, step: str = "prefill") -> Any:
    """Three panels by prompt length: milliseconds, plain vLLM's time by this, share of the time waited for pulls.

    step: 'prefill', or 'pairs' for a prompt on each of two ranks at once, beside plain vLLM's single prompts.
    """
    jobs = jobs_with(run, step)
    if not jobs:
        return None
    alone = {job: cells for job, cells in jobs_with(run, "prefill").items() if job.startswith("plain")}
    first, plain = next(iter(alone.items()), ("", {}))
    jobs = {**alone, **jobs}
    lengths = sorted({length for cells in jobs.values() for length in cells})
    figure, (times, ratios, waits) = pyplot().subplots(1, 3, figsize=(12.6, 4.1))
    for index, (job, cells) in enumerate(jobs.items()):
        kind, aside = job_style(run, job), 2 ** (0.1 * (index - (len(jobs) - 1) / 2))
        times.plot(list(cells), [1e3 * cell["median_s"] for cell in cells.values()], label=job_label(job), **kind)
        both = [(n, plain[n], cell) for n, cell in cells.items() if n in plain and job != first]
        middle = np.array([base["median_s"] / cell["median_s"] for _, base, cell in both])
        ends = np.array([ratio_interval(base["seconds"], cell["seconds"]) for _, base, cell in both])
        if both:
            bars = np.clip([middle - ends[:, 0], ends[:, 1] - middle], 0, None)
            ratios.errorbar([n * aside for n, _, _ in both], middle, yerr=bars, capsize=3, **kind)
        ranks = 2 if step == "pairs" else 1
        counted = {n: cell for n, cell in cells.items() if "exposed_s" in cell}
        shares = [100 * cell["exposed_s"] / sum(cell["seconds"]) / ranks for cell in counted.values()]
        waits.plot(list(counted), shares, **kind | {"ms": 9 - 5 * index / max(1, len(jobs) - 1)})
    ratios.axhline(1.0, color="black", lw=1)
    for axis in (times, ratios, waits):
        token_axis(axis, lengths)
        axis.set_xlabel("tokens of a prompt (one prompt a step)")
    logarithmic(times, "ms to the first token")
    times.set_title("Time, median of the turns")
    ratios.set(
        ylabel="plain vLLM's time / this", title="Ratio, above 1 faster than plain\n(bars: 95 %, turns drawn again)"
    )
    waits.set(ylabel="% of the time", title="Compute stood still for pulls")
    # A wait that is nothing must not look like one.
    top = max(5.0, waits.get_ylim()[1])
    waits.set_ylim(-0.05 * top, top)
    what = (
        "prefill, a prompt on each rank at once (plain vLLM: one)"
        if step == "pairs"
        else "prefill, one prompt at a time"
    )
    return finish(figure, f"{run.machine}: {what}\n{about(run)}", 2)


def ratio_interval(base: list[float], mine: list[float]) -> tuple[float, float]:
    """The 95 % interval of the ratio of the medians, both drawn again."""
    return interval(lambda rng, size: medians(base)(rng, size) / medians(mine)(rng, size))


def decode(run: Run) -> Any:
    """Tokens per second by requests at once, and a bar from the slowest turn to the fastest."""
    jobs = jobs_with(run, "decode")
    if not jobs:
        return None
    figure, axis = pyplot().subplots(figsize=(7.2, 4.2))
    for index, (job, cells) in enumerate(jobs.items()):
        aside = 2 ** (0.12 * (index - (len(jobs) - 1) / 2))
        told = [cell["tokens_per_s"] for cell in cells.values()]
        bars = [[max(0.0, t - min(cell["all"])) for t, cell in zip(told, cells.values(), strict=True)],
                [max(0.0, max(cell["all"]) - t) for t, cell in zip(told, cells.values(), strict=True)]]  # fmt: skip
        at = [batch * aside for batch in cells]
        axis.errorbar(at, told, yerr=bars, capsize=3, label=job_label(job), **job_style(run, job))
    token_axis(axis, sorted({batch for cells in jobs.values() for batch in cells}))
    axis.set_xlabel("requests at once")
    logarithmic(axis, "tokens/s")
    title = f"{run.machine}: greedy decode; bars: slowest and fastest turn\n{about(run)}"
    return finish(figure, title, 1)
