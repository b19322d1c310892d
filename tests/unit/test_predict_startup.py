"""What a launch hears from the planner: one line with a number and a knob, or an error where a win is required."""

import dataclasses
import json
from typing import Any

import pytest

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.read_config import MODELS
from vllm_dwdp.predict.startup import PlannedLaunch, hardware_of, predicted_loss


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


def test_required_wins() -> None:
    assert ask(tokens=65536, require_win=True) is None
    with pytest.raises(DwdpError, match="predicted to lose"):
        ask(require_win=True)
    with pytest.raises(DwdpError, match="cannot tell"):
        ask(device="a CPU", require_win=True)
    assert DwdpConfig.parse({"require_win": True}).require_win
    with pytest.raises(DwdpError, match="require_win is 1"):
        DwdpConfig.parse({"require_win": 1})
