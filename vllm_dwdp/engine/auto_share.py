"""How many experts a rank holds by its memory: what it knows when it starts, and the share on which all ranks agree."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Final

from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from vllm_dwdp.config import PARTITION
from vllm_dwdp.engine.stored import stored_config
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hold import Held, MemoryFacts, Paged, choose
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.slabs import REPLICATED_PART
from vllm_dwdp.layers.transports import page_of_group
from vllm_dwdp.page_placement import cpu_rows, place_on_pages
from vllm_dwdp.platform import Platform
from vllm_dwdp.predict.memory_plan import RUNTIME, activation_bytes, memory_facts
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.read_config import parse_model

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_dwdp.group.launch import DwdpLaunch
    from vllm_dwdp.group.rendezvous import Rendezvous

#: The unit in which GPUs map memory, bytes.
PAGE: Final = 2 << 20
#: Formats whose experts have no scales.
_WHOLE: Final = ("fp32", "bf16", "fp16")


def settle(launch: DwdpLaunch, facts: MemoryFacts | None, rendezvous: Rendezvous) -> tuple[DwdpLaunch, Held | None]:
    """`launch` with the number of experts that fits every rank of it, and what that means for this one.

    facts: None where a rank cannot tell, so that all hold a partition. No rank goes on, and takes memory, before all have
    looked. Raises DwdpError where not even a partition fits.
    """
    own = 0 if facts is None else choose(facts).share
    share = min(rendezvous.gather("share", own, list(range(launch.num_ranks))))
    if facts is None or share == 0:
        return dataclasses.replace(launch, config=dataclasses.replace(launch.config, experts_per_rank=PARTITION)), None
    held = Held(facts, share)
    config = dataclasses.replace(launch.config, experts_per_rank=held.experts_per_rank)
    return dataclasses.replace(launch, config=config), held


def check_foreseen(vllm_config: VllmConfig) -> None:
    """Raise DwdpError where the estimate would leave out memory that a launch needs."""
    for there, what in (
        (vllm_config.speculative_config is not None, "a drafter"),
        (vllm_config.model_config.is_multimodal_model, "the part of a model that sees or hears"),
    ):
        if there:
            raise DwdpError(f"the memory of {what} is not foreseen: experts_per_rank sets a number")


def page_ahead(vllm_config: VllmConfig, launch: DwdpLaunch, platform: Platform, rendezvous: Rendezvous) -> int | None:
    """Bytes of a page where the view will be composite unasked, if that takes no more memory than contiguous; else None.

    Every rank of a launch has to call it: where sizes leave it open, all try whether their device maps pages.
    """
    config = launch.config
    if platform.on_cpu or config.weight_view != "auto" or launch.popularity is not None or launch.apart is not None:
        return None
    if _splits(vllm_config, platform):
        return None
    group = launch.group_of(rendezvous.rank)
    unbuilt = ModelBuild(config, group.index(rendezvous.rank), len(group), platform)
    return page_of_group(unbuilt, rendezvous, group, "page_ahead")


def memory_of(
    vllm_config: VllmConfig, launch: DwdpLaunch, platform: Platform, limit: float, page: int | None = None
) -> MemoryFacts:
    """What is known before layers are built. `limit`: bytes that this rank may use in all. `page`: as `page_ahead` tells.

    Raises DwdpError where the model's config does not tell its sizes.
    """
    config, model_config = launch.config, vllm_config.model_config
    quantised = model_config.quantization is not None
    # vLLM may have chosen another type than the checkpoint's.
    plain = None if quantised else "fp32" if model_config.dtype.itemsize == 4 else "bf16"
    try:
        model = parse_model(stored_config(model_config), model_config.model, plain, plain)
    except DwdpError as error:
        raise DwdpError(f'experts_per_rank "auto": the sizes are unknown ({error}); give a number of experts') from None
    element = model_config.dtype.itemsize
    tokens = vllm_config.scheduler_config.max_num_batched_tokens
    # What a process on CPU needs beside activations is there by now.
    peak = activation_bytes(model, tokens) * element / 2 + (0 if platform.on_cpu else RUNTIME)
    replicated = (model.replicated_params + model.embedding_params) * element
    cache_dtype = STR_DTYPE_TO_TORCH_DTYPE.get(str(vllm_config.cache_config.cache_dtype), model_config.dtype)
    facts = memory_facts(
        model,
        launch.group_size,
        limit=limit,
        dense=model.replicated_bytes if quantised else replicated,
        peak=peak,
        view=_view(model, launch, platform, vllm_config),
        num_slots=config.num_slots,
        tokens=tokens,
        context=model_config.max_model_len,
        kv_element=cache_dtype.itemsize,
    )
    ends = page_ends(model) if config.weight_view == "composite" else 0
    paged = None if page is None else paged_of(model, page)
    return dataclasses.replace(facts, kv_asked=_kv_asked(vllm_config, facts), ends=ends, paged=paged)


def paged_of(model: MoeModel, page: int) -> Paged:
    """What the composite view takes in pages of `page` bytes."""
    # Where what is missing of the larger tensor has the bytes of two pages, it has a whole one.
    return Paged(page_ends(model, page), model.experts - math.ceil(page / _row(model)))


def page_ends(model: MoeModel, page: int = PAGE) -> int:
    """The most bytes by which the pages of a rank in the composite view exceed the experts of its share, in all layers: at
    either end of the share and behind the last expert, of each tensor that is fetched; and of small ones, which have a piece
    of their own."""
    form = model.expert_format
    scales = round(model.expert_params * form.scales) // 3
    rows = [2 * _row(model), _row(model)]
    rows += [nbytes for nbytes in (2 * scales, scales) if nbytes > REPLICATED_PART * model.expert_bytes]
    ends = sum(2 * (page - math.gcd(nbytes, page)) + -model.experts * nbytes % page for nbytes in rows)
    return model.moe_layers * (ends + (0 if form.name in _WHOLE else page))


def _row(model: MoeModel) -> int:
    """Bytes of one expert's second product, without scales; those of the first are twice as many."""
    return round(model.expert_params * model.expert_format.data) // 3


