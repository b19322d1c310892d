"""Command lines of ci/bench that could not measure anything: refused in one line, before a server or a rank is started."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ci.bench import contention, loads, returns, starts


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--cpu", "--loads", "a=1/1/1", "a=2/1/1"], "loads a, a: give each its own name"),
        (["--cpu", "--turns", "0"], "--turns 0: write 1 or more"),
        (["--cpu", "--model", "nope"], "--model nope: write qwen3, .*, or a folder with a config.json"),
        (["--cpu", "--systems", "dpep", "dwdp"], "dpep: does not run on CPU; replicas does"),
        (["--cpu", "--systems", "dptp", "dwdp"], "dptp: does not run on CPU; replicas does"),
        (["--cpu", "--systems", "replicas", 'dwdp:a:{"experts_per_rnk": 4}'], "did you mean 'experts_per_rank'"),
        (["--cpu", "--layers", "0"], "--layers 0: write 1 or more"),
        (["--cpu", "--kv-gib", "-1"], "--kv-gib -1: write more than 0"),
        (["--cpu", "--profile", "--profile-s", "0"], "--profile-s 0: write more than 0"),
        (["--cpu", "--profile", "--profile-s", "11"], "--profile-s 11: write at most 10"),
        (["--cpu", "--profile-s", "1"], "--profile-s 1: it is for --profile"),
        (["--cpu", "--profile", "--more", "--profiler-config", "{}"], "both choose vLLM's profiler"),
        (["--cpu", "--limit-s", "nan"], "--limit-s nan: write more than 0"),
        (["--cpu", "--ramp-s", "-0.5"], "--ramp-s -0.5: write 0 or more"),
        (["--cpu", "--spread", "1"], "--spread 1: write less than 1"),
        (["--cpu", "--go", "/not/there/go"], "--go /not/there/go: there is no folder /not/there: make it"),
        (["--cpu", "--json", "/not/there/a.json"], "--json /not/there/a.json: there is no folder /not/there"),
        (["--cpu", "--json", "/tmp"], "--json /tmp is a folder: name a file"),
        (["--cpu", "--logs", __file__], f"--logs {__file__}: {__file__} is a file: name a folder"),
        (["--cpu", "--logs", f"{__file__}/below"], f"--logs {__file__}/below: {__file__} is a file: name a folder"),
        (["--cpu", "--earlier", "/not/there.json"], "--earlier /not/there.json: there is no such file"),
        (["--cpu", "--prefill-devices", "1"], "--prefill-devices 1: on CPU both sides share the cores: leave it out"),
        (["--prefill-devices", "0"], "--prefill-devices 0: write 1 or more"),
        (["--cpu", "--decode", ""], "system '': its kind is one of"),
        (["--decode", "tp"], "no GPU here: --cpu tries this on two cores"),
        ([], "no GPU here: --cpu tries this on two cores"),
    ],
)
def test_loads(words: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ci.checks.visible.visible_gpus", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    refused(monkeypatch, capsys, loads.arguments, words, why)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--cpu", "--model", "nope"], "--model nope: write qwen3, .*, or a folder with a config.json"),
        (["--cpu", "--systems", "dptp"], "dptp: it takes 4 devices or any larger even number, and has 2"),
        (["--cpu", "--again", "-1"], "--again -1: write 0 or more"),
        (["--cpu", "--json", "/not/there/a.json"], "--json /not/there/a.json: there is no folder /not/there"),
        ([], "no GPU here: --cpu tries this on two cores"),
    ],
)
def test_starts(
    words: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ci.checks.visible.visible_gpus", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    refused(monkeypatch, capsys, starts.arguments, words, why)


def test_prefill_devices_are_those_of_decode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    refused(monkeypatch, capsys, loads.arguments, ["--prefill-devices", "1"], "1: it is for --decode: leave it out")
    monkeypatch.setattr(sys, "argv", ["program", "--ramp-s", "0", "--temperature", "0"])
    assert loads.arguments().prefill_devices == 2


def test_ranks_of_two_devices_need_as_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5")
    (router := tmp_path / "vllm-router").touch()
    monkeypatch.setattr("ci.bench.apart.ROUTER", router)
    monkeypatch.setattr(sys, "argv", ["program", "--systems", "dptp", "dwdp"])
    assert [system.kind for system in loads.arguments().systems] == ["dptp", "dwdp"]
    apart = ["--decode", "tp", "--prefill-devices"]
    refused(monkeypatch, capsys, loads.arguments, ["--systems", "dptp", *apart, "3"], "dptp: it takes .*, and has 3:")
    decode = ["--systems", "tp", "--decode", "dptp", "--prefill-devices", "4"]
    refused(monkeypatch, capsys, loads.arguments, decode, "dptp: it takes .*, and has 2:")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--cpu", "--model", "nope"], "--model nope: write qwen3"),
        (["--cpu", "--load", "a=1/1"], "load 'a=1/1': write NAME="),
        (["--cpu", "--load", "a=1/1/1,every=2"], "load a: its clients ask one request after the other"),
        (["--cpu", "--part-s", "0"], "--part-s 0: write more than 0"),
        (["--cpu", "--settle-s", "-1"], "--settle-s -1: write 0 or more"),
        (["--cpu", "--layers", "0"], "--layers 0: write 1 or more"),
        (["--cpu", "--part-s", "300"], "--limit-s 840: parts and settling alone take 908 s: write more"),
        (["--cpu", "--extra", "--part-s", "300"], "--limit-s 1140: parts and settling alone take 1508 s"),
        (["--cpu", "--part-s", "200", "--limit-s", "420"], "--limit-s 420: parts and settling alone take 608 s"),
        (["--cpu", "--ranks", "1"], "--ranks 1: nobody would be left to serve: write 2 or more"),
        (["--ranks", "4", "--part-s", "200"], "--limit-s 510: parts and settling alone take 608 s"),
        (["--ranks", "3"], "this takes 3 GPUs, and 1 can be seen"),
        (["--cpu", "--model", "qwen3-int4"], "model qwen3-int4: only weights of one type or in FP8 blocks"),
        (["--cpu", "--json", "/not/there/a.json"], "--json /not/there/a.json: there is no folder /not/there"),
        (["--cpu", "--scratch", "/not/there"], "--scratch /not/there: there is no such folder: make it"),
        ([], "this takes 2 GPUs, and 1 can be seen: --cpu tries it on two cores"),
    ],
)
def test_returns(
    words: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(returns, "visible_gpus", lambda: 1)
    refused(monkeypatch, capsys, returns.arguments, words, why)


@pytest.mark.parametrize(
    ("words", "limits"),
    [
        ([], (150, 420)),
        (["--ranks", "4"], (240, 510)),
        (["--ranks", "3", "--extra"], (195, 615)),
        (["--start-s", "200"], (200, 470)),
        (["--ranks", "4", "--limit-s", "580"], (240, 580)),
        (["--cpu"], (300, 840)),
        (["--cpu", "--ranks", "3", "--start-s", "500", "--limit-s", "1500"], (500, 1500)),
        (["--ranks", "3", "--extra"], (195, 615)),
        (["--cpu", "--extra"], (300, 1140)),
    ],
)
def test_limits_of_returns_grow_with_its_ranks(
    words: list[str], limits: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(returns, "visible_gpus", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["program", *words])
    args = returns.arguments()
    assert (args.start_s, args.limit_s) == limits


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--cpu", "--ranks", "1"], "1 rank has nobody to pull from: --ranks 2 or more"),
        (["--cpu", "--turns", "0"], "--turns 0: write 1 or more"),
        (["--cpu", "--seconds", "0"], "--seconds 0: write more than 0"),
        (["--cpu", "--only", "star"], "--only star: no way has that in its name: choose of '27 MiB, rotated', "),
        (["--cpu", "--only", "8 programs"], "--only 8 programs: no way has that in its name"),
        ([], "no GPU here: --cpu tries this over shared memory"),
    ],
)
def test_contention(
    words: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ci.checks.visible.visible_gpus", lambda: 0)
    monkeypatch.setattr(contention, "Ranks", None)
    refused(monkeypatch, capsys, contention.main, words, why)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("bench.layer_calls", "--simulated counts without one"),
        ("bench.direct", "--trial tries this without one"),
        ("bench.copy_calls", "it times copies between two of them"),
        ("bench.prefill", "--cpu tries this without one"),
        ("checks.gpu_e2e", "--cpu tries this without one"),
    ],
)
def test_scripts_for_gpus(
    script: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On CPU some started engines, one after the other, and one wrote gigabytes of weights first."""
    monkeypatch.setattr("ci.checks.visible.visible_gpus", lambda: 0)
    refused(monkeypatch, capsys, importlib.import_module(f"ci.{script}").main, [], f"there is no GPU here: {why}")


def refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: Callable[[], object],
    words: list[str],
    why: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(SystemExit) as caught:
        call()
    last = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2
    assert last.startswith("program: error: ")
    assert re.search(why, last), last
