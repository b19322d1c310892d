"""`_nvfp4_compute_scale_factor` of vLLM's Marlin code: the factor is that of all experts of a layer, not of those loaded.

Why: for Marlin vLLM multiplies the block scales of all experts that it has by one power of two, which the largest of them
allows, and divides their global scales by it. A rank has a share. With a factor of its own the scales of its experts were
others than plain vLLM's, and the smallest might become zero on one rank and not on another. Replaced only while a layer of a
dwdp worker is processed. Goes when vLLM chooses the factor for each expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm_dwdp.errors import DwdpError


@contextmanager
def factor_of(largest: Sequence[float]) -> Iterator[None]:
    """Within it, the calls of that function are answered, in their order, for tensors whose largest scale is one of these.

    Raises DwdpError where a tensor has a larger one, or there are more or fewer calls: vLLM is then another than was read.
    """
    import torch
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4 as there

    original, given, asked = there._nvfp4_compute_scale_factor, tuple(largest), 0

    def compute(marlin_scales: torch.Tensor, a_dtype: torch.dtype | None = None) -> Any:
        nonlocal asked
        asked += 1
        if asked > len(given) or float(marlin_scales.max()) > given[asked - 1]:
            raise DwdpError(
                f"vLLM asks for the factor of block scales up to {float(marlin_scales.max())}, call {asked} of a layer, of "
                f"whose experts the largest are {', '.join(map(str, given))}: this release of dwdp does not fit it"
            )
        return original(torch.tensor([given[asked - 1]], dtype=marlin_scales.dtype), a_dtype)

    there._nvfp4_compute_scale_factor = compute
    try:
        yield
    finally:
        there._nvfp4_compute_scale_factor = original
    if asked != len(given):
        raise DwdpError(
            f"vLLM took {asked} of {len(given)} factors of block scales: this release of dwdp does not fit it"
        )
