"""Inputs of the planner and the simulator that nobody wrote: a result in finite time, or one line."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.test_predict_errors import CONFIG, error
from tests.unit.test_predict_sim import BASE, scenario
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.arguments import MOST_STEP_TOKENS
from vllm_dwdp.predict.hardware_file import FOLDER, load_hardware, parse_hardware
from vllm_dwdp.predict.input_files import MOST_BYTES, read_toml
from vllm_dwdp.predict.plan_report import plan_text
from vllm_dwdp.predict.plan_request import PlanRequest
from vllm_dwdp.predict.read_config import load_model, parse_model
from vllm_dwdp.predict.sim import scenario as scenarios
from vllm_dwdp.predict.sim.run import run_scenario
from vllm_dwdp.predict.units import parse_count, parse_quantity
from vllm_dwdp.predict.verdict import Case, check_case
from vllm_dwdp.predict.work import Lengths, prefill

H200 = read_toml(FOLDER / "h200.toml", "hardware file", "")
DEEPSEEK = json.loads((FOLDER.parent / "models/DeepSeek-R1.json").read_text())
SCENARIO = {
    **BASE,
    "seconds": "5 s",
    "max_sequences": 64,
    "experts_per_rank": 80,
    "requests": {**BASE["requests"], "isl_std": 0.0, "burst": 1.0, "hit_rate": 0.1, "hit_share": 0.5},
    "faults": [{"rank": 1, "slow": 1.5, "stall_at": "1 s", "stall_for": "1 s", "dead_at": "4 s"}],
}

#: A few seconds, where others run for a hundredth of that.
FUZZ = settings(max_examples=80, deadline=20_000, suppress_health_check=list(HealthCheck))

numbers = st.one_of(
    st.integers(-3, 300),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.sampled_from([0, 1e-320, 1e6, 1e9, 1e308, 2**53, math.nan, math.inf, -0.0]),
)
words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["32K", "9" * 400, "1M", "-1", "nan", "inf s", "1e400 s", "1e-300 B/s", "1e300 TB/s", "4 us", "3 h", "5.5.5 s"]
    ),
    st.builds(lambda n, u: f"{n:g} {u}", st.floats(1e-20, 1e25), st.sampled_from(["s", "GB", "GB/s", "PFLOP/s", "W"])),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


def places(raw: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value can be replaced: every key of every table."""
    found = [here] if here else []
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ():
        found += places(value, (*here, key))
    return found


@st.composite
def changed(draw: st.DrawFn, base: dict[str, Any], more: tuple[str, ...] = ()) -> dict[str, Any]:
    """`base` with one to three values replaced or taken away."""
    raw = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from([*places(raw), *((name,) for name in more)]))
        table = raw
        for step in path:
            table = table[step]
        if draw(st.integers(0, 9)) == 0 and isinstance(table, dict):
            table.pop(key, None)
        else:
            table[key] = draw(values)
    return raw


def check(caught: DwdpError) -> None:
    assert "\n" not in str(caught)


@FUZZ
@given(changed(SCENARIO))
def test_scenarios(raw: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenarios, "MOST_EVENTS", 2e4)
        try:
            results = run_scenario(scenarios.parse_scenario(raw, "test"))
        except DwdpError as caught:
            check(caught)
            return
    for result in results:
        assert 0 <= result.prompt_per_gpu < math.inf and 0 <= result.finished + result.lost <= result.requests


def plan(case: Case) -> None:
    try:
        check_case(case)
        assert plan_text(PlanRequest(case, 64, 0, 0.0)).startswith("DWDP: ")
    except DwdpError as caught:
        check(caught)


@FUZZ
@given(changed(H200))
def test_hardware(raw: dict[str, Any]) -> None:
    try:
        hardware = parse_hardware(raw, "test")
    except DwdpError as caught:
        check(caught)
        return
    plan(Case(load_model("gpt-oss-120b"), hardware, 2, Lengths(1024), 8192))


MORE = (
    "moe_layers", "layer_types", "sliding_window", "mlp_only_layers", "quantization_config", "text_config", "kv_lora_rank",
    "q_lora_rank", "no_rope_layers", "no_rope_layer_interval", "interleave_moe_layer_step", "first_k_dense_replace",
    "n_shared_experts", "head_dim", "torch_dtype", "model_type", "num_layers",
)  # fmt: skip


@FUZZ
@given(st.one_of(changed(CONFIG, MORE), changed(DEEPSEEK, MORE)))
def test_models(raw: dict[str, Any]) -> None:
    try:
        model = parse_model(raw, "test")
    except DwdpError as caught:
        check(caught)
        return
    plan(Case(model, load_hardware("h200"), 2, Lengths(1024), 8192))


