"""Fit the five constants to blog 19's table 1 and the paper's T1, and to nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from vllm_dwdp.predict.fitted import Fitted
from vllm_dwdp.predict.paper_model import blog, t1
from vllm_dwdp.predict.published import BLOG, T1, T1_TOTAL

START: Final = Fitted(0.9, 0.8, 0.85, 60.0, 0.15)
# A residual of 1 is an error as large as the promised tolerance.
BLOG_TOLERANCE: Final = 0.03
T1_TOTAL_TOLERANCE: Final = 0.03
T1_ROW_TOLERANCE: Final = 0.10


def residuals(constants: Any) -> Any:
    """Relative errors over their tolerances: 8 of the blog's table, 12 rows and 2 totals of T1."""
    c = Fitted(*(float(x) for x in constants))
    out = []
    for tokens, published in BLOG.items():
        out += [(got / want - 1) / BLOG_TOLERANCE for got, want in zip(blog(c, tokens), published, strict=True)]
    for column, step in enumerate(t1(c)):
        for row, values in T1.items():
            if values[column]:
                out.append((getattr(step, row) * 1e3 / values[column] - 1) / T1_ROW_TOLERANCE)
        out.append((step.seconds * 1e3 / T1_TOTAL[column] - 1) / T1_TOTAL_TOLERANCE)
    return np.array(out)


def least_squares(function: Callable[[Any], Any], start: Any, rounds: int = 40) -> Any:
    """Levenberg-Marquardt with numeric derivatives in relative steps; for a handful of positive parameters."""
    x = np.array(start, dtype=float)
    r, damping = function(x), 1e-2
    for _ in range(rounds):
        steps = 1e-4 * np.abs(x) + 1e-9
        jacobian = np.stack([(function(x + d) - r) / s for d, s in zip(np.diag(steps), steps, strict=True)], axis=1)
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ r
        moved = False
        for _ in range(12):
            candidate = x - np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-12), gradient)
            if np.all(candidate > 0):
                new = function(candidate)
                if new @ new < r @ r:
                    moved = bool(r @ r - new @ new > 1e-10 * (r @ r))
                    x, r, damping = candidate, new, damping / 3
                    break
            damping *= 4
        if not moved:
            break
    return x


def fit() -> Fitted:
    """The constants, fitted afresh (a second)."""
    return Fitted(*(float(v) for v in least_squares(residuals, START)))
