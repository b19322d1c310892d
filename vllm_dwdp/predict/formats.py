"""Weight formats: bytes of a parameter with its scales, and the type in which its products are computed."""

from __future__ import annotations

import difflib
from typing import Final, NamedTuple

from vllm_dwdp.errors import DwdpError


class WeightFormat(NamedTuple):
    """`data` and `scales`: bytes per parameter. `compute`: the type whose peak rate bounds its matrix products."""

    name: str
    data: float
    scales: float
    compute: str

    @property
    def bytes(self) -> float:
        """Bytes per parameter, scales included."""
        return self.data + self.scales


FORMATS: Final = {
    entry.name: entry
    for entry in (
        WeightFormat("fp32", 4, 0, "bf16"),
        WeightFormat("bf16", 2, 0, "bf16"),
        WeightFormat("fp16", 2, 0, "bf16"),
        WeightFormat("fp8", 1, 0, "fp8"),
        # One float32 scale for 128 x 128 weights (DeepSeek-V3).
        WeightFormat("fp8_block", 1, 4 / (128 * 128), "fp8"),
        # One FP8 scale for 16 weights; activations in FP4 too.
        WeightFormat("nvfp4", 0.5, 1 / 16, "fp4"),
        # One byte of exponent for 32 weights. gpt-oss computes with wider activations; `_a4` with FP4 ones (Quark).
        WeightFormat("mxfp4", 0.5, 1 / 32, "fp8"),
        WeightFormat("mxfp4_a4", 0.5, 1 / 32, "fp4"),
        WeightFormat("int8", 1, 0, "fp8"),
        # AWQ and GPTQ: a 16-bit scale for 128 weights, where a checkpoint does not tell (quantization.py); products in BF16.
        WeightFormat("int4", 0.5, 2 / 128, "bf16"),
    )
}

#: Bytes of one element of the KV cache.
KV_BYTES: Final = {"auto": 2.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0}


def weight_format(name: str) -> WeightFormat:
    """The format of that name; raises DwdpError with the nearest one."""
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(FORMATS)}"
        raise DwdpError(f"the weight format {name!r} is unknown: {hint}")
    return FORMATS[name]
