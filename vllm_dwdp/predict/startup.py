"""What a launch asks the planner: is this configuration predicted to lose, and what should be turned?"""

from __future__ import annotations

from typing import Any, Final

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.hardware_file import load_hardware, shipped
from vllm_dwdp.predict.memory_plan import UTILISATION
from vllm_dwdp.predict.read_config import parse_model
from vllm_dwdp.predict.strategies import Options
from vllm_dwdp.predict.verdict import Case, check_case, judge
from vllm_dwdp.predict.work import Lengths

#: A prompt of this many tokens stands for the load, which a launch does not know.
TYPICAL_PROMPT: Final = 8192


def hardware_of(device: str) -> str | None:
    """The shipped hardware file of a device name such as 'NVIDIA H100 80GB HBM3'; None: none fits."""
    words = device.lower().replace("-", " ").split()
    if {"pcie", "nvl"} & set(words):
        return None  # the files are of boards whose GPUs are all linked
    # gb200 before b200: words are compared whole, so neither is taken for the other.
    return next((name for name in shipped() if name in words), None)


def predicted_loss(
    config: dict[str, Any],
    name: str,
    device: str,
    *,
    ranks: int,
    share: int | None,
    tokens: int,
    max_model_len: int,
    view: str,
    num_slots: int = 2,
    utilisation: float = UTILISATION,
    kv_element: float = 2.0,
    require_win: bool = False,
) -> str | None:
    """One line if DWDP is predicted to lose, with the number and the knob; None if not, or if nothing can be told.

    config: the model's config.json as a mapping. Raises DwdpError with that line where `require_win` is set, and also
    where nothing can be told then.
    """
    try:
        hardware = hardware_of(device)
        if hardware is None:
            raise DwdpError(f"there is no hardware file for {device!r} (shipped: {', '.join(shipped())})")
        prompt = max(1, min(TYPICAL_PROMPT, tokens, max_model_len - 1))
        case = Case(
            parse_model(config, name), load_hardware(hardware), ranks, Lengths(prompt), tokens, share=share,
            view="contiguous" if view == "contiguous" else "split", num_slots=num_slots, utilisation=utilisation,
            options=Options(kv_element=kv_element),
        )  # fmt: skip
        check_case(case)
        verdict = judge(case)
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
        f"against {verdict.best} in prefill of {tokens} tokens per step ({verdict.reason}); better: {_as_vllm(verdict.knob)}"
    )
    if require_win:
        raise DwdpError(f"{line}; or leave require_win out")
    return line


def _as_vllm(knob: str) -> str:
    """A knob of `vllm-dwdp plan` in the words of vLLM's command line."""
    return knob.replace("--ranks", "--data-parallel-size").replace("--tokens-per-step", "--max-num-batched-tokens")
