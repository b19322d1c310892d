"""ci/checks/gpu.py: its steps, what it keeps, and what it does with steps that fail or take too long."""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from ci.bench import returns as bench_returns
from ci.bench import servers as bench_servers
from ci.bench.load import parse_load
from ci.bench.models import MODELS
from ci.checks import gpu as gpu_check
from ci.checks import gpu_e2e as gpu_e2e_check
from ci.checks import gpu_stages
from ci.checks.gpu_cases import CASES, QUANTISED
from ci.checks.in_time import InTime
from ci.checks.visible import wanted
from examples.checkpoints import CheckpointSpec
from vllm_dwdp.config import DwdpConfig


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ci/checks/gpu.py", "--out", str(out), *arguments])
    return gpu_check.main()


def step(code: str, limit_s: float = 30) -> gpu_check.Step:
    return gpu_check.Step("step", ("python", "-c", code), limit_s)


@pytest.mark.parametrize("stage", gpu_check.STAGES)
def test_stages_fit_their_limit_and_name_scripts_that_exist(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_returns, "visible_gpus", lambda: 4)
    for item in gpu_check.STAGES[stage]:
        assert item.limit_s <= gpu_stages.STAGE_LIMIT_S
        words = gpu_check.command(item, tmp_path, cpu=False)
        assert not any("{out}" in word or "{{" in word for word in words)
        if "ci.bench.loads" in words:
            assert bench_servers.parse_systems(words[words.index("--systems") + 1 : words.index("--loads")])
            given = words[words.index("--loads") + 1 :]
            assert [parse_load(word) for word in itertools.takewhile(lambda word: not word.startswith("--"), given)]
            # What follows --more is for the servers.
            assert "--more" not in words or words.index("--json") < words.index("--more")
        if "ci.bench.returns" in words:
            monkeypatch.setattr(sys, "argv", words[words.index("-m") + 1 :])
            assert bench_returns.arguments().limit_s < item.limit_s, "its servers outlive a bench that is killed"
        if "ci.checks.gpu_e2e" in words:
            limit_s = float(words[words.index("--limit-s") + 1])
            assert limit_s + 20 <= item.limit_s, "a case is killed that should have ended"
        modules = [word for word in words if re.match(r"(ci|vllm_dwdp)\.", word)]
        modules = [re.sub(r"^vllm_dwdp\.kernels", "kernels", module) for module in modules]
        files = [gpu_check.ROOT / module.replace(".", "/") for module in modules]
        scripts = [file / "__main__.py" if file.is_dir() else file.with_suffix(".py") for file in files]
        assert scripts and all(script.exists() for script in scripts)


def test_without_a_gpu_only_steps_with_a_trial() -> None:
    names = [name for name, _ in gpu_check.steps(list(gpu_check.STAGES), gpus=0)]
    assert "ipc/transport" in names and "sanitize/memcheck" not in names
    assert not any(name.startswith("link/") for name in names) and "serve/doctor" in names


def test_steps_for_two_gpus_are_left_out_on_one() -> None:
    one, two = (dict(gpu_check.steps(list(gpu_check.STAGES), gpus)) for gpus in (1, 2))
    assert set(two) - set(one) == {
        f"{stage}/{step.name}" for stage in ("link", "serve") for step in gpu_check.STAGES[stage]
    }
    assert "sanitize/memcheck" in one
    four = dict(gpu_check.steps(list(gpu_check.STAGES), 4))
    assert {name.partition("/")[0] for name in set(four) - set(two)} == {"four"}


def test_a_step_sees_as_many_gpus_as_it_is_made_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,0")
    words = ("python", "-c", "import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'])")
    for gpus, seen in ((1, "sees 3"), (2, "sees 3,1")):
        assert gpu_check.run_step(gpu_check.Step("s", words, 30, gpus=gpus), "s", tmp_path, cpu=False).last == seen


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path)


