"""Engines under load as this plugin ran them on two H100s (docs/decode.md), and what the planner says; none was fitted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Final, NamedTuple

from vllm_dwdp.predict.closed_loop import Loop, closed_loop
from vllm_dwdp.predict.fitted import Fitted
from vllm_dwdp.predict.hardware_file import load_hardware
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.paper_model import with_constants
from vllm_dwdp.predict.read_config import load_model

#: Experts that each of the two ranks held, of 128.
SHARE: Final = 64
#: Tokens of a step that travelled at most, the default then.
TRAVELLED: Final = 256
#: Prompts of 8K with their answers that KV caches of 43,645 tokens on two ranks hold.
FIT_8K: Final = 2 * 43645 / 8320


class Run(NamedTuple):
    """tokens_per_s: input and output, median of three turns, in docs/benchmarks/two-h100/`file`.json under `load`."""

    file: str
    load: str
    decode: str
    loop: Loop
    tokens_per_s: float


RUNS: Final = (
    Run("travel-48-layers", "decode64", "travel", Loop(64, 512, 256), 6107),
    Run("travel-48-layers", "decode8", "travel", Loop(8, 512, 128), 3288),
    Run("travel-48-layers", "decode1", "travel", Loop(1, 512, 128), 847),
    Run("travel-48-layers", "mixed", "travel", Loop(FIT_8K, 8192, 128), 30208),
    Run("travel-fp8-24-layers", "decode64", "travel", Loop(64, 512, 256), 19023),
    Run("direct-48-layers", "decode64", "direct", Loop(64, 512, 256), 2289),
    Run("direct-48-layers", "decode8", "direct", Loop(8, 512, 128), 1607),
    Run("direct-48-layers", "mixed", "direct", Loop(16, 8192, 128), 20513),
)


@cache
def _model(file: str) -> MoeModel:
    if "fp8" not in file:
        return load_model("Qwen3-30B-A3B")
    model = load_model("Qwen3-30B-A3B", "fp8_block", "fp8_block")
    return replace(model, groups=tuple(replace(group, count=24) for group in model.groups))


def predicted(c: Fitted) -> Iterator[tuple[Run, float]]:
    """(a run, tokens/s that the planner says)."""
    hardware = with_constants(load_hardware("h100"), c)
    for run in RUNS:
        rates = closed_loop(
            _model(run.file), hardware, 2, run.loop, share=SHARE, decode=run.decode, travel_tokens=TRAVELLED
        )
        yield run, rates.tokens_per_s
