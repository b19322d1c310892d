"""Pictures of what ci/bench/prefill.py wrote: prefill by prompt length, decode by requests at once."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ci.bench.prefill import REAL
from ci.bench.turns import PLAIN, bounds, ratios
from ci.report.pictures import BASE, WORDS, Cell, Run, finish, interval, logarithmic, medians, style
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

    step: 'prefill', or 'pairs' for a prompt on each of two ranks at once, beside plain vLLM's pairs or single prompts.
    """
    jobs = jobs_with(run, step)
    if not jobs:
        return None
    if not any(job.startswith("plain") for job in jobs):
        jobs = {job: cells for job, cells in jobs_with(run, "prefill").items() if job.startswith("plain")} | jobs
    first = next((job for job in jobs if job.startswith("plain")), "")
    lengths = sorted({length for cells in jobs.values() for length in cells})
    figure, (times, by_plain, waits) = pyplot().subplots(1, 3, figsize=(12.6, 4.1))
    for index, (job, cells) in enumerate(jobs.items()):
        kind, aside = job_style(run, job), 2 ** (0.07 * (index - (len(jobs) - 1) / 2))
        times.plot(list(cells), [1e3 * cell["median_s"] for cell in cells.values()], label=job_label(job), **kind)
        told = {n: found for n, cell in cells.items() if (found := ratio(run, jobs, job, n, first)) is not None}
        if told:
            middle, low, high = np.array(list(told.values())).T
            bars = np.clip([middle - low, high - middle], 0, None)
            by_plain.errorbar([n * aside for n in told], middle, yerr=bars, capsize=3, **kind)
        ranks = 2 if step == "pairs" else 1
        counted = {n: cell for n, cell in cells.items() if "exposed_s" in cell}
        shares = [100 * cell["exposed_s"] / sum(cell["seconds"]) / ranks for cell in counted.values()]
        waits.plot(list(counted), shares, **kind | {"ms": 9 - 5 * index / max(1, len(jobs) - 1)})
    by_plain.axhline(1.0, color="black", lw=1)
    for axis in (times, by_plain, waits):
        token_axis(axis, lengths)
        axis.set_xlabel("tokens of a prompt")
    logarithmic(times, "ms to the first token")
    times.set_title("Time, median of the turns")
    by_plain.set(
        ylabel="plain vLLM's time / this", title="Ratio, above 1 faster than plain\n(bars: 95 %, turns drawn again)"
    )
    waits.set(ylabel="% of the time", title="Compute stood still for pulls")
    # A wait that is nothing must not look like one.
    top = max(5.0, waits.get_ylim()[1])
    waits.set_ylim(-0.05 * top, top)
    what = "prefill, a prompt on each rank at once" if step == "pairs" else "prefill, one prompt at a time"
    return finish(figure, f"{run.machine}: {what}\n{about(run)}", 2)


def ratio(
    run: Run, jobs: dict[str, dict[int, Cell]], job: str, length: int, first: str
) -> tuple[float, float, float] | None:
    """(plain vLLM's time by this, its bounds); None for the plain engine that others are compared with.

    By turn where engines took turns, then also between two plain ones, and only within their group; else of the medians.
    """
    mine = jobs[job][length]
    group = run.found[job].get("group", 1)
    beside = [name for name in jobs if name.split(", group")[0] in PLAIN and run.found[name].get("group", 1) == group]
    others = [jobs[name][length]["seconds"] for name in beside if name != job and length in jobs[name]]
    if others and any(name.split(", group")[0] == PLAIN[0] for name in beside):
        return bounds(ratios(others, mine["seconds"]))
    base = jobs.get(first, {}).get(length)
    if base is None or job == first or group != run.found[first].get("group", 1):
        return None
    return (base["median_s"] / mine["median_s"], *ratio_interval(base["seconds"], mine["seconds"]))


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
