"""The reproduction table: what was published, what the planner says, and whether the promise is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vllm_dwdp.predict.contention import meeting, simulate_meeting
from vllm_dwdp.predict.fitted import FITTED, Fitted
from vllm_dwdp.predict.measured import predicted
from vllm_dwdp.predict.paper_model import amd, blog, end_to_end, paper_pair, sglang, t1
from vllm_dwdp.predict.published import AMD, BLOG, SGLANG, SGLANG_128, T1, T1_TOTAL, T2, T3, T4, T5
from vllm_dwdp.predict.strategies import Step
from vllm_dwdp.predict.units import show_count
from vllm_dwdp.predict.work import Lengths

#: The goal for the mean absolute error of T3 and T4's throughput ratios.
GOAL: Final = 0.05

#: Held-out rows that are known to miss, with the likely reason. A miss that is not listed fails `vllm-dwdp paper`.
KNOWN_MISSES: Final = {
    "T3+T4: mean absolute error of tokens/s/GPU": "the paper's own T1 (1.13) is 3 to 7 points above its T3 and T4 for "
    "the same set-up: time between iterations is not in T1, and the planner has none either",
    "AMD ISL 16K, 4K tokens": "chunks of 4K leave DEP's baseline far slower than a roofline; 0.1 points over the limit",
    "AMD ISL 4K, 4440 tokens": "64 prompts in all: the DEP baseline of this row runs at 0.64 of the one with 256",
    "170-180 tokens/s/user, output tokens/s/GPU": "a loss; in the planner a prefill that needs fewer GPUs cannot lose, "
    "since decode is the same",
    "travel-48-layers, decode1: tokens/s": "at one request launches of attention and the host decide, of which the planner "
    "has none",
}
#: Steps from one row to the next in which the planner does not move as the paper does.
KNOWN_TREND_MISSES: Final = {
    (
        "ratio 0.5, 16K tokens, slices",
        "ratio 0.5, 32K tokens, slices",
    ): "with slices the planner hides all pulls at 16K tokens already, and has nothing left to gain at 32K",
}
#: Published changes below this are noise.
TREND: Final = 0.02
_DRAWS: Final = 200_000


@dataclass(frozen=True)
class Row:
    """One figure. `limit`: promised deviation, relative unless `absolute`; None: shown, nothing promised.

    kind: 'fitted' (the constants were fitted on it), 'exact', or 'held out'.
    """

    table: str
    label: str
    published: float
    predicted: float
    kind: str
    limit: float | None
    absolute: bool = False
    same_side: bool = False

    @property
    def deviation(self) -> float:
        """predicted / published - 1, or predicted - published where `absolute`."""
        return self.predicted - self.published if self.absolute else self.predicted / self.published - 1

    @property
    def kept(self) -> bool:
        """Whether the promise is kept."""
        side = not self.same_side or (self.published > 1) == (self.predicted > 1)
        return side and (self.limit is None or abs(self.deviation) <= self.limit)

    @property
    def known(self) -> str | None:
        """Why it misses, if it is a listed miss."""
        return KNOWN_MISSES.get(self.label)


def ratio(pair: tuple[Step, Step]) -> float:
    """Tokens/s/GPU of the second over the first."""
    return pair[1].tokens_per_gpu / pair[0].tokens_per_gpu


def rows(c: Fitted = FITTED) -> Iterator[Row]:
    """All rows in the order of the sources; about two seconds."""
    yield from fitted_rows(c)
    yield from t2_rows()
    yield from held_out_rows(c)


def fitted_rows(c: Fitted = FITTED) -> Iterator[Row]:
    """Blog table 1 (3 %) and T1 (rows 10 %, totals 3 %)."""
    for tokens, want in BLOG.items():
        for name, published, got in zip(("T_compute/T_prefetch", "T_DEP/T_DWDP"), want, blog(c, tokens), strict=True):
            yield Row("Blog 19, table 1", f"{name}, ISL {show_count(tokens)}", published, got, "fitted", 0.03)
    pair = t1(c)
    for column, step in enumerate(pair):
        for key, values in T1.items():
            if values[column]:
                label = f"{step.way}4 {key}, ms"
                yield Row("T1", label, values[column], getattr(step, key) * 1e3, "fitted", 0.10)
        yield Row("T1", f"{step.way}4 iteration, ms", T1_TOTAL[column], step.seconds * 1e3, "fitted", 0.03)


def t2_rows() -> Iterator[Row]:
    """T2 to the printed digits, and drawn at random within four standard errors."""
    for ranks, want in T2.items():
        drawn = simulate_meeting(ranks, _DRAWS, seed=ranks)
        for i, (published, chance) in enumerate(zip(want, meeting(ranks), strict=False)):
            label = f"N={ranks}, C={i + 1}, %"
            yield Row("T2", label, published, round(100 * chance, 2), "exact", 1e-9, absolute=True)
            error = 100 * (chance * (1 - chance) / _DRAWS) ** 0.5
            yield Row("T2", f"{label}, drawn", published, 100 * drawn[i], "exact", 4 * error + 0.005, absolute=True)


def held_out_rows(c: Fitted = FITTED) -> Iterator[Row]:
    """T3, T4 and the points of other implementations; nothing was fitted to them."""
    errors: list[float] = []
    for r in T3:
        # Rows that vary the length's spread state it; the others have the paper's length ratio of 0.8.
        ratio_of_lengths = 1.0 if r.group in ("std of ISL", "group size") else 0.8
        lengths = Lengths(r.isl, ratio_of_lengths, r.std)
        gain = ratio(paper_pair(c, lengths, r.tokens, ranks=r.ranks, merge=True))
        errors.append(gain - r.tps)
        label = f"{r.group} varied: {show_count(r.isl)}, {show_count(r.tokens)} tokens, std {r.std}, N={r.ranks}"
        yield Row("T3", f"{label}, tokens/s/GPU", r.tps, gain, "held out", None, absolute=True, same_side=True)
        # Prompts wait for steps of the whole group: its throughput, not that of one GPU, sets the wait.
        yield Row("T3", f"{label}, TTFT", r.ttft, gain * r.ranks / 4, "held out", None, absolute=True, same_side=True)
    for (length_ratio, tokens), want in T4.items():
        for sliced, published in zip((False, True), want, strict=True):
            gain = ratio(paper_pair(c, Lengths(8192, length_ratio), tokens, sliced=sliced))
            errors.append(gain - published)
            label = f"ratio {length_ratio}, {show_count(tokens)} tokens, {'slices' if sliced else 'no slices'}"
            yield Row("T4", label, published, gain, "held out", None, absolute=True, same_side=True)
    mean = sum(map(abs, errors)) / len(errors)
    yield Row("T3+T4", "T3+T4: mean absolute error of tokens/s/GPU", 0.0, mean, "held out", GOAL, absolute=True)
    for band in T5:
        gain = end_to_end(c, (band.low + band.high) / 2)
        label = f"{band.low}-{band.high} tokens/s/user, output tokens/s/GPU"
        yield Row("T5+T6", label, band.gpu, gain, "held out", GOAL, absolute=True)
    for isl, published in SGLANG.items():
        gain = ratio(sglang(c, isl))
        label = f"SGLang ISL {show_count(isl)}, 16K tokens"
        yield Row("SGLang #29778", label, published, gain, "held out", 0.25, same_side=True)
    gain = ratio(sglang(c, 8192))
    yield Row("SGLang #29778", "SGLang ISL 8K, 128 requests", SGLANG_128, gain, "held out", 0.25, same_side=True)
    for (isl, tokens), published in AMD.items():
        gain = ratio(amd(c, isl, tokens))
        label = f"AMD ISL {show_count(isl)}, {show_count(tokens)} tokens"
        yield Row("AMD #33310", label, published, gain, "held out", 0.25, same_side=True)
    for run, tokens_per_s in predicted(c):
        label = f"{run.file}, {run.load}: tokens/s"
        yield Row("two H100s", label, run.tokens_per_s, tokens_per_s, "held out", 0.25)


def trends(held_out: list[Row]) -> list[tuple[Row, Row]]:
    """Neighbouring rows of T3 and T4 (tokens/s/GPU) whose published ratio moves by `TREND` or more."""
    t3 = [row for row in held_out if row.table == "T3" and row.label.endswith("GPU")]
    moves = [(a, b) for a, b, x, y in zip(t3, t3[1:], T3, T3[1:], strict=False) if x.group == y.group]
    t4 = [row for row in held_out if row.table == "T4"]
    # Per length ratio: 16K without and with slices, then 32K.
    for first in range(0, len(t4), 4):
        a, b, c, d = t4[first : first + 4]
        moves += [(a, b), (c, d), (a, c), (b, d)]
    return [(a, b) for a, b in moves if abs(b.published - a.published) >= TREND]


def trend_kept(pair: tuple[Row, Row]) -> bool:
    """Whether the planner moves in the published direction."""
    a, b = pair
    return (b.predicted > a.predicted) == (b.published > a.published)


def report(c: Fitted = FITTED) -> tuple[str, list[Row]]:
    """(the table in Markdown, rows that miss without being listed)."""
    lines = [
        "Constants, fitted on blog 19's table 1 and T1 only: "
        + ", ".join(f"{key} {value:.4g}" for key, value in c._asdict().items()) + ".",
        "",
        "| table | figure | published | planner | deviation | promised | kept |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    unlisted: list[Row] = []
    misses: list[Row] = []
    drawn = {"kept": 0, "all": 0}
    for row in rows(c):
        if row.label.endswith("drawn"):
            drawn["all"] += 1
            drawn["kept"] += row.kept
        else:
            lines.append(_line(row))
        if not row.kept:
            (misses if row.known else unlisted).append(row)
    lines += ["", f"T2 drawn at random: {drawn['kept']} of {drawn['all']} figures within four standard errors."]
    moves = trends(list(held_out_rows(c)))
    lost = [pair for pair in moves if not trend_kept(pair)]
    lines.append(
        f"Trends of T3 and T4: {len(moves) - len(lost)} of {len(moves)} changes of {TREND} or more have its sign."
    )
    for a, b in lost:
        why = KNOWN_TREND_MISSES.get((a.label, b.label))
        lines.append(
            f"Missed, {'listed' if why else 'NOT LISTED'}: trend from {a.label} to {b.label}{f' ({why})' if why else ''}."
        )
        if why is None:
            unlisted.append(b)
    for row in misses:
        lines.append(f"Missed, listed: {row.label}: {row.predicted:.3f} for {row.published:.3f} ({row.known}).")
    for row in unlisted:
        lines.append(f"MISSED: {row.table}, {row.label}: {row.predicted:.4g} for {row.published:.4g}.")
    return "\n".join(lines), unlisted


def _line(row: Row) -> str:
    if row.table in ("T1", "T2"):
        figures = f"{row.published:.2f} | {row.predicted:.2f}"
    elif row.published > 1000:
        figures = f"{row.published:,.0f} | {row.predicted:,.0f}"
    else:
        figures = f"{row.published:.3f} | {row.predicted:.3f}"
    deviation = f"{row.deviation:+.3f}" if row.absolute else f"{row.deviation:+.1%}"
    bounds = ["side of 1"] if row.same_side else []
    if row.limit is not None:
        bounds.insert(0, "exact" if row.kind == "exact" else f"{row.limit:.2f}" if row.absolute else f"{row.limit:.0%}")
    kept = "yes" if row.kept else "no, listed" if row.known else "NO"
    return f"| {row.table} ({row.kind}) | {row.label} | {figures} | {deviation} | {', '.join(bounds)} | {kept} |"
