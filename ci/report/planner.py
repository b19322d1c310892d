"""The planner's prefill step with a host term, and the fit of its terms, for calibrate.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np

from ci.bench.prefill import REAL
from examples.checkpoints.spec import VOCAB_SIZE
from vllm_dwdp.predict.fit import least_squares
from vllm_dwdp.predict.hardware_file import Hardware
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.read_config import parse_model
from vllm_dwdp.predict.verdict import Case
from vllm_dwdp.predict.work import Lengths

#: The terms that may be fitted together, the fewest first.
SETS: Final[tuple[tuple[str, ...], ...]] = (
    (), ("matmul",), ("host",), ("matmul", "grouped"), ("matmul", "host"), ("matmul", "grouped", "host"),
)  # fmt: skip
#: A set is as good as the best one if its error is no more than this many times as large (plus a thousandth).
SAME: Final = 1.1
HOST_START_MS: Final = 5.0
#: A fit that has run to 1 begins anew here.
MOST_EFFICIENT: Final = 0.99


class Point(NamedTuple):
    """Steps of one prompt. share, gbs: experts held and GB/s of the link, None for plain vLLM.

    waited: milliseconds a step that compute stood still for pulls, as the ranks counted them. spread: mean distance of
    the turns from their median, by it.
    """

    job: str
    tokens: int
    share: int | None
    view: str
    gbs: float | None
    ms: float
    waited: float
    spread: float


@dataclass(frozen=True)
class Terms:
    """What may be fitted. Shares of the peak; `host` in milliseconds a step."""

    matmul: float
    grouped: float
    host: float = 0.0


def qwen3_layers() -> MoeModel:
    """The checkpoint of ci/bench/prefill.py: a few layers of Qwen3-30B-A3B's shape, a small vocabulary."""
    sizes = {
        "model_type": "qwen3_moe", "vocab_size": VOCAB_SIZE, "hidden_size": REAL["hidden"], "head_dim": REAL["head_dim"],
        "num_hidden_layers": REAL["num_layers"], "num_attention_heads": REAL["num_heads"],
        "num_key_value_heads": REAL["num_kv_heads"], "num_experts": REAL["num_experts"],
        "num_experts_per_tok": REAL["top_k"], "moe_intermediate_size": REAL["intermediate"],
        "intermediate_size": 2 * REAL["intermediate"], "max_position_embeddings": REAL["max_position"],
        "tie_word_embeddings": False,
    }  # fmt: skip
    return parse_model(sizes, f"{REAL['num_layers']} layers of Qwen3-30B-A3B")


def halves(all_points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """(to fit, held out), as on a chess board of jobs and lengths, so that both halves see every job and every length."""
    jobs = sorted({point.job for point in all_points})
    lengths = sorted({point.tokens for point in all_points})
    parts: tuple[list[Point], list[Point]] = ([], [])
    for point in sorted(all_points):
        parts[(jobs.index(point.job) + lengths.index(point.tokens)) % 2].append(point)
    return parts


class Planner(NamedTuple):
    """The planner's step with a host term."""

    model: MoeModel
    hardware: Hardware
    ranks: int = 2

    def shipped(self) -> Terms:
        """As the hardware file has them."""
        return Terms(self.hardware.efficiency.matmul, self.hardware.efficiency.grouped)

    def predict(self, point: Point, terms: Terms) -> tuple[float, float]:
        """(milliseconds of the step, those in which compute waits for pulls). Pulls are hidden by compute and host."""
        chip = self.hardware.with_efficiency(matmul=terms.matmul, grouped=terms.grouped)
        if point.gbs is not None:
            chip = replace(chip, link_rate=point.gbs * 1e9, topology="switch").with_efficiency(link=1.0)
        case = Case(self.model, chip, self.ranks, Lengths(point.tokens), point.tokens, point.share, view=point.view)
        step = case.step("DP" if point.share is None else "DWDP")
        busy = (step.compute + step.merge) * 1e3 + terms.host
        exposed = max(0.0, step.pull * 1e3 - busy)
        return busy + exposed, exposed

    def errors(self, some: Sequence[Point], terms: Terms) -> Any:
        """Predicted by measured, less 1."""
        return np.array([self.predict(point, terms)[0] / point.ms - 1 for point in some])

    def rms(self, some: Sequence[Point], terms: Terms) -> float:
        """Typical error: root mean square of logarithms, so that half and double are as wrong as each other."""
        return float(np.sqrt(np.mean(np.log1p(self.errors(some, terms)) ** 2)))

    def fit(self, some: Sequence[Point], names: Sequence[str], near: Terms | None = None) -> Terms:
        """The terms `names` fitted to `some`, the rest as shipped. near: where to begin."""
        start = near or replace(self.shipped(), host=HOST_START_MS if "host" in names else 0.0)

        def terms(values: Any) -> Terms:
            # x / (1 + x): no efficiency may exceed 1.
            pairs = zip(names, (float(value) for value in values), strict=True)
            return replace(start, **{name: x if name == "host" else x / (1 + x) for name, x in pairs})

        def residuals(values: Any) -> Any:
            return np.log1p(self.errors(some, terms(values)))

        begin = [(name, min(getattr(start, name), MOST_EFFICIENT if name != "host" else np.inf)) for name in names]
        values = [x if name == "host" else x / (1 - x) for name, x in begin]
        return terms(least_squares(residuals, values)) if names else start

    def left_out(self, some: Sequence[Point], names: Sequence[str]) -> float:
        """Typical error of each point when `names` are fitted to the others."""
        near = self.fit(some, names)
        each = [(point, [other for other in some if other is not point]) for point in some]
        return float(np.sqrt(np.mean([self.rms([point], self.fit(rest, names, near)) ** 2 for point, rest in each])))

    def choose(self, some: Sequence[Point]) -> tuple[str, ...]:
        """The fewest terms worth fitting, by the points given alone."""
        typical = {names: self.left_out(some, names) for names in SETS if len(names) < len(some) - 1}
        return next(names for names, error in typical.items() if error <= SAME * min(typical.values()) + 1e-3)
