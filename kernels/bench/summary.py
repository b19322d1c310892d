"""What a bench found: its cells, their means per number of tokens, and how they stand beside vLLM's fastest backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .timing import lower_bound

GOAL_MEAN, GOAL_BOUND = 1.00, 0.97
#: In the tables for its share of the matrix rate; no model, so means leave it out where there are others.
NO_MODEL = "E256-bf16"
#: How modes are ordered and what their base is.
MODES = {
    "same": "vLLM's tiles on both sides",
    "own": "our tiles beside vLLM's choice",
    "alike": "our tiles beside vLLM with its choice or with our tiles, whichever is faster",
    "fastest": "the same beside vLLM's fastest backend that loads here",
}


@dataclass(frozen=True)
class Cell:
    """One shape and number of tokens. error: largest difference from the reference, by the largest value there.

    shape: key in a table of tiles. mode: one of `MODES`. tiles, base_tiles: ours and the base's. ratio: the median of
    `ratios`; bound: its lower 95 % bound. share: of the matrix rate of the weights' dtype in this run, 0 if not measured.
    bitwise: results equal to vLLM's with the base's tiles.
    """

    model: str
    shape: str
    tokens: int
    mode: str
    tiles: str
    base_tiles: str
    base_us: float
    own_us: float
    ratio: float
    bound: float
    tflops: float
    base_tflops: float
    share: float
    base_share: float
    bitwise: bool
    error: float
    base_error: float
    ratios: list[float]
    base: str = "Triton (fused_experts)"


def beside_fastest(cells: Sequence[Cell], answers: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The cells with our tiles once more, mode 'fastest': against the backend that `backends` found the fastest.

    The bound knows nothing of how sure the backend's own time is. vLLM's modular Triton is left out: its GEMMs are those of
    fused_experts, and in an engine ours gets the same kernels around them.

    Args:
        answers: what `kernels.backends` wrote on this machine: model, tokens, backend, and ratio (time of fused_experts,
            with vLLM's choice of tiles, by the backend's) where it ran.
    """
    ours = {(cell.model, cell.tokens): cell for mode in ("own", "alike") for cell in cells if cell.mode == mode}
    plain = {(cell.model, cell.tokens): cell.base_us for cell in cells if cell.mode in ("own", "same")}
    found = []
    for at, cell in ours.items():
        # Where vLLM with our tiles is the base, a backend has to be faster than that.
        gains = [
            (float(answer["ratio"]) * cell.base_us / plain[at], str(answer["backend"]))
            for answer in answers
            if answer["ratio"] and (answer["model"], answer["tokens"]) == at and "modular" not in answer["backend"]
        ]
        gain, name = max([(1.0, cell.base), *gains])
        ratios = [ratio / gain for ratio in cell.ratios]
        ratio, bound = lower_bound([ratios])
        scaled = replace(cell, mode="fastest", base=name, ratio=ratio, bound=bound, ratios=ratios)
        scaled = replace(scaled, base_us=cell.base_us / gain, base_tflops=cell.base_tflops * gain)
        tiles = cell.base_tiles if name == cell.base else ""
        found.append(replace(scaled, base_tiles=tiles, base_share=cell.base_share * gain))
    return found


def summarise(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Per mode and number of tokens: geometric mean over models and its lower 95 % bound, printed as they are."""
    rows = []
    order = list(MODES)
    for mode, tokens in sorted(
        {(cell.mode, cell.tokens) for cell in cells}, key=lambda key: (order.index(key[0]), key[1])
    ):
        at = [cell for cell in cells if (cell.mode, cell.tokens) == (mode, tokens)]
        chosen = [cell for cell in at if cell.model != NO_MODEL] or at
        mean, bound = lower_bound([cell.ratios for cell in chosen])
        good = mean >= GOAL_MEAN and bound >= GOAL_BOUND
        models = [cell.model for cell in chosen]
        rows.append(
            {
                "mode": mode,
                "tokens": tokens,
                "shapes": len(chosen),
                "models": models,
                "mean": mean,
                "bound": bound,
                "ok": good,
            }
        )
        print(
            f"{mode:<7} {tokens:>6} tokens, {len(chosen)} shapes: ratio {mean:.3f}, lower 95 % bound {bound:.3f}  "
            f"{'ok' if good else 'BELOW'}"
        )
    return rows
