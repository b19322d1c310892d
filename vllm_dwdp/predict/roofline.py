"""Time of the operators of one step on one rank: max(FLOP / rate, bytes / bandwidth), by category."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dwdp.direct import expected_hits
from vllm_dwdp.predict.hardware_file import Hardware
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.work import Work


@dataclass(frozen=True)
class Local:
    """Seconds of one step's local work, over all layers; [samples]. The rows of the paper's T1.

    Embedding and head are part of dense.
    """

    attention: Any
    grouped: Any
    dense: Any
    others: Any

    @property
    def total(self) -> Any:
        """[samples]"""
        return self.attention + self.grouped + self.dense + self.others


def roof(flop: Any, moved: Any, rate: float, bandwidth: float) -> Any:
    """Seconds of an operator: `flop` at `rate`, or `moved` bytes at `bandwidth`, whichever is longer."""
    return np.maximum(np.asarray(flop) / rate, np.asarray(moved) / bandwidth)


def local_time(
    model: MoeModel,
    hardware: Hardware,
    work: Work,
    *,
    resident: float | None = None,
    split: int = 1,
    kv_element: float = 2.0,
    attention_compute: str = "bf16",
) -> Local:
    """One step's work of one rank, without any communication.

    resident: experts of a layer whose weights this rank reads (None: all E). Its tokens' experts are computed somewhere
    in any case, so FLOP do not change. split: ranks that share every operator (tensor parallelism); 1 for none.
    """
    eff = hardware.efficiency
    bandwidth = hardware.memory_bandwidth * eff.memory
    tokens = work.tokens
    held = model.experts if resident is None else resident
    # With experts spread over ranks, each rank's experts see the tokens of all of them.
    arriving = tokens * model.experts / held if held else tokens
    hit = expected_hits(model.experts, model.top_k, arriving, of=held)

    def product(params: float, per_token: Any, fmt_bytes: float, compute: str, efficiency: float) -> Any:
        flop = 2.0 * params * per_token
        return roof(flop, params * fmt_bytes, hardware.rate(compute) * efficiency, bandwidth) / split

    attention: Any = 0.0
    dense: Any = 0.0
    grouped: Any = 0.0
    for group in model.groups:
        core = group.attention
        pairs = core.pairs(work.new, work.context).sum(axis=1)
        span = np.minimum(work.context, core.window) if core.window else work.context
        cached = span.sum(axis=1) * core.kv_elements() * kv_element
        rate = hardware.rate(attention_compute) * eff.matmul
        seconds = roof(pairs * core.core_flop_per_pair(absorbed=work.decode), cached, rate, bandwidth)
        # Tensor parallelism splits heads; MLA's latent cache has none and is read by every rank.
        attention = attention + group.count * seconds / split
        fmt = model.attention_format
        params = core.projection_params(model.hidden)
        dense = dense + group.count * product(params, tokens, fmt.bytes, fmt.compute, eff.matmul)
        mlp = model.mlp_format
        if group.is_moe:
            if model.shared_params:
                dense = dense + group.count * product(model.shared_params, tokens, mlp.bytes, mlp.compute, eff.matmul)
            flop = 2.0 * tokens * model.top_k * model.expert_params
            moved = hit * model.expert_bytes
            seconds = roof(flop, moved, hardware.rate(model.expert_format.compute) * eff.grouped, bandwidth)
            grouped = grouped + group.count * seconds / split
        elif model.dense_params:
            dense = dense + group.count * product(model.dense_params, tokens, mlp.bytes, mlp.compute, eff.matmul)
    dense = dense + product(model.vocab * model.hidden, work.sequences, 2.0, "bf16", eff.matmul)
    # Norms, residuals, activations, quantisation: not split by tensor parallelism.
    others = tokens * model.hidden * 2.0 * eff.elementwise_passes * model.layers / bandwidth
    return Local(attention, grouped, dense, others)
