"""The class that vLLM's modular MoE layer calls for experts in split memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.modular_kernel import ExpertTokensMetadata
from vllm.model_executor.layers.quantization.utils.fp8_utils import is_deep_gemm_e8m0_used

from vllm_dwdp.errors import DwdpError

from . import vllm_ops
from .arguments import Assignment
from .compile_ahead import compile_layer
from .configs import layer_shape, tiles_for
from .direct_tiles import direct_tiles_for
from .requester import Journey
from .split_moe import Workspace, check_layer, split_experts
from .tiles import Tiles
from .torch_ops import MoeOps, QuantKind
from .weight_table import Scales, WeightTable


class _LayerOps:
    """`MoeOps` as `TritonExperts.apply` of vLLM 0.32.0 composes them, for one activation."""

    def __init__(self, experts: SplitExperts, activation: MoEActivation) -> None:
        self._experts = experts
        self._activation = activation
        self._fused = (
            activation == MoEActivation.SILU
            and experts.activation_config.clamp_limit is None
            and experts.quant_kind == "block"
            and experts.block_shape == [128, 128]
            and not is_deep_gemm_e8m0_used()
        )

    def assign(self, topk_ids: torch.Tensor, block_m: int, num_experts: int) -> Assignment:
        return vllm_ops.assign(topk_ids, block_m, num_experts)

    def width(self, rows: int) -> int:
        return int(self._experts.adjust_N_for_activation(rows, self._activation))

    def activate(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        self._experts.activation(self._activation, out, gate_up)

    def quantize(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        block = self._experts.block_shape
        return vllm_ops.quantize(x, scale, self._experts.quant_kind, block[1] if block else 0)

    def activate_quantize(
        self, out: torch.Tensor, gate_up: torch.Tensor, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._fused:
            quantized: tuple[torch.Tensor, torch.Tensor | None] = _custom_ops.silu_and_mul_per_block_quant(
                gate_up, group_size=128, quant_dtype=torch.float8_e4m3fn
            )
            return quantized
        self.activate(out, gate_up)
        return self.quantize(out, scale)

    def reduce(self, partial: torch.Tensor, out: torch.Tensor) -> None:
        self._experts.moe_sum(partial, out)


class SplitExperts(TritonExperts):
    """vLLM's Triton experts with weights by address table; everything but the two GEMMs is vLLM's.

    vLLM reads shapes from the w1 and w2 that it passes (`moe_problem_size`, `local_num_experts`, checks of its callers), and
    nothing else here does. Give the layer's parameters stand-ins of the shapes [E, 2 I, H] and [E, H, I] in the weights'
    dtype; `stand_in` makes them, a single row expanded. Nothing may read or write their elements.
    Workspaces are vLLM's, of the sizes that `TritonExperts.workspace_shapes` asks for.

    Attributes:
        quant_kind: how activations are quantised.
        direct: whether to compute from the second pair of tables, whose missing experts lie in peers' memory.
        journey: how forwards of few tokens that are `direct` have owners compute; None where all is read directly.
        gives_way: whether this rank computes for others just now. A persistent kernel has its multiprocessors until its
            end, and theirs would wait for it; the pointer kernel gives the same bits.
    """

    def __init__(self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig) -> None:
        super().__init__(moe_config, quant_config)
        self._tables: tuple[WeightTable, WeightTable] | None = None
        self._direct: tuple[WeightTable, WeightTable] | None = None
        self.direct = False
        self.journey: Journey | None = None
        self.gives_way: Callable[[], bool] = lambda: False
        self._tiles: dict[tuple[int, int, bool], tuple[Tiles, Tiles]] = {}
        self._ops: dict[MoEActivation, _LayerOps] = {}
        self.quant_kind = _quant_kind(quant_config)

    @staticmethod
    def supports_lora() -> bool:
        """Not over split memory."""
        return False

    def attach_tables(
        self, tables: tuple[WeightTable, WeightTable], direct: tuple[WeightTable, WeightTable] | None = None
    ) -> None:
        """Compute with these (w13, w2) from now on; before the first forward and before CUDA graphs are captured.

        direct: the same experts for forwards that are told so by the attribute `direct`; without them none may be.
        Biases that the tables lack are taken from vLLM's quantisation config, as dense [E, rows] tensors: attach again if
        those move.

        Raises:
            DwdpError: tables that do not fit each other or the layer's quantisation.
        """
        self._tables = self._checked(tables)
        self._direct = None if direct is None else self._checked(direct)
        self._tiles.clear()

    def _checked(self, tables: tuple[WeightTable, WeightTable]) -> tuple[WeightTable, WeightTable]:
        w13, w2 = tables
        if w13.num_experts != w2.num_experts or w13.cols != w2.rows or w13.dtype != w2.dtype:
            check_layer(w13, w2, w2.cols)
        if (w13.dtype == torch.float8_e4m3fn) != (self.quant_kind != "none"):
            raise DwdpError(f"tables of {w13.dtype} for a layer whose activations are quantised {self.quant_kind!r}")
        return _with_bias(w13, self.w1_bias), _with_bias(w2, self.w2_bias)

    def detach_tables(self) -> None:
        """Compute no more, but raise, until tables are attached again."""
        self._tables = self._direct = None

    def tiles(self, num_tokens: int, top_k: int) -> Tiles:
        """Tiles for a batch. Where tokens travel, those of what owners compute."""
        return self.all_tiles(num_tokens, top_k)[self.gives_way()]

    def all_tiles(self, num_tokens: int, top_k: int) -> tuple[Tiles, Tiles]:
        """Tiles for a batch, as a rule and where it gives way; looked up once per number of tokens."""
        if self.journey is not None and self.travels(num_tokens):
            num_tokens = self.journey.room(num_tokens)
        key = (num_tokens, top_k, self.direct)
        if key not in self._tiles:
            w13, w2 = self.tables
            block = tuple(self.block_shape) if self.block_shape else None
            shape = layer_shape(w13, w2, top_k)
            choose = direct_tiles_for if self.direct else tiles_for
            tiles = choose(shape, num_tokens, w13.addresses.device, block)  # type: ignore[arg-type]
            self._tiles[key] = tiles, replace(tiles, kernel="pointer")
        return self._tiles[key]

    def travels(self, num_tokens: int) -> bool:
        """Whether owners are asked to compute for a batch of this size."""
        journey = self.journey if self.direct else None
        return journey is not None and journey.least_tokens <= num_tokens <= journey.most_tokens

    def ops(self, activation: MoEActivation) -> MoeOps:
        """vLLM's own, for one activation."""
        found = self._ops.get(activation)
        if found is None:
            found = self._ops[activation] = _LayerOps(self, activation)
        return found

    def workspace_shapes(self, M: int, N: int, K: int, topk: int, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's `TritonExperts`; both products have rows of their own where tokens travel."""
        first, second, output = super().workspace_shapes(M, N, K, topk, *args, **kwargs)
        return first, (M, topk, N + K) if self.travels(M) else second, output

    def compile(self, num_tokens: int, top_k: int) -> None:
        """Have Triton compile what `apply` launches for a batch of this size, and launch nothing."""
        quantized = self.quant_kind != "none"
        dtype = torch.bfloat16 if quantized else self.tables[0].dtype
        single = False if self.travels(num_tokens) else None
        for tiles in dict.fromkeys(self.all_tiles(num_tokens, top_k)[: 1 if self.journey is None else 2]):
            compile_layer(self.tables, tiles, num_tokens, top_k, self.quant_kind, dtype, single)

    @property
    def tables(self) -> tuple[WeightTable, WeightTable]:
        """(w13, w2) that it computes from; raises DwdpError where there are none."""
        tables = self._direct if self.direct else self._tables
        if tables is None:
            raise DwdpError("SplitExperts has no weights yet: call attach_tables before the first forward")
        return tables

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """As vLLM's `TritonExperts.apply`, on the attached tables; w1 and w2 are stand-ins and not looked at."""
        w13, down = self.tables
        if expert_map is not None or self._lora_context is not None:
            what = "an expert map" if expert_map is not None else "LoRA"
            raise DwdpError(
                f"split-weight experts with {what}: the tables hold all {w13.num_experts} experts, without LoRA"
            )
        ops, tiles = self.ops(activation), self.tiles(*topk_ids.shape)
        a1_scale = a1q_scale if a1q_scale is not None else self.a1_scale
        workspace = Workspace(workspace13, workspace2)
        if self.journey is not None and self.travels(topk_ids.shape[0]):
            self.journey.experts(
                hidden_states, (w13, down), topk_weights, topk_ids, ops=ops, tiles=tiles, workspace=workspace, out=output,
                a1_scale=a1_scale,
            )  # fmt: skip
            return
        quantized = hidden_states.dtype == torch.float8_e4m3fn
        split_experts(
            hidden_states,
            w13,
            down,
            topk_weights,
            topk_ids,
            ops=ops,
            tiles=tiles,
            # With weights on the input, vLLM's prepare step has already multiplied them.
            router_weight="none" if apply_router_weight_on_input else "output",
            a1_scale=a1_scale,
            a2_scale=a2_scale,
            workspace=workspace,
            out=output,
            compute_dtype=torch.bfloat16 if quantized else hidden_states.dtype,
        )


def _with_bias(table: WeightTable, bias: torch.Tensor | None) -> WeightTable:
    return table if table.bias is not None or bias is None else replace(table, bias=bias)


def _quant_kind(quant_config: FusedMoEQuantConfig) -> QuantKind:
    if quant_config.quant_dtype is None:
        return "none"
    if not quant_config.use_fp8_w8a8:
        raise DwdpError(
            f"no split-weight kernel for experts quantised to {quant_config.quant_dtype}: use weight_view contiguous"
        )
    if quant_config.block_shape:
        return "block"
    return "token" if quant_config.per_act_token_quant else "tensor"


def stand_in(table: WeightTable) -> torch.Tensor:
    """[E, rows, cols] of the table's dtype that holds a single row: shapes and strides for vLLM; never to be read."""
    row = torch.empty(table.cols, dtype=table.dtype, device=table.addresses.device)
    return row.expand(table.num_experts, table.rows, table.cols)


def scales_of(values: torch.Tensor, block_shape: list[int] | None, rows: int) -> Scales:
    """Dense scales as vLLM keeps them after loading, by their shape: block [E, ., .], channel [E, rows(, 1)], tensor [E]."""
    if block_shape:
        return Scales("block", values, (block_shape[0], block_shape[1]))
    kind: Any = "channel" if values.ndim > 1 and values.shape[1] == rows and rows > 1 else "tensor"
    return Scales(kind, values)
