"""What was published, as numbers. P: arXiv 2604.01621 v1; B: TensorRT-LLM's blog 19; PR: SGLang's pull requests."""

from __future__ import annotations

from typing import Final, NamedTuple

#: B, table 1: ISL -> (T_compute / T_prefetch, T_DEP / T_DWDP), DeepSeek-R1, batch 1, DWDP4 and DEP4.
BLOG: Final = {1024: (0.19, 0.10), 8192: (0.62, 0.73), 16384: (1.52, 1.27), 32768: (4.77, 1.17)}

#: P, T1: row -> (DEP4, DWDP4) in ms (printed as us, but only ms is physically possible).
T1: Final = {
    "attention": (269.67, 320.56),
    "grouped": (342.40, 337.42),
    "dense": (177.50, 189.28),
    "others": (241.69, 284.32),
    "communication": (126.74, 0.0),
    "merge": (0.0, 34.00),
    "pull": (0.0, 429.00),
    "synchronisation": (161.85, 0.0),
}
T1_TOTAL: Final = (1319.85, 1165.58)

#: P, T2: ranks -> probability in % of C = 1, 2, ... pulls at one source.
T2: Final = {
    3: (50.00, 50.00),
    4: (44.44, 44.44, 11.11),
    6: (40.96, 40.96, 15.36, 2.56, 0.16),
    8: (39.66, 39.66, 16.52, 3.67, 0.46),
    12: (38.55, 38.55, 17.35, 4.63, 0.81),
    16: (38.06, 38.06, 17.67, 5.05, 0.99),
}


class T3Row(NamedTuple):
    """Context only, without slices, with the merge copy; ratios over DEP4. `std`: of the input length."""

    group: str
    isl: int
    tokens: int
    std: int
    ranks: int
    ttft: float
    tps: float


_K = 1024
T3: Final = (
    T3Row("ISL", 1 * _K, 32 * _K, 0, 4, 1.27, 1.11),
    T3Row("ISL", 8 * _K, 32 * _K, 0, 4, 1.16, 1.10),
    T3Row("ISL", 16 * _K, 32 * _K, 0, 4, 1.12, 1.09),
    T3Row("ISL", 32 * _K, 32 * _K, 0, 4, 1.11, 1.09),
    T3Row("tokens per step", 8 * _K, 16 * _K, 0, 4, 1.07, 1.01),
    T3Row("tokens per step", 8 * _K, 32 * _K, 0, 4, 1.16, 1.10),
    T3Row("std of ISL", 16 * _K, 32 * _K, 0, 4, 1.12, 1.09),
    T3Row("std of ISL", 16 * _K, 32 * _K, 1024, 4, 1.11, 1.08),
    T3Row("std of ISL", 16 * _K, 32 * _K, 2048, 4, 1.13, 1.11),
    T3Row("std of ISL", 16 * _K, 32 * _K, 4096, 4, 1.18, 1.15),
    T3Row("group size", 16 * _K, 32 * _K, 0, 3, 0.86, 1.093),
    T3Row("group size", 16 * _K, 32 * _K, 0, 4, 1.15, 1.091),
)

#: P, T4: (length ratio, tokens per step) -> tokens/s/GPU over DEP with the merge copy removed, and with slices too.
T4: Final = {
    (0.5, 16 * _K): (0.995, 1.081),
    (0.5, 32 * _K): (1.140, 1.139),
    (0.8, 16 * _K): (1.039, 1.053),
    (0.8, 32 * _K): (1.098, 1.109),
}


class Band(NamedTuple):
    """One band of T5 and T6, end to end, ISL 8K, OSL 1K: tokens/s/user in low..high; ratios over the baseline; TTFT in ms of
    the baseline and of DWDP. Pool sizes and rates are not published."""

    low: int
    high: int
    user: float
    gpu: float
    base_ttft: int
    ttft: int


#: P, T5 and T6.
T5: Final = (
    Band(20, 30, 1.15, 1.10, 2538, 8314),
    Band(40, 50, 1.16, 1.08, 1919, 7012),
    Band(60, 70, 1.00, 1.10, 965, 1640),
    Band(80, 90, 1.00, 1.06, 1669, 2280),
    Band(170, 180, 1.00, 0.97, 494, 660),
)

#: PR sgl-project/sglang #29778: gpt-oss-120b, 4 x B200, 16K tokens per step: ISL -> DWDP4 / DEP4.
SGLANG: Final = {4 * _K: 1.16, 8 * _K: 1.37, 16 * _K: 1.18}
#: The same, 128 requests at once, ISL 8K: 506K over 329K tokens/s.
SGLANG_128: Final = 506 / 329

#: PR sgl-project/sglang #33310: DeepSeek-R1 MXFP4, 8 x MI355X: (ISL, tokens per rank and step) -> DWDP8 / DEP8.
#: Tokens per step at ISL 4K and 8K are not published. The limit was 32K; 32 requests in flight give a rank at most 16K at
#: ISL 4K. But DWDP, bound by its pulls, ran at 1.08 times (8K: 1.66 times) the rate of the run with 4K tokens per step,
#: so steps had about 4.4K (6.8K).
AMD: Final = {
    (4 * _K, 4 * _K): 0.340,
    (8 * _K, 4 * _K): 0.320,
    (16 * _K, 4 * _K): 0.385,
    (4 * _K, 4440): 0.579,
    (8 * _K, 6790): 0.529,
    (16 * _K, 32 * _K): 1.209,
    (32 * _K, 32 * _K): 1.637,
}
