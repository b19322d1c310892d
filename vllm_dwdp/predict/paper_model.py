"""The published set-ups, as the planner's inputs: the blog's roofline, T1, T3 and T4 of the paper, SGLang and AMD."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Final

from vllm_dwdp.predict.decode_pool import decode_engines
from vllm_dwdp.predict.fitted import Fitted
from vllm_dwdp.predict.formats import FORMATS
from vllm_dwdp.predict.hardware_file import Efficiency, Hardware, load_hardware
from vllm_dwdp.predict.model import LayerGroup, MoeModel
from vllm_dwdp.predict.read_config import load_model
from vllm_dwdp.predict.roofline import local_time
from vllm_dwdp.predict.strategies import Options, Step, dep, dwdp, pull_bytes
from vllm_dwdp.predict.work import Lengths, Work, prefill

K: Final = 1024
FP8_KV: Final = Options(kv_element=1.0)


def with_constants(hardware: Hardware, c: Fitted) -> Hardware:
    """`hardware` with these constants in place of the shipped ones; what its own file states stays."""
    own = hardware.efficiency
    stock = Efficiency()
    pairs = {
        "memory": c.memory_efficiency,
        "matmul": c.matmul_efficiency,
        "link": c.link_efficiency,
        "elementwise_passes": c.elementwise_passes,
        "imbalance": c.imbalance,
    }
    return hardware.with_efficiency(**{k: v for k, v in pairs.items() if getattr(own, k) == getattr(stock, k)})


@cache
def _gb200() -> Hardware:
    return load_hardware("gb200")


@cache
def r1(projections: str) -> MoeModel:
    """DeepSeek-R1 with NVFP4 experts. The blog's projections are BF16; T1's dense products fit FP8 at best: in BF16 the
    projections alone would take 269 ms at the peak rate, where T1 has 177.5 for all dense products.
    """
    return replace(load_model("DeepSeek-R1-FP4"), attention_format=FORMATS[projections])


def blog(c: Fitted, tokens: int) -> tuple[float, float]:
    """(T_compute / T_prefetch, T_DEP / T_DWDP) of one MoE layer, batch 1, DWDP4 over DEP4: blog 19, table 1.

    The blog's roofline: peak rates, no elementwise work; six remote copies of a token, sent as 0.5 byte and returned as
    2 bytes a value.
    """
    hardware = _gb200().with_efficiency(
        memory=c.memory_efficiency, matmul=1.0, grouped=1.0, link=1.0, elementwise_passes=0.0
    )
    model = r1("bf16")
    attention = model.groups[0].attention
    layer = replace(model, groups=(LayerGroup(attention, True, 1),), vocab=0)
    work = prefill(Lengths(tokens), tokens)
    compute = float(local_time(layer, hardware, work).total.mean())
    pull = pull_bytes(layer, 4) / hardware.link_rate
    local = float(local_time(layer, hardware, work, resident=layer.experts / 4).total.mean())
    all_to_all = tokens * layer.top_k * 3 / 4 * layer.hidden * 2.5 / hardware.link_rate
    return compute / pull, (local + all_to_all) / max(compute, pull)


def paper_pair(
    c: Fitted,
    lengths: Lengths,
    tokens_per_step: int,
    *,
    ranks: int = 4,
    sliced: bool = False,
    merge: bool = False,
) -> tuple[Step, Step]:
    """(DEP4, DWDP) of the paper's set-up: whole prompts, GB200, DeepSeek-R1 with NVFP4 experts."""
    hardware, model = with_constants(_gb200(), c), r1("fp8")
    work = prefill(lengths, tokens_per_step, whole=True)
    share = {3: 86}.get(ranks)
    return (
        dep(model, hardware, work, 4, options=FP8_KV),
        dwdp(model, hardware, work, ranks, share, sliced=sliced, merge=merge, options=FP8_KV),
    )


def t1(c: Fitted) -> tuple[Step, Step]:
    """(DEP4, DWDP4) of T1: 8K prompts, length ratio 0.8, 32768 tokens per step, merge copy, no slices."""
    return paper_pair(c, Lengths(8 * K, 0.8), 32 * K, merge=True)


def end_to_end(c: Fitted, tokens_per_user: float) -> float:
    """Output tokens/s/GPU of disaggregated serving with DWDP4 prefill over DEP4 prefill, at the same tokens/s/user: T5, T6.

    Inferred, since it is not published: lengths and steps of prefill as in T1, slices and no merge copy; pools so large that
    whole groups do not matter, both full; decode with the engine that does most of those that give each user that rate, with
    2 to 64 GPUs, attention in BF16, no drafting.
    """
    lengths = Lengths(8 * K, 0.8)
    model = r1("fp8")
    engines = decode_engines(model, with_constants(_gb200(), c), lengths.mean, K, tokens_per_user, FP8_KV)
    decode = max(engine.tokens_per_gpu for engine in engines)

    def tokens_per_gpu(step: Step) -> float:
        return 1 / (lengths.mean / step.tokens_per_gpu / K + 1 / decode)

    base, ours = paper_pair(c, lengths, 32 * K, sliced=True)
    return tokens_per_gpu(ours) / tokens_per_gpu(base)


def sglang(c: Fitted, isl: int) -> tuple[Step, Step]:
    """(DEP4, DWDP4) of gpt-oss-120b on four B200, 16K tokens per step; plain copies into one address range."""
    hardware, model = with_constants(load_hardware("b200"), c), load_model("gpt-oss-120b")
    work: Work = prefill(Lengths(isl), 16 * K)
    return dep(model, hardware, work, 4), dwdp(model, hardware, work, 4, sliced=False)


def amd(c: Fitted, isl: int, tokens: int) -> tuple[Step, Step]:
    """(DEP8, DWDP8) of DeepSeek-R1 in MXFP4 on eight MI355X, `tokens` per rank and step."""
    hardware, model = with_constants(load_hardware("mi355x"), c), load_model("DeepSeek-R1-MXFP4")
    work = prefill(Lengths(isl), tokens)
    return dep(model, hardware, work, 8), dwdp(model, hardware, work, 8)
