"""Is every MoE layer of a model one of ours, and is there memory? Answered before any weight is read."""

from __future__ import annotations

from typing import Final

from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers import methods
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.routed_experts import DwdpExpertsMixin
from vllm_dwdp.layers.slabs import has_rows
from vllm_dwdp.layers.tied import refuse_tied
from vllm_dwdp.transport.limits import require_descriptors, require_memory

#: Left for what vLLM opens between loading and the first request.
_SPARE_DESCRIPTORS = 16

#: Classes of experts with a loader of their own: it copies a fused tensor whole, but takes single experts as
#: `experts.<id>.<name>`. The class that owns the experts counts, since any model may be around it (pooling,
#: classification, multi-modal).
EXPERT_BY_EXPERT: Final = frozenset({"GptOssRoutedExperts"})


def check_coverage(model: nn.Module, build: ModelBuild) -> None:
    """Refuse a model with routed experts that dwdp does not hold.

    Raises:
        DwdpError: no MoE layer is ours, a `RoutedExperts` layer is not, some module holds a tensor of all experts
            outside of one, experts are computed by a method or kernels that break the rule (methods.py), or a class of
            experts brings a loader that nobody has looked at.
    """
    name = type(model).__name__
    if not build.layers:
        raise DwdpError(
            f"{name} builds no MoE layer on vLLM's RoutedExperts, which dwdp does not support: serve it without"
        )
    experts = {layer.placement.num_experts for layer in build.layers}
    inside: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, RoutedExperts):
            continue
        if not isinstance(module, DwdpExpertsMixin):
            raise DwdpError(
                f"{name}: MoE layer {path} ({type(module).__name__}) is not covered by dwdp: serve it without"
            )
        if why := methods.why_not(module.quant_method, build.platform.on_cpu):
            raise DwdpError(f"{name}: experts of {path} {why}")
        if build.config.weight_view == "split" and (why := methods.why_not_split(module.quant_method)):
            raise DwdpError(f'{name}: weight_view "split": experts of {path} {why}: use weight_view auto or contiguous')
        if why := _refused_loader(type(module)):
            raise DwdpError(f"{name}: experts of {path} {why}")
        inside.update(map(id, module.parameters()))  # type: ignore[attr-defined]
    for path, parameter in model.named_parameters():
        if id(parameter) not in inside and parameter.ndim >= 3 and parameter.shape[0] in experts and ".experts" in path:
            raise DwdpError(
                f"{name}: {path} holds {parameter.shape[0]} experts outside of RoutedExperts, which is not supported: "
                "serve it without dwdp"
            )
    for layer in build.layers:
        for tensor, parameter in layer.module.named_parameters():
            has_rows(layer.module, tensor, parameter, len(build.built(layer)), layer.name)
    refuse_tied(build)


def _refused_loader(experts: type) -> str | None:
    """Why a class of experts cannot be loaded by its share; None where it can.

    A loader of its own may copy the rows of all experts at once, as that of DBRX does.
    """
    for method in ("weight_loader", "load_weights"):
        owner = next(cls for cls in experts.__mro__ if method in vars(cls) and cls is not DwdpExpertsMixin)
        if owner is not RoutedExperts and owner.__name__ not in EXPERT_BY_EXPERT:
            return (
                f"are loaded by {owner.__name__}.{method}, which this release of dwdp does not know and which may need all "
                "experts at once: use another model"
            )
    return None


def check_memory(build: ModelBuild) -> None:
    """Refuse to load where the host cannot hold what all ranks of the group are about to allocate: their share, or an expert
    of each layer where that is in memory already, and slots.

    Parameters exist by now, but none of their pages was touched. Raises DwdpError with the figures, also where the
    descriptors of this process would not suffice.
    """
    experts = [sum(p.nbytes for p in layer.module.parameters()) // len(build.built(layer)) for layer in build.layers]
    shares = [
        expert * len(layer.placement.shares[build.rank]) for expert, layer in zip(experts, build.layers, strict=True)
    ]
    whole = [expert * layer.placement.num_experts for expert, layer in zip(experts, build.layers, strict=True)]
    slots = 0 if build.expects_pages else min(build.config.num_slots, len(whole)) * max(whole)
    ranks, reading = build.loading, build.reading
    needs = [
        f"{count} ranks{how} with {sum(nbytes) / 2**30:.2f} GiB of experts"
        for count, how, nbytes in ((reading, "", shares), (ranks - reading, " that adopt theirs", experts))
        if count
    ]
    purpose = f"dwdp: {', '.join(needs)} and {slots / 2**30:.2f} GiB of slots each"
    require_memory(ranks * slots + reading * sum(shares) + (ranks - reading) * sum(experts), purpose)
    # A memory file per layer stays open for its handle; peers' are open while they are mapped, one layer at a time, and for
    # good where ranks come and go.
    files = len(shares) * build.group_size if build.apart else len(shares) + build.group_size
    require_descriptors(
        files + _SPARE_DESCRIPTORS, f"dwdp: sharing {len(shares)} MoE layers of {build.group_size} ranks"
    )


def check_slots(build: ModelBuild, nbytes: int) -> None:
    """Refuse slots of `nbytes` on each rank where `check_memory` was told of none and memory cannot hold them.

    No rank goes on before all have looked. Raises DwdpError with the figures.
    """
    ranks = build.loading
    purpose = f"dwdp: experts end on no pages, and holding {nbytes / 2**30:.2f} GiB of slots on each of {ranks} ranks"
    require_memory(ranks * nbytes, purpose)
    build.meet("slots")
