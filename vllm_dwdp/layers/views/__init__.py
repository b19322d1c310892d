"""How the kernels of a layer see all its experts: one file per view, and the one place where a view is chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.kept import aliased
from vllm_dwdp.layers.slabs import LayerTensors
from vllm_dwdp.layers.views import composite, contiguous, inplace, split

logger = logging.getLogger("vllm.dwdp")

VIEWS: Final = {"inplace": inplace, "split": split, "composite": composite, "contiguous": contiguous}

#: Those in which forwards of few tokens read missing experts at their owners, and others pull.
BOTH_WAYS: Final = frozenset({"split", "composite"})


def choose_view(
    build: ModelBuild, layers: Sequence[LayerTensors], page: Callable[[], int | None] = lambda: None
) -> str:
    """The view of the whole model, the same on all ranks: a single layer that cannot have it takes the others along.

    Asked once vLLM has processed the weights, whose sizes were guessed before. page: tells the bytes of a page where every
    rank of the group can map peers' pages next to its own, else None; asked where that matters. Raises DwdpError where
    the user asked for a view, or for direct reads, and the layers cannot have them.
    """
    asked, told = build.config.weight_view, build.config.direct_tokens
    first = build.platform.views[0] if asked == "auto" else asked
    for layer in layers:
        if why := VIEWS[first].why_not(layer):
            if asked != "auto":
                raise DwdpError(
                    f'weight_view "{asked}": experts of {layer.build.name} {why}: use weight_view auto or contiguous'
                )
            # Without a split-weight kernel mapped pages spare the merge copy, and few tokens are still read directly.
            if first == "split" and not any(map(composite.why_not, layers)):
                nbytes = page()
                fits = nbytes is not None and composite.fits(layers, nbytes, build.config.num_slots)
                # Last, so that nothing is said of a view that this machine would not have.
                if fits and not _kept_by_kernels(layers):
                    return "composite"
            if told not in ("auto", 0):
                raise DwdpError(
                    f"dwdp.direct_tokens is {told}, but experts of {layer.build.name} {why} and cannot be read "
                    "directly: leave it out"
                )
            return "contiguous"
    return first


def _kept_by_kernels(layers: Sequence[LayerTensors]) -> bool:
    """Whether a kernel object would not follow parameters whose data is now here, now there, which one line says."""
    for each in layers:
        if name := aliased(each):
            logger.warning(
                "dwdp: view contiguous instead of composite, since %s keeps %s.%s in a tensor of its own",
                type(each.build.module.quant_method).__name__, each.build.name, name,
            )  # fmt: skip
            return True
    return False