def test_a_step_that_needs_a_gpu_is_refused_without(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memcheck needs a GPU"):
        gpu_check.command(gpu_check.STAGES["sanitize"][0], tmp_path, cpu=True)


def test_passed_steps_are_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'a').write('x'); print('well')"
    monkeypatch.setattr(gpu_check, "STAGES", {"one": (step(code),)})
    assert run(monkeypatch, tmp_path) == 0
    assert run(monkeypatch, tmp_path) == 0
    assert mark.read_text() == "x"
    assert "passed earlier" in capsys.readouterr().out
    assert run(monkeypatch, tmp_path, "--again") == 0
    assert mark.read_text() == "xx"


def test_failures_and_slow_steps_are_told_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {"bad": (step("raise SystemExit('no good')"),), "slow": (step("import time; time.sleep(60)", 0.5),)}
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    assert run(monkeypatch, tmp_path) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "no good" in printed
    assert "too slow" in printed and "not done after 0 s" in printed
    monkeypatch.setattr(gpu_check, "STAGES", {"bad": (step("print('mended')"),)})
    assert run(monkeypatch, tmp_path) == 0
    assert set(gpu_check.load(tmp_path / "gpu_check.json")) == {"bad/step", "slow/step"}


def test_servers_of_a_slow_step_end_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are in sessions of their own, as those of benches."""
    told = tmp_path / "server"
    code = (
        "import pathlib, subprocess, sys, time\n"
        "server = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        f"pathlib.Path({str(told)!r}).write_text(str(server.pid))\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(gpu_check, "STAGES", {"slow": (step(code, 3),)})
    assert run(monkeypatch, tmp_path) == 1
    server = int(told.read_text())
    for _ in range(50):
        if not psutil.pid_exists(server) or psutil.Process(server).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    os.kill(server, signal.SIGKILL)
    pytest.fail(f"process {server} is still there")


def test_a_command_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "STAGES", {"one": (gpu_check.Step("step", ("no-such-command",), 5),)})
    assert run(monkeypatch, tmp_path) == 1


def test_an_unknown_stage_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "nonsense")
    assert "no stage nonsense: there are kernels, e2e" in capsys.readouterr().err


def test_tokens_of_either_plain_engine_do_but_no_mixture() -> None:
    first, second = [[1, 2], [3, 4]], [[1, 2], [3, 5]]
    assert gpu_e2e_check.are_of([[[1, 2]] * 2, [[3, 4], [3, 5]]], [first, second])
    assert not gpu_e2e_check.are_of([[[1, 2]] * 2, [[3, 4], [3, 5]]], [first])
    assert not gpu_e2e_check.are_of([[[3, 4], [1, 2]], [[3, 4]] * 2], [first, second])
    with pytest.raises(ValueError):  # a prompt is missing
        gpu_e2e_check.are_of([[[1, 2]] * 2], [first])


def test_only_engines_that_compile_run_twice() -> None:
    twice = {name for name, case in CASES.items() if gpu_e2e_check.compiles(case.options)}
    assert {"qwen3-default-split", "qwen3-compiled-split", "qwen3-piecewise-split"} <= twice
    assert not {"qwen3-split", "qwen3-full-split", "qwen3-ray"} & twice


def test_a_whole_name_means_that_case_alone_and_a_part_all_that_have_it() -> None:
    names = ["qwen3-split", "big-qwen3-split-4", "qwen3-serve", "qwen3-serve-default", "mixtral"]
    assert wanted(names, "qwen3-split,qwen3-serve") == ["qwen3-split", "qwen3-serve"]
    assert wanted(names, "split") == ["qwen3-split", "big-qwen3-split-4"]
    assert wanted(names, "qwen3-serve,mix") == ["qwen3-serve", "mixtral"]
    assert wanted(names, "", "mixtral") == names[:-1]


def test_every_case_of_four_ranks_has_settings_that_a_launch_of_four_takes() -> None:
    four = {name: case for name, case in CASES.items() if name.startswith("four-")}
    assert len(four) > 5
    for name, case in four.items():
        config = DwdpConfig.parse(gpu_e2e_check.settings(case, 4))
        assert case.ranks == 4 and config.ranks_per_device == 1, name
        group, experts = config.resolve_group_size(4), CheckpointSpec(**case.model).num_experts
        held = config.experts_per_rank
        assert held == "partition" or experts / group <= held < experts, name


def test_the_cases_of_the_link_exist() -> None:
    assert set(gpu_stages.LINK_CASES.split(",")) <= set(CASES)


def test_a_first_token_is_compared_with_what_plain_engines_think_of_it() -> None:
    def row(first: int, *likely: tuple[int, float]) -> dict[str, object]:
        return {"first": first, "logprob": dict(likely)[first], "likely": [list(pair) for pair in likely]}

    plain, again = row(5, (5, -1.0), (6, -1.01)), row(6, (6, -1.2), (5, -1.3))
    furthest = gpu_e2e_check.furthest
    # Either of two likely ones; the nearer engine counts; the worst row decides.
    assert furthest([row(6, (6, -1.0))], [[plain]]) == pytest.approx(0.01)
    assert furthest([row(6, (6, -1.2))], [[plain], [again]]) == 0
    assert furthest([row(5, (5, -1.0)), row(5, (5, -2.0))], [[plain, plain]]) == pytest.approx(1.0)
    assert furthest([row(7, (7, -1.0))], [[plain], [again]]) == float("inf")


def test_batches_are_compared_but_for_activations_of_one_scale() -> None:
    apart = {name for name, case in QUANTISED.items() if not case.batches}
    views = ("composite", "contiguous", "split")
    assert apart == {f"{by}fp8-tensor-triton-{view}" for by in ("", "online-") for view in views}
    assert all(case.batches for case in CASES.values())


def test_no_case_begins_that_would_not_end_in_time() -> None:
    now = 100.0
    in_time = InTime(60.0, lambda: now)
    with in_time.case("first") as begins:
        assert begins
        now += 30
        # As slow as the one that runs until now: it would take until 60.
        with in_time.case("beside") as begins:
            assert not begins
        now -= 1
        with in_time.case("beside") as begins:
            assert begins
            now -= 9
    # The slowest so far took 20 s, 20 of 60 s are over.
    now += 19
    with in_time.case("fits") as begins:
        assert begins
    now += 1
    for name in ("late", "later"):
        with in_time.case(name) as begins:
            assert not begins
    assert in_time.left_out == ["beside", "late", "later"]


def test_a_case_that_fails_counts_as_one_that_ended() -> None:
    now = 0.0
    in_time = InTime(60.0, lambda: now)
    with pytest.raises(RuntimeError), in_time.case("fails"):
        now += 40
        raise RuntimeError("x")
    with in_time.case("next") as begins:
        assert not begins


def test_systems_under_load_have_more_moe_layers_than_slots() -> None:
    """With as many, each would keep a slot of its own, and nothing would be pulled after the first forward."""
    seen = 0
    for step in itertools.chain(*gpu_check.STAGES.values()):
        words = [str(word) for word in step.words]
        if any("bench.loads" in word for word in words):
            given = dict(itertools.pairwise(words))
            spec = MODELS[given.get("--model", "qwen3")][0]
            layers = int(given.get("--layers", spec.num_layers))
            assert layers - spec.first_moe_layer > DwdpConfig().num_slots, step.name
            seen += 1
    assert seen > 10


def test_cases_that_are_left_out_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = list(CASES)[:3]
    monkeypatch.setattr(sys, "argv", ["gpu_e2e", "--cpu", "--only", ",".join(names), "--limit-s", "50"])
    written: list[object] = []
    monkeypatch.setattr(gpu_e2e_check, "checkpoint", written.append)
    now = 0.0
    monkeypatch.setattr(gpu_e2e_check, "InTime", lambda limit_s: InTime(limit_s, lambda: now))

    def attempt(name: str, *_: object) -> dict[str, object]:
        nonlocal now
        now += 30
        return {"case": name, "wrong": []}

    monkeypatch.setattr(gpu_e2e_check, "attempt", attempt)
    assert gpu_e2e_check.main() == 1
    assert written == [], "a case writes its own model: those of the others would take its time"
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"not begun, 2 of 3 cases: {','.join(sorted(names[1:]))}"
    assert [line.split()[1] for line in said if line.split()[:1] == [names[0]]] == ["ok"]
    assert sum("left out" in line for line in said) == 2
