"""What a launch hears from the planner: one line with a number and a knob, or an error where a win is required."""

import dataclasses
import json
from typing import Any

import pytest

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.hardware_file import load_hardware
from vllm_dwdp.predict.read_config import MODELS
from vllm_dwdp.predict.startup import CPU_DEVICE, FullStep, PlannedLaunch, Rates, full_step, hardware_of, predicted_loss
from vllm_dwdp.predict.strategies import rate_at_once


def ask(**changed: Any) -> str | None:
    config = json.loads((MODELS / "Qwen3-235B-A22B.json").read_text())
    settings: dict[str, Any] = {"device": "NVIDIA H200", "ranks": 8, "tokens": 2048, "max_model_len": 32768}
    return predicted_loss(PlannedLaunch(config, "m", **{**settings, **changed}))


@pytest.mark.parametrize(
    ("device", "file"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA A100-SXM4-80GB", None),
        ("a CPU", None),
    ],
)
def test_devices_are_recognised(device: str, file: str | None) -> None:
    assert hardware_of(device) == file


def test_a_predicted_loss_is_one_line_with_number_and_knob() -> None:
    line = ask()
    assert line is not None
    assert "\n" not in line
    assert "predicted to lose" in line and "tokens/s/GPU against" in line
    assert "--max-num-batched-tokens" in line


def test_where_memory_decides_the_planner_takes_what_it_foresees() -> None:
    settings: dict[str, Any] = {
        "config": json.loads((MODELS / "Qwen3-30B-A3B.json").read_text()),
        "max_model_len": 8192,
    }
    launch = PlannedLaunch(name="m", device="NVIDIA H100 80GB HBM3", ranks=2, tokens=8192, by_memory=True, **settings)
    assert 64 < (launch.case().share or 0) < 128
    # Nothing fits: the verdict says so, not the choice.
    assert dataclasses.replace(launch, utilisation=0.05).case().share is None


def test_silence_where_it_wins_or_nothing_is_known() -> None:
    assert ask(tokens=65536) is None
    assert ask(device="NVIDIA A100-SXM4-80GB") is None


#: Two H100s that hold 64 of 128 experts, as measured: link, memory and products, the link by an engine's start and alone.
MEASURED = [(link * 1e9, 2.6e12, 785e12) for link in (337, 395)]


def measured(tokens: int, rates: tuple[float, float, float], device: str = "NVIDIA H100 80GB HBM3") -> FullStep:
    """Twelve layers of Qwen3-30B-A3B."""
    config = {**json.loads((MODELS / "Qwen3-30B-A3B.json").read_text()), "num_hidden_layers": 12}
    launch = PlannedLaunch(config, "m", device, 2, tokens, 32768, share=64)
    copied = 12 * 64 * 3 * 2048 * 768 * 2
    given = Rates(*rates, copied / rates[0])
    found, together = full_step(launch, given), rate_at_once(launch.case(given).hardware, 2)
    assert found is not None
    step = found.step
    # While copies run, for `duty` of the time, the other rank's run for as much of it and slow them down.
    duty = min(1.0, step.pull_layer / (step.window + step.exposed / 12))
    assert step.pull == pytest.approx(copied / rates[0] * (1 + duty * (1 / together - 1)), rel=1e-4)
    return found


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "a card without a file"])
@pytest.mark.parametrize("rates", MEASURED)
def test_pulls_that_were_measured_to_be_hidden(rates: tuple[float, float, float], device: str) -> None:
    """Under load at most 1.1 % of the time was spent waiting. Experts alone, as fast as large products, take 18.9 ms."""
    found = measured(16384, rates, device)
    assert not found.waits and found.needed is None
    assert found.step.attention + found.step.dense > 0.2 * found.step.seconds


