"""Times of a step as plain functions of its tokens, taken from the planner once and cheap to call a million times."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, NamedTuple

import numpy as np

from vllm_dwdp.predict.decode import layer_costs, travel_layer
from vllm_dwdp.predict.hardware_file import Hardware
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.strategies import PLAIN, Options, balanced_share, dispatch_element, dwdp, remote_copies
from vllm_dwdp.predict.travel import LAUNCHES_S, Few
from vllm_dwdp.predict.work import Lengths, prefill


class Chunk(NamedTuple):
    """What a step computes. pairs: (query, key) pairs of prefill, per window of the model. decode_context: tokens that
    decoding requests look back on, summed.
    """

    tokens: int
    pairs: tuple[float, ...]
    sequences: int
    decode_context: float


class StepCost:
    """Seconds of a rank's local work for a chunk: the planner's roofline with its constants folded in.

    resident: experts whose weights are read (None: all). split: ranks that share every product (tensor parallelism).
    """

    def __init__(
        self,
        model: MoeModel,
        hardware: Hardware,
        *,
        resident: float | None = None,
        split: int = 1,
        options: Options = PLAIN,
    ) -> None:
        eff = hardware.efficiency
        bandwidth = hardware.memory_bandwidth * eff.memory
        self.windows = tuple(dict.fromkeys(g.attention.window for g in model.groups))
        self._attention = []
        dense: dict[tuple[float, float], float] = {}

        def add(params: float, fmt_bytes: float, compute: str, count: int) -> None:
            key = (2.0 * params / (hardware.rate(compute) * eff.matmul) / split, params * fmt_bytes / bandwidth / split)
            dense[key] = dense.get(key, 0.0) + count

        for group in model.groups:
            core = group.attention
            rate = hardware.rate(options.attention_compute) * eff.matmul
            read = core.kv_elements() * options.kv_element / bandwidth
            self._attention.append((
                self.windows.index(core.window),
                group.count * core.core_flop_per_pair() / rate / split,
                # Decode: the latent space for MLA, and whichever is longer of its products and its reads.
                    group.count * max(core.core_flop_per_pair(absorbed=True) / rate, read) / split,
                core.window,
            ))  # fmt: skip
            fmt, mlp = model.attention_format, model.mlp_format
            add(core.projection_params(model.hidden), fmt.bytes, fmt.compute, group.count)
            if group.is_moe and model.shared_params:
                add(model.shared_params, mlp.bytes, mlp.compute, group.count)
            elif not group.is_moe:
                add(model.dense_params, mlp.bytes, mlp.compute, group.count)
        self._dense = [(flop, read, count) for (flop, read), count in dense.items()]
        head = model.vocab * model.hidden
        self._head = (2.0 * head / (hardware.rate("bf16") * eff.matmul) / split, head * 2.0 / bandwidth / split)
        self._others = model.hidden * 2.0 * eff.elementwise_passes * model.layers / bandwidth
        held = model.experts if resident is None else resident
        self._arriving = model.experts / held
        self._miss = 1 - model.top_k / model.experts
        rate = hardware.rate(model.expert_format.compute) * eff.grouped
        self._expert_flop = 2.0 * model.top_k * model.expert_params / rate / split * model.moe_layers
        self._expert_read = held * model.expert_bytes / bandwidth / split * model.moe_layers

    def experts(self, tokens: float) -> float:
        """Seconds of the routed experts."""
        read = (
            self._expert_read * (1 - self._miss ** (tokens * self._arriving))
            if tokens * self._arriving < 5000
            else self._expert_read
        )
        return max(self._expert_flop * tokens, read)

    def rest(self, chunk: Chunk) -> float:
        """Seconds of everything else."""
        n = chunk.tokens
        if n == 0:
            return 0.0
        total = self._others * n + max(self._head[0] * chunk.sequences, self._head[1])
        for flop, read, count in self._dense:
            total += count * max(flop * n, read)
        for index, per_pair, per_token, window in self._attention:
            span = chunk.decode_context if window is None else min(chunk.decode_context, window * chunk.sequences)
            total += per_pair * chunk.pairs[index] + per_token * span
        return total

    def seconds(self, chunk: Chunk) -> float:
        """All local work."""
        return self.rest(chunk) + self.experts(chunk.tokens) if chunk.tokens else 0.0


class DwdpCurve:
    """Seconds of a DWDP step by the seconds of its local work, from the planner: interference and exposed waits."""

    def __init__(
        self,
        model: MoeModel,
        hardware: Hardware,
        ranks: int,
        share: int | None,
        merge: bool,
        options: Options,
    ) -> None:
        cost = StepCost(model, hardware, options=options)
        points: list[tuple[float, float, float]] = []
        for tokens in np.unique(np.geomspace(1, 262144, 48).round().astype(int)):
            work = prefill(Lengths(int(min(tokens, 8192))), int(tokens))
            pairs = tuple(float(np.sum(_pairs(model, w, work.new, work.context))) / len(work.new) for w in cost.windows)
            alone = cost.seconds(Chunk(int(tokens), pairs, work.sequences, 0.0))
            step = dwdp(model, hardware, work, ranks, share, merge=merge, options=options)
            points.append((alone, step.seconds, step.exposed))
        points.sort()
        self._x = [p[0] for p in points]
        self._y = [p[1] for p in points]
        self._exposed = [p[2] for p in points]

    def __call__(self, alone: float) -> tuple[float, float]:
        """(seconds of the step, seconds of it exposed)."""
        x = self._x
        i = min(max(bisect_right(x, alone), 1), len(x) - 1)
        part = (alone - x[i - 1]) / (x[i] - x[i - 1])
        step = self._y[i - 1] + part * (self._y[i] - self._y[i - 1])
        wait = self._exposed[i - 1] + part * (self._exposed[i] - self._exposed[i - 1])
        wait = max(0.0, wait)
        return max(step, alone + wait), wait


class FewCosts:
    """Seconds of the routed experts of all layers in DWDP's steps of few tokens, which travel or read directly."""

    def __init__(self, model: MoeModel, hardware: Hardware, ranks: int, share: int | None, few: Few) -> None:
        held = balanced_share(model.experts, ranks) if share is None else share
        self.most = max(few.travel, few.direct)
        self._few, self._layers, self._known = few, model.moe_layers, dict[int, float]()
        self._costs = layer_costs(model, hardware, ranks, held)
        self._travel = travel_layer(model, hardware, ranks, self._costs)

    def experts(self, tokens: int) -> float:
        """Of a step with that many, `most` at most."""
        if tokens not in self._known:
            travels = self._few.way(tokens) == "travel"
            layer = self._travel.seconds(tokens) if travels else self._costs.direct_s(tokens) + LAUNCHES_S
            self._known[tokens] = layer * self._layers
        return self._known[tokens]


def _pairs(model: MoeModel, window: int | None, new: Any, context: Any) -> Any:
    attention = next(g.attention for g in model.groups if g.attention.window == window)
    return attention.pairs(new, context)


def dep_collectives(model: MoeModel, hardware: Hardware, ranks: int) -> tuple[float, float]:
    """(seconds per token of a rank, seconds per step) of DEP's collectives."""
    moved = remote_copies(ranks, model.top_k) * model.hidden * (dispatch_element(model) + 2.0)
    return model.moe_layers * moved / hardware.pull_rate(ranks), model.moe_layers * 2 * hardware.link_latency


def tp_collectives(model: MoeModel, hardware: Hardware, ranks: int) -> tuple[float, float]:
    """(seconds per token of the group, seconds per step) of tensor parallelism's all-reduces."""
    moved = 2 * (ranks - 1) / ranks * model.hidden * 2.0
    return 2 * model.layers * moved / hardware.pull_rate(ranks), 2 * model.layers * 2 * hardware.link_latency
