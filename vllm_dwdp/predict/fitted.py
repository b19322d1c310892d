"""The five fitted constants, all there are. Fitted by `vllm-dwdp paper --refit` on two published tables only: blog 19's
table 1 and the paper's T1 (fit.py). They were declared, with these meanings, before anything else was evaluated;
everything else in `vllm-dwdp paper` is held out.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Fitted(NamedTuple):
    """Dimensionless.

    memory_efficiency: share of the peak memory bandwidth that a kernel that only moves bytes reaches.
    matmul_efficiency: share of the peak rate that attention cores and dense products reach.
    link_efficiency: share of a link's rate that copies and collectives reach.
    elementwise_passes: reads or writes of the hidden state (2 bytes a value) per token and layer, outside of products.
    imbalance: standard deviation of a rank's time for a step over its mean, beyond what the prompts' lengths explain
        (routing, scheduling); only ranks that wait for each other pay for it.
    """

    memory_efficiency: float
    matmul_efficiency: float
    link_efficiency: float
    elementwise_passes: float
    imbalance: float


FITTED: Final = Fitted(
    memory_efficiency=0.932,
    matmul_efficiency=0.8394,
    link_efficiency=0.869,
    elementwise_passes=72.96,
    imbalance=0.1499,
)

# Measured elsewhere, not fitted: vLLM's Triton MoE kernel on an H200 (256 experts, 8,192 tokens, top-8, BF16) reached
# 367 TFLOP/s of 989.
GROUPED_EFFICIENCY: Final = 367 / 989
