"""Compiles kernels in parallel threads before they are needed: one by one, they cost most of a run's time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from ..split_gemm import compile_gemm
from ..split_moe import Workspace
from ..tiles import Tiles
from .shapes import Batch, Problem
from .sides import poisoned, problem_tiles, vllm_experts


def compile_all(jobs: Sequence[Callable[[], object]], workers: int) -> None:
    """Run jobs in threads; errors are left to the launch that meets them again."""
    if workers < 2:
        return
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.exception()


def gemms(problem: Problem, batch: Batch, tiles: Tiles, workspace: Workspace) -> list[Callable[[], object]]:
    """Calls that compile a layer's two GEMMs and launch nothing."""
    (w13, w2), ops = problem.tables, problem.ops()
    tokens, top_k = batch.ids.shape
    routes, width = tokens * top_k, ops.width(w13.rows)
    hidden, scale = ops.quantize(batch.hidden, None)
    second, second_scale = ops.quantize(workspace.activated[: routes * width].view(routes, width), None)
    blocks = ops.assign(batch.ids, tiles.block_m, w13.num_experts)
    gate_up, partial = (workspace.gemm[: routes * rows].view(routes, rows) for rows in (w13.rows, w2.rows))
    return [
        lambda: compile_gemm(hidden, w13, gate_up, blocks, tiles, top_k=top_k, a_scale=scale),
        lambda: compile_gemm(
            second, w2, partial, blocks, tiles, top_k=1, a_scale=second_scale, router_weights=batch.weights
        ),
    ]


def compile_shape(
    problem: Problem, counts: Sequence[int], folder: Path, workers: int, owns: Sequence[bool] = (False, True)
) -> None:
    """Our kernels and vLLM's for one layer and some numbers of tokens; what cannot be is left to those who launch it.

    Args:
        folder: of the tuned tables.
        owns: which tiles, as `problem_tiles` takes it.
    """
    jobs: list[Callable[[], object]] = []
    with suppress(torch.OutOfMemoryError):
        for tokens in counts:
            batch, room = problem.batch(tokens, 0), poisoned(problem, tokens)
            for tiles in dict.fromkeys(problem_tiles(problem, batch, own, folder) for own in owns):
                jobs += gemms(problem, batch, tiles, room)
            # vLLM's can only be compiled by a launch.
            jobs.append(partial(vllm_experts, problem, batch))
    # The first one alone: it loads Triton's driver.
    with suppress(Exception):
        jobs[0]()
    compile_all(jobs[1:], workers)
