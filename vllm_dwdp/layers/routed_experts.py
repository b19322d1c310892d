"""vLLM's routed experts, loaded for this rank's share and computed on a view of all experts.

A replacement class is made for every `RoutedExperts` subclass that exists when the model's module is imported and
registered through `PluggableLayer.register_oot`, so vLLM instantiates ours. Until the views are attached, the layer looks
to vLLM as under expert parallelism (a map from global to local ids); afterwards as if it held every expert.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.first_use import FirstUse
from vllm_dwdp.layers.gates import LayerGate, register_gate, replace_gate
from vllm_dwdp.layers.hits import count, ids_of
from vllm_dwdp.layers.methods import rebuild_kernel

if TYPE_CHECKING:
    from vllm_dwdp.kernels.requester import Journey
    from vllm_dwdp.layers.online import Arrival
    from vllm_dwdp.layers.views.composite import LayerRanges
    from vllm_dwdp.layers.views.split import SplitTables


class ShareMap(ExpertMapManager):
    """A layer's own expert map: local ids for the experts with which this rank builds it, -1 for all others."""

    def __init__(self, whole: ExpertMapManager, share: tuple[int, ...]) -> None:
        self.__dict__.update(copy.copy(whole.__dict__))
        self._local_num_experts = len(share)
        self._expert_map = torch.full((self.global_num_experts,), -1, dtype=torch.int32)
        self._expert_map[list(share)] = torch.arange(len(share), dtype=torch.int32)
        self._expert_mask = None
        self._routing_tables = None


