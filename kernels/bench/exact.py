"""Compares one batch's results, by vLLM and by our kernels, with float64: what `accuracy` runs for every case."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..tiles import Tiles
from .reference import Rounding, reference_experts
from .shapes import BLOCK, Batch, Problem
from .sides import describe, own_experts, poisoned, problem_tiles, vllm_experts

#: Tokens of a batch whose result is compared with float64.
SAMPLED = 128
#: How much farther off than vLLM ours may be: other tiles sum in another order.
FACTOR, SLACK = 1.1, 1e-4
#: A token's limit, by the limit of all.
ONE_TOKEN = 1.5


class Limits(NamedTuple):
    """Largest errors, relative. modelled: with FP8 blocks; elsewhere `error` once more."""

    error: float
    modelled: float


#: About 1.5 to 2.3 times what rounding costs on such data: four roundings to bf16 are 0.4 %, FP8's three bits of mantissa in
#: both GEMMs' inputs 4.3 %; against a reference that has these too, values that fell to the other neighbour 1.6 %.
LIMITS = {"none": Limits(1e-2, 1e-2), "block": Limits(6.5e-2, 2.5e-2)}


@dataclass(frozen=True)
class Row:
    """One result of one case; errors are relative. broken: the limits that it broke, in words."""

    model: str
    shape: str
    tokens: int
    seed: int
    who: str
    tiles: str
    error: float
    worst: float
    modelled: float | None
    apart: float
    bitwise: bool
    broken: list[str]

    @classmethod
    def lost(cls, model: str, shape: str, tokens: int, seed: int, said: str) -> Row:
        """Of a case that could not be computed."""
        nan = float("nan")
        return cls(model, shape, tokens, seed, "none", "", nan, nan, None, nan, False, [said])


def distance(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(of all, of the worst row) ||found - expected|| / ||expected||, both [M, H]; NaN where there is one."""
    overall, size, worst = 0.0, 0.0, []
    for mine, theirs in zip(found.split(4096), expected.split(4096), strict=True):
        wide = theirs.double()
        off, norm = ((x * x).sum(1) for x in (mine.double() - wide, wide))
        overall, size = overall + float(off.sum()), size + float(norm.sum())
        worst.append((off / norm.clamp(min=1e-300)).max())
    return (overall / max(size, 1e-300)) ** 0.5, float(torch.stack(worst).max()) ** 0.5


def references(problem: Problem, batch: Batch) -> list[torch.Tensor]:
    """float64 [M, H]: of exact activations; with FP8 blocks also of activations quantised as the kernels do."""

    def quantized(x: torch.Tensor) -> torch.Tensor:
        # By the very operation that the kernels' inputs come from: vLLM may round scales to powers of two.
        stored, scale = problem.ops().quantize(x.to(problem.dtype).contiguous(), None)
        assert scale is not None
        return stored.float().double() * scale.double().repeat_interleave(BLOCK, 1)[:, : x.shape[1]]

    w13, w2 = problem.wide(torch.float64)
    roundings: list[Rounding | None] = [None, quantized] if problem.model.quant == "block" else [None]
    return [
        reference_experts(
            batch.hidden, w13, w2, batch.weights, batch.ids, problem.model.activation, bias13=problem.biases[0],
            bias2=problem.biases[1], rounding=rounding, dtype=torch.float64,
        )
        for rounding in roundings
    ]  # fmt: skip


def stale_nan(problem: Problem, tokens: int) -> None:
    """Leave NaN in the freed memory that vLLM's workspaces and result will probably be."""
    model, routes = problem.model, tokens * problem.model.top_k
    sizes = (routes * max(2 * model.width, model.hidden), routes * model.width, tokens * model.hidden)
    # All at once: one after the other would be one piece of memory.
    _ = [torch.full((size,), float("nan"), dtype=problem.dtype, device=problem.device) for size in sizes]


def case(problem: Problem, tokens: int, seed: int, folder: Path) -> list[Row]:
    """Compute, compare and judge one number of tokens."""
    model, limits = problem.model, LIMITS[problem.model.quant]
    batch = problem.batch(tokens, seed)
    start, tuned = (problem_tiles(problem, batch, own, folder) for own in (False, True))
    stale_nan(problem, tokens)
    results: dict[str, tuple[Tiles, torch.Tensor]] = {"vLLM": (start, vllm_experts(problem, batch))}
    for who, tiles in [("same", start)] + [("tuned", tuned)] * (tuned != start):
        out = torch.full_like(batch.hidden, float("nan"))
        own_experts(problem, batch, tiles, workspace=poisoned(problem, tokens), out=out)
        results[who] = (tiles, out)
    picked = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:SAMPLED].sort().values
    rows = picked.to(problem.device)
    expected = references(problem, Batch(*(part[rows] for part in batch)))
    base = results["vLLM"][1]
    base_error, found = 0.0, []
    for who, (tiles, result) in results.items():
        error, worst = distance(result[rows], expected[0])
        modelled = distance(result[rows], expected[1])[0] if len(expected) > 1 else None
        apart, bitwise = distance(result, base)[1], torch.equal(result, base)
        broken = []
        if missing := int((~torch.isfinite(result)).sum()):
            broken.append(f"{missing} values not written, or not finite")
        if not error <= limits.error:
            broken.append(f"error above {limits.error}")
        if not worst <= ONE_TOKEN * limits.error:
            broken.append(f"a token's error above {ONE_TOKEN * limits.error:.3f}")
        if modelled is not None and not modelled <= limits.modelled:
            broken.append(f"modelled error above {limits.modelled}")
        if who == "vLLM":
            base_error = error
        elif not error <= FACTOR * base_error + SLACK:
            broken.append(f"error above {FACTOR} times vLLM's")
        if not apart <= 2 * ONE_TOKEN * limits.modelled:
            broken.append(f"a token {apart:.3f} from vLLM's")
        if who == "same" and not bitwise:
            broken.append("not vLLM's bits")
        found.append(
            Row(model.name, model.key(problem.dtype), tokens, seed, who, describe(tiles), error, worst, modelled, apart,
                bitwise, broken)
        )  # fmt: skip
    return found
