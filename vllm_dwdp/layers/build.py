"""What a worker knows while vLLM builds its model: the group, and the MoE layers met so far with their placement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hits_file import Hits
from vllm_dwdp.hot_placement import place_hot
from vllm_dwdp.page_placement import cpu_rows, place_on_pages
from vllm_dwdp.placement import Placement, place
from vllm_dwdp.platform import Platform
from vllm_dwdp.transport.kept import KeptSlab

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig


def numbers_in(name: str) -> tuple[int, ...]:
    """The numbers in the name of a layer, or of a tensor in front of `.experts.`: which layer it is, whatever a model calls
    its parts."""
    return tuple(int(part) for part in name.partition(".experts.")[0].split(".") if part.isdecimal())


@dataclass
class LayerBuild:
    """One MoE layer: vLLM's module with `DwdpExpertsMixin` in front, its placement over the group and whether its boundaries
    were put on pages."""

    module: Any
    name: str
    placement: Placement
    on_pages: bool


@dataclass
class BuildApart:
    """What a rank that is a server of its own finds in its group, and tells it.

    Attributes:
        adopted: the slabs of this rank's share that somebody has, layer by layer, open here, so that they stay; None where
            nobody has them.
        loading: ranks that have yet to take memory, this one among them.
        reading: of these, those that take the memory of their share, since nobody has it.
        hold: tells the group which slabs this rank has open: rank -> handles, layer by layer.
        same_files: raises DwdpError where the files of the checkpoint are not those of the others.
        copies: whether this rank has a copy of a share that is another rank's, for itself alone: an extra one on a GPU.
    """

    adopted: list[KeptSlab] | None
    loading: int
    reading: int
    hold: Callable[[dict[int, list[dict[str, Any]]]], object]
    same_files: Callable[[Sequence[str]], object]
    copies: bool = False
    files_checked: bool = False


@dataclass
class ModelBuild:
    """The group, seen from one rank, and its MoE layers in the order in which vLLM builds them.

    Attributes:
        rank: place in the group, 0..group_size-1; an extra rank has that of another.
        group_size: N.
        platform: where kernels run.
        meet: returns when all ranks of the group have called it with this name.
        gather: what every rank of the group says under this name, in their order; a JSON-able value each.
        shared: whether parameters are views, which nobody may write.
        popularity: hits by which experts beyond E/N are chosen; None where shares overlap instead.
        apart: None where one launch has all ranks.
    """

    config: DwdpConfig
    rank: int
    group_size: int
    platform: Platform
    meet: Callable[[str], object] = lambda name: None
    gather: Callable[[str, Any], list[Any]] = lambda name, value: [value]
    layers: list[LayerBuild] = field(default_factory=list)
    memory_checked: bool = False
    shared: bool = False
    popularity: Hits | None = None
    apart: BuildApart | None = None

    _current: ClassVar[ModelBuild | None] = None

    @classmethod
    def current(cls) -> ModelBuild:
        """The build of this worker process; raises DwdpError outside of one."""
        if cls._current is None:
            raise DwdpError("a MoE layer was built outside of a dwdp worker")
        return cls._current

    def open(self) -> ModelBuild:
        """Make this the build of the process."""
        ModelBuild._current = self
        return self

    def add_layer(self, module: Any, name: str, dtype: torch.dtype, moe_config: FusedMoEConfig) -> tuple[int, ...]:
        """Place the experts of one layer; returns those with which this rank is to build it, ascending."""
        experts = moe_config.num_experts
        self.config.check(self.group_size, experts)
        inner, hidden = moe_config.intermediate_size_per_partition, moe_config.hidden_dim
        rows = cpu_rows(inner, hidden, dtype.itemsize, moe_config.is_act_and_mul)
        placement, on_pages = self._place(experts, rows, name)
        self.layers.append(LayerBuild(module, name, placement, on_pages))
        return self.built(self.layers[-1])

    @property
    def expects_pages(self) -> bool:
        """Whether the view is in place as far as is known before weights are processed; then `choose_view` decides."""
        return self.config.weight_view != "contiguous" and all(layer.on_pages for layer in self.layers)

    @property
    def loading(self) -> int:
        """Ranks of the group that have yet to take memory."""
        return self.group_size if self.apart is None else self.apart.loading

    @property
    def reading(self) -> int:
        """Of `loading`, those whose share is not in memory already."""
        return self.group_size if self.apart is None else self.apart.reading

    @property
    def adopts(self) -> bool:
        """Whether the share is in memory already, where its owner, or this rank's last life, has put it."""
        return self.apart is not None and self.apart.adopted is not None

    def built(self, layer: LayerBuild) -> tuple[int, ...]:
        """Experts with which a layer is built, and which are read: the share; of an adopted one the first, to compare, and
        since vLLM wants every tensor loaded. Until the share is in its slab, parameters have a row for each of these."""
        share = layer.placement.shares[self.rank]
        return share[:1] if self.adopts else share

    def local_experts(self) -> set[int]:
        """Experts of any layer that this rank loads."""
        return {expert for layer in self.layers for expert in self.built(layer)}

    def experts_by_layer(self) -> dict[tuple[int, ...], set[int]]:
        """Numbers in a layer's name (`numbers_in`) -> experts of it that this rank loads.

        Empty where all layers have the same, or names do not tell layers apart: `local_experts` then says what to load.
        """
        shares = {numbers_in(layer.name): set(self.built(layer)) for layer in self.layers}
        same = all(share == self.local_experts() for share in shares.values())
        return {} if same or len(shares) < len(self.layers) else shares

    def _place(self, experts: int, rows: tuple[int, ...], name: str) -> tuple[Placement, bool]:
        held = self.config.held
        view = self.config.weight_view
        if self.popularity is not None and held is not None:
            # Scattered experts end on no pages.
            return place_hot(experts, self.group_size, held, self.popularity.of(name, experts)), False
        if "inplace" in self.platform.views and view in ("auto", "inplace"):
            try:
                return place_on_pages(experts, self.group_size, held, rows), True
            except DwdpError as error:
                if view == "inplace":
                    raise DwdpError(
                        f'weight_view "inplace": experts of {name} {error}: use weight_view auto or contiguous'
                    ) from None
        return place(experts, self.group_size, held), False
