"""Odd input to `vllm-dwdp`: one line and status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.helpers import LIMIT_S
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.cli import main
from vllm_dwdp.predict.hardware_file import FOLDER, load_hardware
from vllm_dwdp.predict.read_config import parse_model
from vllm_dwdp.predict.startup import PlannedLaunch, hardware_of, predicted_loss

MODEL = "Qwen/Qwen3-30B-A3B"
CONFIG = json.loads((Path(__file__).parents[2] / "vllm_dwdp/predict/models/Qwen3-30B-A3B.json").read_text())
MEASURED = {"model": MODEL, "way": "DWDP", "ranks": 4, "isl": 8192, "tokens_per_step": 32768}


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the command prints."""
    try:
        status = main(list(argv))
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("mlp_only_layers", 5, ["mlp_only_layers", "list"]),
        ("max_position_embeddings", "x", ["max_position_embeddings", "'x'"]),
        ("shared_expert_intermediate_size", -100, ["-100"]),
        ("sliding_window", -5, ["sliding_window", "-5"]),
        ("layer_types", [["a"]], ["['a']"]),
        ("quantization_config", 5, ["quantization_config", "mapping"]),
        ("moe_layers", 5, ["moe_layers", "list"]),
    ],
)
def test_odd_fields(
    field: str, value: object, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "odd.json"
    file.write_text(json.dumps({**CONFIG, field: value}))
    line = error(capsys, "plan", str(file))
    assert all(word in line for word in [*words, "odd"]), line


def test_odd_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "65536" in error(capsys, "plan", MODEL, "--decode-sequences", "1000000000")
    assert "no folder" in error(capsys, "plan", MODEL, "--plot", "/no/such/x.png")
    assert "give one" in error(capsys, "plan", MODEL, "--isl-std", "5", "--length-ratio", "0.5")
    (tmp_path / "h.toml").write_bytes(b"\xff\xfe")
    assert "TOML" in error(capsys, "plan", MODEL, "--hardware", str(tmp_path / "h.toml"))


def test_what_the_system_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (("plan", 5000 * "x"), ("plan", MODEL, "--hardware", 5000 * "x")):
        line = error(capsys, *argv)
        assert "xxx" in line and "(File name too long)" in line and "check the path" in line and len(line) < 1200
    # Else what is printed last fails where it is printed, not where it is flushed.
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    for argv in (("plan", MODEL, "--json"), ("hardware",)):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "vllm_dwdp.cli", *argv]
            done = subprocess.run(
                command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S, env=buffered
            )
        assert "the output cannot be used (No space left on device): check" in done.stderr
        assert done.stderr.count("\n") == 1 and done.returncode == 2
    # Nobody reads, as `head` that has seen enough; and nobody wants to.
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vllm_dwdp.cli", "hardware"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S, env=buffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    closed = [*("sh", "-c", 'exec "$@" >&-', "sh"), *command]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("ms", "words"), [(float("nan"), "rows above 0"), (float("inf"), "rows above 0"), (1e12, "unit")]
)
def test_measurements_that_cannot_be(ms: float, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.json"
    file.write_text(json.dumps([{**MEASURED, "milliseconds": {"grouped": ms}}]))
    assert words in error(capsys, "calibrate", str(file), "--hardware", "H200")


def test_what_does_not_fit_names_what_makes_room(capsys: pytest.CaptureFixture[str]) -> None:
    case = ["plan", "DeepSeek-R1", "--hardware", "H200", "--ranks", "8", "--isl", "8192", "--tokens-per-step"]
    assert main([*case, "32K"]) == 0
    assert "Instead: --tokens-per-step 16384" in capsys.readouterr().out
    assert main([*case, "16384"]) == 0
    told = capsys.readouterr().out
    # That eight ranks cost each other time, by the paper's model, makes it marginal; it fits.
    assert "DWDP: marginal" in told and "it does not fit" not in told


def test_a_launch_is_never_stopped_by_the_planner() -> None:
    def ask(config: dict[str, object], device: str) -> str | None:
        return predicted_loss(PlannedLaunch(config, "m", device, ranks=4, tokens=2048, max_model_len=4096))

    assert ask({"num_experts": object(), "layer_types": 3}, "NVIDIA H200") is None
    assert hardware_of("NVIDIA H100 PCIe") is None and hardware_of("NVIDIA H200 NVL") is None
    assert hardware_of("NVIDIA H200") == "h200"
    told = ask(CONFIG, "NVIDIA H200")
    assert told is not None and "predicted to lose" in told


def test_a_long_list_of_layers_is_gone_through_once() -> None:
    """As many numbers as a config may have: a set of them for every layer would take minutes."""
    config = {**CONFIG, "num_hidden_layers": 10_000, "moe_layers": list(range(2 << 20))}
    begin = time.monotonic()
    assert parse_model(config, "long").moe_layers == 10_000
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(("figures", "why"), [("9 = 0.6", "at_once.9 is unknown"), ("2 = 1.9", "at_once.2 is 1.9")])
def test_rates_of_ranks_that_pull_at_once_are_shares(figures: str, why: str, tmp_path: Path) -> None:
    text = (FOLDER / "h200.toml").read_text().replace("2 = 0.91, 4 = 0.63", figures)
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(DwdpError, match=why):
        load_hardware(str(tmp_path / "mine.toml"))