@FUZZ
@given(words | st.text(alphabet="0123456789.eEkKmMGTB/s+- ", max_size=30))
def test_quantities_and_counts(text: str) -> None:
    for read in (
        lambda: parse_count(text, "x"),
        lambda: parse_quantity(text, "bytes/s", "x"),
        lambda: parse_quantity(text, "seconds", "x"),
    ):
        try:
            assert 0 < read() < math.inf
        except DwdpError as caught:
            check(caught)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ranks": 10**9, "group_size": 4}, "1000000000 ranks"),
        ({"requests": {**BASE["requests"], "rate": 1e6}}, "about 4.8e+08 requests"),
        ({"seconds": "1000000 h"}, "it must be in"),
        ({"seconds": "1e8 s", "requests": {**BASE["requests"], "rate": 1e-3, "osl": "1M"}}, "prompt steps and tokens"),
        ({"faults": [{"rank": 1, "slow": math.nan}]}, "at least 1"),
        ({"faults": [{"rank": 1, "slow": math.inf}]}, "<= 1e+06"),
        ({"tokens_per_step": "9" * 30}, "at most 9007199254740992"),
        ({"tokens_per_step": "2M"}, "at most 1048576"),
        ({"requests": {**BASE["requests"], "rate": math.nan}}, "requests.rate is nan"),
        ({"ways": ["DP"] * 5}, "each once"),
    ],
)
def test_scenarios_that_would_never_end(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DwdpError, match=r"(?s).*") as caught:
        scenario(**change)
    assert says in str(caught.value), caught.value
    check(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**9), ("n_routed_experts", 10**9), ("hidden_size", 2**40), ("q_lora_rank", [])],
)
def test_models_that_nobody_has(field: str, value: object) -> None:
    base = CONFIG if field == "hidden_size" else DEEPSEEK
    with pytest.raises(DwdpError, match=f"^{field} of test (is|differs)"):
        parse_model({**base, field: value}, "test")


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [("link", "max_ranks", 10**6), ("link", "rate", "1e-3 B/s"), ("efficiency", "matmul", 1e-300)],
)
def test_hardware_that_nobody_has(table: str, key: str, value: object) -> None:
    with pytest.raises(DwdpError, match=f"^test: {table}.{key} is .*: it must be"):
        parse_hardware({**H200, table: {**H200.get(table, {}), key: value}}, "test")


def test_the_largest_documented_run_is_not_refused() -> None:
    example = read_toml(Path(__file__).parents[2] / "examples/scenario.toml", "scenario", "")
    assert scenarios.parse_scenario({**example, "ranks": 10_000}, "test").ranks == 10_000
    load = {**example["requests"], "osl": 256, "rate": 0.8}
    assert scenarios.parse_scenario({**example, "requests": load, "ways": ["DWDP", "DEP", "TP", "DP"]}, "test")


@pytest.mark.parametrize("kind", ["scenario", "hardware", "model", "measured"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "nested deeper than 32"),
        ("a = " + "[" * 100_000, "nested deeper than 32"),
        ("a = " + "[" * 40 + "]" * 40, "nested deeper than 32"),
        ("a = " + "9" * 5000, "valid TOML"),
        ("a = 0x" + "f" * 5000, "has a whole number of 20000 bits"),
        ("#" * (MOST_BYTES + 1), "more than 8 MiB"),
        ("a = \ud800", "UTF-8"),
    ],
    ids=["unclosed", "recursion", "nested", "digits", "hexadecimal", "large", "encoding"],
)
def test_files_that_are_no_input(
    kind: str, text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / ("x.toml" if kind in ("scenario", "hardware") else "x.json")
    if file.suffix == ".json" and text.startswith("a = "):
        text = text.removeprefix("a = ")
        says = {"valid TOML": "readable JSON"}.get(says, says)
        says = "readable JSON" if text.startswith("0x") else says  # JSON has no such numbers
    file.write_bytes(text.encode(errors="surrogatepass"))
    command = {
        "scenario": ["simulate", str(file)],
        "hardware": ["plan", "gpt-oss-120b", "--hardware", str(file)],
        "model": ["plan", str(file)],
        "measured": ["calibrate", str(file), "--hardware", "h200"],
    }[kind]
    line = error(capsys, *command)
    if says == "nested deeper than 32" and text.startswith("[["):
        assert says in line or "no valid TOML" in line
    else:
        assert says in line, line[-300:]
    assert len(line) < 1200


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tokens-per-step", "9" * 400],
        ["--tokens-per-step", "2M"],
        ["--isl", "9" * 20],
        ["--osl", "2000000000"],
        ["--num-slots", "5000"],
        ["--skew", "nan"],
        ["--isl-std", "inf"],
        ["--gpu-memory-utilization", "nan"],
        ["--ranks", "1e400"],
    ],
)
def test_arguments_out_of_range(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert arguments[0] in error(capsys, "plan", "gpt-oss-120b", *arguments)


def test_the_most_prompts_of_a_step_are_few_samples() -> None:
    work = prefill(Lengths(2, 0.5), MOST_STEP_TOKENS)
    assert work.new.size < 5_000_000
    assert work.tokens.mean() == pytest.approx(MOST_STEP_TOKENS)


def test_a_path_with_a_line_break_stays_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error(capsys, "simulate", str(tmp_path / "no\nsuch.toml"))
