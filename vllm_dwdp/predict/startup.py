"""What a launch asks the planner: is this configuration predicted to lose, and what should be turned?"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hold import choose
from vllm_dwdp.predict.hardware_file import MOST_RANKS, Hardware, load_hardware, shipped
from vllm_dwdp.predict.memory_plan import UTILISATION
from vllm_dwdp.predict.read_config import parse_model
from vllm_dwdp.predict.strategies import Options, Step
from vllm_dwdp.predict.verdict import GRID, Case, check_case, judge, threshold
from vllm_dwdp.predict.work import Lengths

#: A prompt of this many tokens stands for the load, which a launch does not know.
TYPICAL_PROMPT: Final = 8192
#: Share of the time that compute may wait for pulls without a word.
MUCH_WAIT: Final = 0.05
#: What a rank measures on takes this one's place where there is no file: nothing is known but shares of peaks as usual.
_UNKNOWN: Final = Hardware("no file", 0.0, 1.0, {"bf16": 1.0}, 1.0, "switch", MOST_RANKS, 0.0, 1.0, 1.0, 1.0, 0.0)
#: As a device is called that has memory but no link, so that no pulls meet at one.
CPU_DEVICE: Final = "a CPU"
_CPU: Final = replace(_UNKNOWN, topology="mesh")


def hardware_of(device: str) -> str | None:
    """The shipped hardware file of a device name such as 'NVIDIA H100 80GB HBM3'; None: none fits."""
    words = device.lower().replace("-", " ").split()
    if {"pcie", "nvl"} & set(words):
        return None  # the files are of boards whose GPUs are all linked
    # gb200 before b200: words are compared whole, so neither is taken for the other.
    return next((name for name in shipped() if name in words), None)


@dataclass(frozen=True)
class Rates:
    """As a rank measured them. link, memory: bytes/s. products: FLOP/s, in BF16 where weights are FP8. copies_s: seconds of
    all copies of a forward that pulls."""

    link: float
    memory: float
    products: float
    copies_s: float

    def on(self, hardware: Hardware, ranks: int) -> Hardware:
        """`hardware` with these rates, as one of `ranks` measured them; in what its file has beside them (other types,
        slow-downs, what ranks cost each other) it stays as it is."""
        reached = hardware.efficiency
        faster = self.products / (hardware.rate("bf16") * reached.matmul)
        return replace(
            hardware,
            peak={compute: rate * faster for compute, rate in hardware.peak.items()},
            memory_bandwidth=self.memory / reached.memory,
            link_rate=hardware.link_rate * self.link / hardware.pull_rate(ranks),
        )


@dataclass(frozen=True)
class PlannedLaunch:
    """What a front end knows of a launch before anything is started, and every worker too.

    config: the model's config.json as a mapping. device: the GPU's name. share: experts per rank; None for a partition, or
    where memory decides (by_memory), of which the planner makes its own estimate. tokens: of a step at most. kv_element:
    bytes of an element of the KV cache. require_win: refuse where DWDP is not predicted to win, or nothing can be told.
    """

    config: Mapping[str, Any]
    name: str
    device: str
    ranks: int
    tokens: int
    max_model_len: int
    share: int | None = None
    by_memory: bool = False
    view: str = "auto"
    num_slots: int = 2
    utilisation: float = UTILISATION
    kv_element: float = 2.0
    require_win: bool = False

    def case(self, rates: Rates | None = None) -> Case:
        """For the planner, by the hardware file or by `rates`; raises DwdpError, or what a config that nobody foresaw makes
        of it."""
        hardware = hardware_of(self.device)
        if hardware is None and rates is None:
            raise DwdpError(f"there is no hardware file for {self.device!r} (shipped: {', '.join(shipped())})")
        known = load_hardware(hardware) if hardware else _CPU if self.device == CPU_DEVICE else _UNKNOWN
        prompt = max(1, min(TYPICAL_PROMPT, self.tokens, self.max_model_len - 1))
        case = Case(
            parse_model(dict(self.config), self.name), rates.on(known, self.ranks) if rates else known,
            self.ranks, Lengths(prompt), self.tokens, copies_s=rates.copies_s if rates else None,
            share=self.share, view="contiguous" if self.view == "contiguous" else "split", num_slots=self.num_slots,
            utilisation=self.utilisation, options=Options(kv_element=self.kv_element),
        )  # fmt: skip
        check_case(case)
        if self.by_memory:
            with contextlib.suppress(DwdpError):  # not even a partition is foreseen to fit: the verdict says so
                case = replace(case, share=choose(case.facts()).share)
        return case


def predicted_loss(launch: PlannedLaunch) -> str | None:
    """One line if DWDP is predicted to lose, with the number and the knob; None if not, or if nothing can be told.

    Raises DwdpError with that line where `require_win` is set, and also where nothing can be told then.
    """
    require_win = launch.require_win
    try:
        verdict = judge(launch.case())
    except Exception as e:
        # A model whose config nobody foresaw must not keep a launch from starting.
        if require_win:
            raise DwdpError(f"require_win is set, but the planner cannot tell: {e}; leave require_win out") from None
        return None
    if verdict.gain == 0:
        # vLLM itself says more exactly what does not fit, unless a win was asked for.
        if require_win:
            raise DwdpError(
                f"require_win is set, but {verdict.reason}: {_as_vllm(verdict.knob)}; or leave require_win out"
            )
        return None
    loses = verdict.answer == "do not use it here" and verdict.gain > 0
    if not loses and not (require_win and verdict.gain < 1):
        return None
    how = "to lose" if loses else "not to win for sure"
    line = (
        f"DWDP is predicted {how} here: {(verdict.gain - 1) * 100:+.0f} % +- {verdict.error * 100:.0f} tokens/s/GPU "
        f"against {verdict.best} in prefill of {launch.tokens} tokens per step ({verdict.reason}); "
        f"better: {_as_vllm(verdict.knob)}"
    )
    if require_win:
        raise DwdpError(f"{line}; or leave require_win out")
    return line


class FullStep(NamedTuple):
    """A step of `tokens`, the most that a launch allows. needed: about how many would hide pulls; None where these do, or no
    number does."""

    tokens: int
    step: Step
    needed: int | None = None

    @property
    def waits(self) -> bool:
        """Whether compute will wait, and more than a little."""
        return self.step.waiting > MUCH_WAIT

    def describe(self, more: str) -> str:
        """The figures, and what can be done; `more`: what else."""
        step, tokens = self.step, "" if self.needed is None else f"about {self.needed} tokens per step, "
        return (
            f"copies of a forward take about {step.pull * 1e3:.1f} ms, but max_num_batched_tokens={self.tokens} gives about "
            f"{(step.seconds - step.exposed) * 1e3:.1f} ms of compute to hide them: compute will wait; use {tokens}more "
            f"experts_per_rank{more}"
        )


def full_step(launch: PlannedLaunch, rates: Rates) -> FullStep | None:
    """What the planner says of a rank that measured `rates`; None where it cannot tell."""
    try:
        case = launch.case(rates)
        prompt, found = case.lengths.isl, FullStep(case.tokens, case.step("DWDP"))
        if not found.waits:
            return found
        prompts = threshold(lambda n: case.step("DWDP", n * prompt).waiting <= MUCH_WAIT, 1, GRID[-1] // prompt)
    except Exception:
        # As for `predicted_loss`.
        return None
    return found._replace(needed=prompts and prompts * prompt)


def _as_vllm(knob: str) -> str:
    """A knob of `vllm-dwdp plan` in the words of vLLM's command line."""
    return knob.replace("--ranks", "--data-parallel-size").replace("--tokens-per-step", "--max-num-batched-tokens")
