"""A layer of `shapes` computed by vLLM and by our kernels, and how far results are from a float32 reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..configs import layer_shape, tiles_for
from ..split_moe import Workspace, split_experts
from ..tables import FOLDER
from ..tiles import Tiles
from ..torch_ops import quantize_fp8
from .reference import reference_experts
from .shapes import BLOCK, Batch, Problem

#: Words of errors after which a process can launch nothing more.
LOST = ("illegal", "misaligned", "unspecified launch failure")
#: Tokens of a batch that the reference computes.
SAMPLED = 32


def describe(tiles: Tiles) -> str:
    """Short: 128x128x64 g16 8w3s."""
    own = "" if tiles.kernel == "pointer" else f" {tiles.kernel}"
    own += "" if tiles.spread == 1 else f" spread {tiles.spread}"
    return (
        f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k} g{tiles.group_m} {tiles.num_warps}w{tiles.num_stages}s{own}"
    )


def quant_config(problem: Problem) -> Any:
    """vLLM's description of a problem's quantisation: FP8 blocks or none, scales, biases."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

    fp8 = problem.model.quant == "block"
    return FusedMoEQuantConfig.make(
        torch.float8_e4m3fn if fp8 else None,
        block_shape=[BLOCK, BLOCK] if fp8 else None,
        w1_scale=problem.scales[0],
        w2_scale=problem.scales[1],
        w1_bias=problem.biases[0],
        w2_bias=problem.biases[1],
    )


def vllm_experts(problem: Problem, batch: Batch, tiles: Tiles | None = None) -> torch.Tensor:
    """The layer by vLLM, with `tiles` or those that it chooses; on a CPU by our kernel, over contiguous experts."""
    if problem.device.type != "cuda":
        return own_experts(problem, batch, tiles or problem_tiles(problem, batch, own=False), scattered=False)
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    from ..vllm_ops import under_config

    w13, w2 = problem.dense
    config = quant_config(problem)
    activation = MoEActivation.from_str(problem.model.activation.kind)

    def call() -> torch.Tensor:
        result: torch.Tensor = fused_experts(
            batch.hidden, w13, w2, batch.weights, batch.ids, activation=activation, quant_config=config
        )
        return result

    return under_config(tiles.to_vllm() if tiles else None, call)


def own_experts(
    problem: Problem,
    batch: Batch,
    tiles: Tiles,
    scattered: bool = True,
    workspace: Workspace | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer by our kernels."""
    w13, w2 = problem.tables if scattered else problem.contiguous
    return split_experts(
        batch.hidden, w13, w2, batch.weights, batch.ids, ops=problem.ops(), tiles=tiles, workspace=workspace, out=out
    )


def poisoned(problem: Problem, tokens: int) -> Workspace:
    """A workspace full of NaN, so that rows that no kernel wrote are seen."""
    w13, w2 = problem.tables
    like = torch.empty(0, dtype=problem.dtype, device=problem.device)
    made = Workspace.allocate(tokens * problem.model.top_k, problem.ops().width(w13.rows), w13, w2, like)
    for memory in (made.activated, made.gemm):
        memory.fill_(float("nan"))
    return made


def problem_tiles(problem: Problem, batch: Batch, own: bool, folder: Path = FOLDER) -> Tiles:
    """vLLM's choice for this batch, or ours by the tables in `folder`."""
    block = (BLOCK, BLOCK) if problem.model.quant == "block" else None
    shape = layer_shape(problem.tables[0], problem.tables[1], problem.model.top_k)
    return tiles_for(shape, batch.hidden.shape[0], problem.device, block, own=own, folder=folder)


def errors(problem: Problem, batch: Batch, results: Sequence[torch.Tensor]) -> list[float]:
    """Of each result on the first tokens, relative to the largest value of the reference."""

    def rounding(x: torch.Tensor) -> torch.Tensor:
        if problem.model.quant == "none":
            return x.to(problem.dtype)
        stored, scale = quantize_fp8(x.to(problem.dtype), "block", BLOCK)
        return stored.float() * scale.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]

    w13, w2 = problem.wide()
    head = Batch(*(part[:SAMPLED] for part in batch))
    expected = reference_experts(
        head.hidden, w13, w2, head.weights, head.ids, problem.model.activation,
        bias13=problem.biases[0], bias2=problem.biases[1], rounding=rounding,
    )  # fmt: skip
    return [float((found[:SAMPLED].float() - expected).abs().max() / expected.abs().max()) for found in results]