def _kv_asked(vllm_config: VllmConfig, facts: MemoryFacts) -> float | None:
    cache = vllm_config.cache_config
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override * cache.block_size * facts.kv_token
    return cache.kv_cache_memory_bytes or None


def _view(model: MoeModel, launch: DwdpLaunch, platform: Platform, vllm_config: VllmConfig) -> str:
    """The view that the layers will have, as far as sizes tell; once they exist, `choose_view` decides. Where it may be
    composite unasked, it is contiguous: `MemoryFacts.paged` tells the rest."""
    view = launch.config.weight_view
    if view == "composite":
        # But for pages at the ends of shares (`page_ends`), slabs and slots hold the same.
        return "split"
    if view != "auto":
        return view
    if "inplace" not in platform.views:
        return "split" if _splits(vllm_config, platform) else "contiguous"
    rows = cpu_rows(model.expert_width, model.hidden, vllm_config.model_config.dtype.itemsize)
    try:
        place_on_pages(model.experts, launch.group_size, None, rows)
    except DwdpError:
        return "contiguous"
    return "inplace" if launch.popularity is None else "contiguous"


def _splits(vllm_config: VllmConfig, platform: Platform) -> bool:
    """Whether there are split-weight kernels for experts in this form."""
    quantisation, kernels = vllm_config.model_config.quantization, vllm_config.kernel_config.moe_backend
    told = getattr(vllm_config.model_config.hf_config, "quantization_config", None) or {}
    static = told.get("activation_scheme", "dynamic") != "dynamic"
    return quantisation in (None, *platform.split) and kernels in ("auto", "triton") and not static
