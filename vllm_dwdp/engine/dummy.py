"""Worker: random experts for benchmarks (`--load-format dummy`), where vLLM's own dummy weights do not serve a share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

from vllm_dwdp.layers.build import LayerBuild
from vllm_dwdp.layers.slabs import NOT_PER_EXPERT

#: Integers that are no weights: positions and sizes, which kernels trust.
_NO_WEIGHTS: Final = ("g_idx", "weight_shape")
#: Of scales that are exponents of 2, with an offset of 127.
_EXPONENT: Final = 120
_SEED: Final = 1234


def draw_packed(layers: Iterable[LayerBuild]) -> None:
    """Draw packed integers, which vLLM's dummy weights leave as memory has them; the first expert as `draw_firsts`.

    Not those of layers that vLLM has quantised: it drew what it quantised.
    """
    for layer in layers:
        for name, parameter in layer.module.named_parameters():
            if parameter.is_floating_point() or name in NOT_PER_EXPERT or name.endswith(_NO_WEIGHTS):
                continue
            if _is_told(parameter):
                continue
            rows = parameter.data.view(torch.uint8)
            if name.endswith("scale"):
                rows.fill_(_EXPONENT)
                continue
            drawn = torch.Generator(rows.device).manual_seed(_SEED)
            for part in (rows[:1], rows[1:]):
                part.random_(0, 256, generator=drawn)


def draw_firsts(layers: Iterable[LayerBuild]) -> None:
    """Draw the first expert of each layer by itself. On a GPU, what is drawn goes by the size of a tensor, and a rank that
    returns, which builds this expert alone, is to draw what it left. To be called before a layer is quantised."""
    for layer in layers:
        for name, parameter in layer.module.named_parameters():
            if parameter.ndim and name not in NOT_PER_EXPERT and not _is_told(parameter):
                initialize_single_dummy_weight(parameter.data[:1])


def _is_told(parameter: torch.nn.Parameter) -> bool:
    """Whether vLLM's layer says what dummy weights are, which vLLM's loader has written."""
    return getattr(parameter, "dummy_weight_value", None) is not None
