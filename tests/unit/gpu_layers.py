"""MoE layers as vLLM leaves them on a rank, small and without vLLM's kernels, for simulated GPUs."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from vllm_dwdp.layers.routed_experts import DwdpExpertsMixin
from vllm_dwdp.layers.views.split import SplitTables

EXPERTS, LAYERS, HIDDEN, INNER = 5, 3, 128, 64
SHAPES = {"w13_weight": (2 * INNER, HIDDEN), "w2_weight": (HIDDEN, INNER), "w13_bias": (2 * INNER,)}


@cache
def weights(layer: int, name: str, experts: tuple[int, ...] = tuple(range(EXPERTS))) -> torch.Tensor:
    """[len(experts), *row]: what everybody agrees on."""
    seeded = torch.Generator().manual_seed(1000 * layer + list(SHAPES).index(name))
    return torch.randn(EXPERTS, *SHAPES[name], generator=seeded).to(torch.bfloat16)[list(experts)]


class Kernel:
    """vLLM's kernel object of a layer: what it saw when it was made."""

    def __init__(self, layer: Any) -> None:
        self.biases = len(layer.w13_bias)
        self.experts = (layer.moe_config.num_local_experts, layer.expert_map_manager)
        self.fused_experts = Fused()


class Fused:
    """`SplitExperts` of a layer: the tables it has, and which of them it is told to read."""

    def __init__(self) -> None:
        self.tables: SplitTables | None = None
        self.direct = False

    def attach_tables(self, pulled: Any, direct: Any = None) -> None:
        self.tables = SplitTables(pulled, direct)

    def detach_tables(self) -> None:
        self.tables = None

    def travels(self, tokens: int) -> bool:
        return False


class Method:
    """vLLM's method of an unquantised layer."""

    moe_block_shape = None

    def __init__(self) -> None:
        self.experts_cls: type | None = None
        self.moe_kernel: Any = None

    def _init_moe_kernel(self, layer: Any) -> None:
        self.moe_kernel = Kernel(layer)


class Plain(torch.nn.Module):
    """What `RoutedExperts` does that the mixin uses."""

    def update_expert_map_info(self) -> None:
        self.updated = True


class Experts(DwdpExpertsMixin, Plain):
    """A layer as vLLM leaves it: `share` loaded, which of an adopted one is an expert, and its kernel made for that."""

    def __init__(self, layer: int, share: tuple[int, ...]) -> None:
        torch.nn.Module.__init__(self)
        for name in SHAPES:
            setattr(self, name, torch.nn.Parameter(weights(layer, name, share).clone(), requires_grad=False))
        self.moe_config = SimpleNamespace(
            num_experts=EXPERTS,
            num_local_experts=len(share),
            hidden_dim=HIDDEN,
            intermediate_size_per_partition=INNER,
            is_act_and_mul=True,
        )
        self.expert_map_manager = "share"  # type: ignore[assignment]
        object.__setattr__(self, "_dwdp_whole_map", "whole")
        self.quant_method, self.top_k = Method(), 2
        self.dwdp_share, self.dwdp_layer, self.dwdp_gate, self.dwdp_tables = share, -1, None, None
        self.quant_method._init_moe_kernel(self)