def test_the_hardware_file_says_so_too() -> None:
    config = {**json.loads((MODELS / "Qwen3-30B-A3B.json").read_text()), "num_hidden_layers": 12}
    launch = PlannedLaunch(config, "m", "NVIDIA H100 80GB HBM3", 2, 16384, 32768, share=64)
    assert launch.case().step("DWDP").waiting == 0 and predicted_loss(launch) is None


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "a card without a file"])
@pytest.mark.parametrize("rates", MEASURED)
def test_few_tokens_wait_and_are_told_how_many_do_not(rates: tuple[float, float, float], device: str) -> None:
    found = measured(2048, rates, device)
    assert found.waits and found.needed is not None and not measured(found.needed, rates, device).waits
    line = found.describe(", or else")
    assert f"about {1e3 * found.step.pull:.1f} ms, but max_num_batched_tokens=2048 gives about " in line
    assert line.endswith(f"compute will wait; use about {found.needed} tokens per step, more experts_per_rank, or else")
    # Over a link as slow as this no number of tokens hides pulls.
    hopeless = measured(2048, (1e9, *rates[1:]), device)
    assert hopeless.needed is None and hopeless.describe("").endswith("will wait; use more experts_per_rank")


def test_measured_rates_are_those_that_count() -> None:
    known = load_hardware("h100")
    hardware = Rates(3e11, 2e12, 6e14, 0.01).on(known, 2)
    assert hardware.rate("bf16") * hardware.efficiency.matmul == pytest.approx(6e14)
    assert hardware.rate("fp8") / hardware.rate("bf16") == pytest.approx(known.rate("fp8") / known.rate("bf16"))
    assert hardware.memory_bandwidth * hardware.efficiency.memory == pytest.approx(2e12)
    assert hardware.pull_rate(2) == hardware.pull_rate(8) == pytest.approx(3e11)
    config = json.loads((MODELS / "Qwen3-30B-A3B.json").read_text())
    launch = PlannedLaunch(config, "m", "a CPU", 2, 64, 4096, view="contiguous")
    rates = Rates(1e10, 4e10, 1e11, 5.0)
    found = full_step(launch, rates)
    # The merge copy is one of the copies that were measured, not a part of compute.
    assert found is not None and found.step.merge == 0 and found.step.pull == pytest.approx(5.0)
    assert full_step(dataclasses.replace(launch, config={"num_experts": object()}), rates) is None


def test_required_wins() -> None:
    assert ask(tokens=65536, require_win=True) is None
    with pytest.raises(DwdpError, match="predicted to lose"):
        ask(require_win=True)
    with pytest.raises(DwdpError, match="cannot tell"):
        ask(device="a CPU", require_win=True)
    assert DwdpConfig.parse({"require_win": True}).require_win
    with pytest.raises(DwdpError, match="require_win is 1"):
        DwdpConfig.parse({"require_win": 1})


def test_four_h200s_are_foreseen_as_they_were_measured() -> None:
    """All 48 layers of Qwen3-30B-A3B, 8K prompts: tokens/s per GPU, and those of expert parallelism."""
    config = json.loads((MODELS / "Qwen3-30B-A3B.json").read_text())
    for ranks, dwdp, dep in ((4, 52_700, 39_700), (2, 53_900, 44_300)):
        case = PlannedLaunch(config, "m", "NVIDIA H200", ranks, 16384, 32768).case()
        assert case.step("DWDP").tokens_per_gpu == pytest.approx(dwdp, rel=0.1)
        assert case.step("DEP").tokens_per_gpu == pytest.approx(dep, rel=0.1)


def test_ranks_cost_each_other_what_was_measured_and_nothing_on_a_cpu() -> None:
    def at_once(device: str, ranks: int) -> float:
        config = json.loads((MODELS / "Qwen3-30B-A3B.json").read_text())
        launch = PlannedLaunch(config, "m", device, ranks, 8192, 32768, view="split")
        return rate_at_once(launch.case(Rates(3e11, 4e12, 6e14, 0.01)).hardware, ranks)

    assert (at_once("NVIDIA H200", 2), at_once("NVIDIA H200", 4)) == pytest.approx((0.91, 0.63))
    h100 = "NVIDIA H100 80GB HBM3"
    assert (at_once(h100, 2), at_once(h100, 4)) == pytest.approx((0.94, 0.63))
    assert at_once(h100, 3) == at_once("a card without a file", 3) == pytest.approx(2 / 3)
    assert at_once("a card without a file", 4) == pytest.approx(0.6)
    assert at_once("AMD Instinct MI300X", 4) == at_once(CPU_DEVICE, 4) == 1