class DwdpExpertsMixin:
    """In front of a `RoutedExperts` class: allocates the share only, of an adopted one an expert, and brackets the compute
    with acquire / release."""

    # Of the class behind this mixin.
    quant_method: Any

    #: Where hits of this layer are counted (hits.py); None where they are not.
    dwdp_hits: int | None = None
    #: While the layer is loaded, where vLLM quantises it as it comes.
    dwdp_arrival: Arrival | None = None
    #: Of a composite view.
    dwdp_ranges: LayerRanges | None = None
    _dwdp_whole_map: ExpertMapManager

    def __init__(
        self,
        layer_name: str,
        params_dtype: torch.dtype,
        moe_config: FusedMoEConfig,
        quant_config: Any,
        expert_map_manager: ExpertMapManager,
        **kwargs: Any,
    ) -> None:
        if expert_map_manager.num_fused_shared_experts:
            raise DwdpError(
                f"{layer_name} fuses {expert_map_manager.num_fused_shared_experts} shared experts into the routed ones, "
                "which dwdp cannot spread: turn shared-expert fusion off"
            )
        share = ModelBuild.current().add_layer(self, layer_name, params_dtype, moe_config)
        moe_config.num_local_experts = len(share)
        super().__init__(
            layer_name,
            params_dtype,
            moe_config,
            quant_config,
            expert_map_manager=ShareMap(expert_map_manager, share),
            **kwargs,
        )  # type: ignore[call-arg]
        self.dwdp_share = share
        self.dwdp_layer = -1
        self.dwdp_gate: LayerGate | None = None
        self.dwdp_tables: SplitTables | None = None
        # Outside of nn.Module's registries on purpose: only kept for the switch to all experts.
        object.__setattr__(self, "_dwdp_whole_map", expert_map_manager)

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> Any:
        """vLLM's; called with parameters without memory, too, to count what it would copy."""
        if self.dwdp_arrival is not None and not param.is_meta:
            self.dwdp_arrival.mark()
        return super().weight_loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success)  # type: ignore[misc]

    def dwdp_attach(self, gate: LayerGate, layer: int) -> None:
        """From here on the parameters are views of all E experts; forget the share and compute behind `gate`."""
        self.expert_map_manager = self._dwdp_whole_map
        self.moe_config.num_local_experts = self.moe_config.num_experts  # type: ignore[attr-defined]
        self.update_expert_map_info()  # type: ignore[attr-defined]
        if not ModelBuild.current().platform.on_cpu:
            self._dwdp_rebuild_kernel()
        self.dwdp_gate = FirstUse(self, gate)
        self._dwdp_number = register_gate(self.dwdp_gate, layer)
        self.dwdp_layer = layer

    def dwdp_used(self, gate: LayerGate) -> None:
        """The first acquire is over: from here on this layer, and the ops of compiled code, call `gate` itself."""
        self.dwdp_gate = gate
        replace_gate(self._dwdp_number, gate)

    def dwdp_detach_tables(self) -> None:
        """Have the kernel of a split view raise until its tables are attached again; does nothing in other views."""
        if self.dwdp_tables is not None:
            self.quant_method.moe_kernel.fused_experts.detach_tables()

    def dwdp_attach_tables(self) -> None:
        """Have the kernel of a split view compute from the layer's tables, that of a composite view from its ranges; does
        nothing in other views."""
        if self.dwdp_tables is not None:
            self.quant_method.moe_kernel.fused_experts.attach_tables(self.dwdp_tables.pulled, self.dwdp_tables.direct)
        if self.dwdp_ranges is not None:
            self.dwdp_ranges.attach()

    def dwdp_compute_direct(self, direct: bool) -> None:
        """Have the kernel of a split or composite view read missing experts from their owners, or from the slot."""
        if self.dwdp_ranges is not None:
            self.dwdp_ranges.take(direct)
        else:
            self.quant_method.moe_kernel.fused_experts.direct = direct

    def dwdp_travel(self, journey: Journey) -> None:
        """Have forwards of few tokens that are told to compute directly ask the owners of missing experts."""
        self.quant_method.moe_kernel.fused_experts.journey = journey

    def _dwdp_rebuild_kernel(self) -> None:
        rebuild_kernel(self)
        self.dwdp_attach_tables()

    def forward_modular(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """`RoutedExperts.forward_modular` between acquire and release; not released where it raises (the ring
        re-aligns at the next acquire)."""
        self._dwdp_count(args, kwargs)
        self._dwdp_acquire(x)
        output = super().forward_modular(x, *args, **kwargs)  # type: ignore[misc]
        self._dwdp_release(output)
        return output

    def forward_monolithic(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `forward_modular`, for kernels that route themselves."""
        self._dwdp_acquire(x)
        output = super().forward_monolithic(x, *args, **kwargs)  # type: ignore[misc]
        self._dwdp_release(output)
        return output

    def _dwdp_count(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.dwdp_hits is None:
            return
        if torch.compiler.is_compiling():
            torch.ops.dwdp.count_hits(ids_of(args, kwargs), self.dwdp_hits)
        else:
            count(ids_of(args, kwargs), self.dwdp_hits)

    def _dwdp_acquire(self, states: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            torch.ops.dwdp.acquire(states, self._dwdp_number)
        else:
            self.dwdp_gate.acquire(self.dwdp_layer, len(states))  # type: ignore[union-attr]

    def _dwdp_release(self, states: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            torch.ops.dwdp.release(states, self._dwdp_number)
        else:
            self.dwdp_gate.release(self.dwdp_layer, len(states))  # type: ignore[union-attr]


def _subclasses(cls: type) -> Iterable[type]:
    yield cls
    children: list[type] = cls.__subclasses__()
    for child in children:
        if not issubclass(child, DwdpExpertsMixin):
            yield from _subclasses(child)


def cover_subclasses() -> None:
    """Register a replacement for every `RoutedExperts` class defined so far; idempotent.

    `register_oot` goes by class name, so two classes of one name are refused.
    """
    for cls in _subclasses(RoutedExperts):
        known = op_registry_oot.get(cls.__name__)
        if known is None:
            replacement = type(f"Dwdp{cls.__name__}", (DwdpExpertsMixin, cls), {"__module__": __name__})
            PluggableLayer.register_oot(name=cls.__name__)(replacement)
        elif not issubclass(known, (DwdpExpertsMixin, cls)):
            raise DwdpError(
                f"another plugin replaces {cls.__name__} by {known.__module__}.{known.__qualname__}: name the plugins that "
                "this launch needs in VLLM_PLUGINS"
            )
        elif issubclass(known, DwdpExpertsMixin) and not issubclass(known, cls):
            raise DwdpError(f"two classes are called {cls.__name__}, of which dwdp can only replace one: rename yours")
