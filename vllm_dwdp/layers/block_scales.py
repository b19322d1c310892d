"""Block scales that vLLM multiplies by one factor, from the largest of the experts that it has loaded: NVFP4 for Marlin.

Ranks tell each other the largest of their shares once weights are loaded, and vLLM processes each layer with the group's:
all experts are in some share, so that it is the one that plain vLLM finds.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import LayerBuild, ModelBuild
from vllm_dwdp.layers.methods import method_of
from vllm_dwdp.patches.block_scales import factor_of

#: What is wrong with "experts" of this form in ranks that come and go.
NOT_APART: Final = (
    "in NVFP4 with dwdp.group, where a rank that returns reads too few to know the largest of their scales: use another "
    "quantisation, or one launch for all ranks"
)
#: The order in which vLLM processes the products of a layer.
_PRODUCTS: Final = ("w13", "w2")


def scaled_layers(build: ModelBuild) -> list[LayerBuild]:
    """The layers that need `share_block_scales`; to be called before weights are loaded.

    Raises DwdpError where ranks come and go, so that nobody tells one that returns.
    """
    found = [layer for layer in build.layers if (known := method_of(layer.module)) is not None and known.one_factor]
    if found and build.apart is not None:
        raise DwdpError(f"experts of {found[0].name} {NOT_APART}")
    return found


def share_block_scales(build: ModelBuild, layers: list[LayerBuild]) -> None:
    """Have vLLM process `layers`, which are loaded, with the largest block scales of the group.

    Raises DwdpError where ranks have different numbers of such layers.
    """
    if not layers:
        return
    said = build.gather("block_scales", [[_largest(layer.module, which) for which in _PRODUCTS] for layer in layers])
    if len(set(map(len, said))) > 1:
        raise DwdpError(
            f"ranks have {' and '.join(str(len(each)) for each in said)} MoE layers in NVFP4: start all ranks with the same "
            "checkpoint"
        )
    for layer, *products in zip(layers, *said, strict=True):
        _process_with(layer.module, [max(values) for values in zip(*products, strict=True)])


def _largest(module: Any, product: str) -> float:
    scales: torch.Tensor = getattr(module, f"{product}_weight_scale").data
    # Expert by expert: FP8 is compared as FP32.
    return max(float(rows.float().max()) for rows in scales)


def _process_with(module: Any, largest: list[float]) -> None:
    """Wrap `process_weights_after_loading` of a layer's method, until it was called."""
    method = module.quant_method
    process = method.process_weights_after_loading

    def with_the_groups(module: Any) -> None:
        del vars(method)["process_weights_after_loading"]
        with factor_of(largest):
            process(module)

    method.process_weights_after_loading = with_the_groups
