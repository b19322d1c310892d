"""`vllm-dwdp doctor`: what each check says of made-up readings, and the command on this machine."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.unit.helpers import descriptors
from vllm_dwdp import cli
from vllm_dwdp.doctor import host, software
from vllm_dwdp.doctor.examine import memory_file_trouble
from vllm_dwdp.doctor.fits import planned
from vllm_dwdp.doctor.line import Line, as_json, exit_status, failure, guarded, ok, shown, warning
from vllm_dwdp.doctor.parts import PARTS
from vllm_dwdp.doctor.parts import run as run_part
from vllm_dwdp.doctor.readings import Cupy, Torch, Unread, Vllm, decode
from vllm_dwdp.doctor.smi import Gpu, Smi, ask_smi, parse
from vllm_dwdp.errors import DOCTOR, DwdpError
from vllm_dwdp.transport import memfd
from vllm_dwdp.transport.limits import Available

GIB = 1 << 30
GONE = Unread("No module named 'x'", absent=True)
BROKEN = Unread("libx.so is missing")
CPU = Torch("2.13.0+cpu", None, [])
CUDA13 = Torch("2.13.0", "13.0", ["GPU-a", "GPU-b"])
BLIND = Torch("2.13.0", "13.0", [], "the driver is too old")
TWO = Smi(
    tuple(Gpu(i, f"GPU-{'ab'[i]}", "NVIDIA H200", 140 * GIB, 139 * GIB, (9, 0), False) for i in range(2)),
    "580",
    (13, 0),
)
OLD = Smi(TWO.gpus, "550", (12, 4))
HUNG = Smi(trouble="no answer after 60 s")
CUPY13, CUPY12 = Cupy("14.2.0", 13000), Cupy("14.2.0", 12090)

SOFTWARE = [
    (software.python((3, 12, 1)), "ok", "3.12.1"),
    (software.python((3, 14, 0)), "warning", "3.11 to 3.13"),
    (software.plugin(["dwdp"], None), "ok", "finds"),
    (software.plugin(["dwdp"], "a, dwdp"), "ok", "finds"),
    (software.plugin(["dwdp"], "a"), "failure", "VLLM_PLUGINS is 'a'"),
    (software.plugin(["a"], None), "failure", "pip install ."),
    (software.vllm(Vllm("0.32.0"), CUDA13), "ok", "0.32.0"),
    (software.vllm(Vllm("0.31.0"), CPU), "ok", "0.31.0"),
    (software.vllm(Vllm("0.31.0"), CUDA13), "failure", "tested on CPU only -> install vLLM 0.32.0 for GPUs"),
    (software.vllm(Vllm("0.33.0", "vLLM 0.33.0 is here, not 0.32.0"), CPU), "failure", "install vLLM 0.31.0 or 0.32.0"),
    (software.vllm(GONE, CUDA13), "failure", "not installed -> install vLLM 0.32.0 ("),
    (software.vllm(BROKEN, BROKEN), "failure", "cannot be imported: libx.so is missing"),
    (software.seams([]), "ok", "expected"),
    (software.seams(["a.b: found nothing", "c"]), "failure", "2 are not as expected: a.b: found nothing"),
    (software.seams(None), "warning", "install vLLM"),
    (software.torch(CPU, 0), "ok", "built for CPU"),
    (software.torch(CPU, 2), "warning", "with 2 GPUs"),
    (software.torch(CUDA13, 2), "ok", "CUDA 13.0, sees 2 of 2 GPUs"),
    (software.torch(BLIND, 2), "failure", "sees none of 2 GPUs (the driver is too old)"),
    (software.torch(BLIND, 0), "failure", "--gpus all"),
    (software.torch(GONE, 0), "failure", "not installed"),
    (software.torch(BROKEN, 0), "failure", "libx.so"),
    (software.cupy(CUPY13, ["cupy-cuda13x"], CUDA13), "ok", "14.2.0, with CUDA 13.0"),
    (software.cupy(CUPY12, ["cupy-cuda12x"], CUDA13), "failure", "pip uninstall cupy-cuda12x, then pip install"),
    (software.cupy(CUPY13, ["cupy-cuda12x", "cupy-cuda13x"], CUDA13), "failure", "overwrite each other"),
    (software.cupy(GONE, [], CUDA13), "failure", "'.[cuda13]'"),
    (software.cupy(GONE, [], Torch("2", "12.8", ["GPU-a"])), "failure", "'.[cuda12]'"),
    (software.cupy(BROKEN, ["cupy-cuda13x"], CUDA13), "failure", "libx.so"),
    (software.cupy(GONE, [], CPU), "ok", "not needed on CPU"),
    (software.driver(TWO, CUDA13, CUPY13), "ok", "580, for CUDA up to 13.0"),
    (software.driver(OLD, CUDA13, CUPY13), "failure", "too old for torch's 13.0 and CuPy's 13.0"),
    (software.driver(OLD, Torch("2", "12.9", ["GPU-a"]), CUPY12), "ok", "12.4"),
    (software.driver(OLD, Torch("2", "12.9", ["GPU-a"]), CUPY13), "failure", "too old for CuPy's 13.0"),
    (software.driver(None, CPU, GONE), "ok", "ranks run on the CPU"),
    (software.driver(None, CUDA13, CUPY13), "failure", "nvidia-smi is not there"),
    (software.driver(Smi(), CUDA13, CUPY13), "failure", "lists no GPU"),
    (software.driver(HUNG, CPU, GONE), "failure", "no answer after 60 s"),
    (software.driver(Smi(TWO.gpus, "580", None), CUDA13, CUPY13), "warning", "unknown CUDA"),
]  # fmt: skip
HOST = [
    (host.proc(None), "ok", "memory file"),
    (host.proc("no permission"), "failure", "no permission"),
    (host.descriptors(1024, 1 << 20), "ok", "1024, raised to at most 1048576"),
    (host.descriptors(1024, resource.RLIM_INFINITY), "ok", "any number"),
    (host.descriptors(256, 1024), "warning", "ulimit -Hn"),
    (host.locked_memory(resource.RLIM_INFINITY, True), "ok", "unlimited"),
    (host.locked_memory(8 << 20, False), "ok", "8.0 MiB"),
    (host.locked_memory(64 << 10, True), "warning", "memlock=-1"),
    (host.shm(None), "failure", "mount a tmpfs"),
    (host.shm(host.Space(64 << 20, 64 << 20)), "warning", "--shm-size"),
    (host.shm(host.Space(8 * GIB, 16 * GIB)), "ok", "8.00 of 16.00 GiB free"),
    (host.memory(Available(2 * GIB, "the cgroup x")), "warning", "2.0 GiB left by the cgroup x"),
    (host.memory(Available(20 * GIB, "the host")), "ok", "20.0 GiB left by the host"),
    (host.cores(1, True), "warning", "taskset"),
    (host.cores(16, False), "ok", "16"),
]
PLANS = [
    (planned("DeepSeek-R1", 8, "NVIDIA H200"), "warning", "do not use it here"),
    (planned("Qwen3-30B-A3B", 8, "NVIDIA B200"), "warning", "full replicas"),
    (planned("OLMoE-1B-7B-0924", 8, "NVIDIA H200"), "ok", "OLMoE"),  # of 4,096 positions
    (planned("DeepSeek-R1", 2, "NVIDIA H200"), "failure", "--ranks"),
    (planned("DeepSeek-R1", 4, None), "warning", "no GPU to plan for"),
    (planned("DeepSeek-R1", 4, None), "warning", "vllm-dwdp plan DeepSeek-R1 --ranks 4 --hardware NAME"),
    (planned("DeepSeek-R1", 4, "NVIDIA H100 PCIe"), "warning", "no hardware file for NVIDIA H100 PCIe"),
    (planned("DeepSeek-R1", 9, "NVIDIA H200"), "warning", "2..8 ranks"),
    (planned("DeepSeek-R1-FP4", 4, "NVIDIA GB200"), "warning", "auto would hold 64 of 256 experts"),
]


@pytest.mark.parametrize(("line", "state", "words"), [*SOFTWARE, *HOST, *PLANS])
def test_a_check_says(line: Line, state: str, words: str) -> None:
    assert line.state == state and words in f"{line.text} -> {line.remedy}", line
    assert "\n" not in line.text + line.remedy and line.text[-1] != "."


def test_states_make_the_exit_status_and_the_output() -> None:
    good, odd, bad = ok("a", "fine"), warning("b", "odd", "turn it " * 20 + "--end=all"), failure("c", "bad", "mend it")
    assert [exit_status(lines) for lines in ([], [good], [good, odd], [bad, good])] == [0, 0, 0, 1]
    text = shown([good, odd, bad])
    assert text.splitlines()[0].split() == ["ok", "a", "fine"] and text.endswith("1 ok, 1 warning, 1 failure")
    assert shown([good]).endswith("1 ok, 0 warnings, 0 failures")
    assert "-> mend it" in text and "--end=all" in text and max(map(len, text.splitlines())) <= 110
    told = json.loads(as_json([good, odd, bad]))
    assert (told["ok"], told["warning"], told["failure"]) == (1, 1, 1)
    assert told["lines"][2] == {"name": "c", "state": "failure", "text": "bad", "remedy": "mend it"}


def test_a_check_that_raises_is_a_line() -> None:
    def broken() -> Line:
        raise OSError("two\nlines")

    (line,) = guarded("it", broken)
    assert (line.name, line.state) == ("it", "failure") and "OSError: two lines" in line.text


def test_nvidia_smi_is_read() -> None:
    listed = (
        "GPU-a, NVIDIA H200, 143771, 143000, 9.0, Disabled, 580.65\nGPU-b, Old, [N/A], [N/A], [N/A], Enabled, 580.65\n"
    )
    smi = parse(listed, "| NVIDIA-SMI 580.65   Driver Version: 580.65   CUDA Version: 13.0 |")
    assert smi.driver == "580.65" and smi.cuda == (13, 0) and not smi.trouble
    first, second = smi.gpus
    assert first == Gpu(0, "GPU-a", "NVIDIA H200", 143771 << 20, 143000 << 20, (9, 0), False)
    assert second == Gpu(1, "GPU-b", "Old", None, None, None, True)
    assert parse("No devices were found\n", "").gpus == ()


@pytest.mark.parametrize(
    ("script", "trouble"), [("echo broken driver; exit 9", "status 9: broken driver"), ("sleep 9", "no answer")]
)
def test_nvidia_smi_that_fails_or_hangs(
    script: str, trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("vllm_dwdp.doctor.smi.LIMIT_S", 0.3)
    monkeypatch.setattr("vllm_dwdp.doctor.child._END_S", 0.3)
    begin = time.monotonic()
    smi = ask_smi()
    assert smi is not None and trouble in smi.trouble and not smi.gpus
    assert time.monotonic() - begin < 8


def test_what_a_part_raises_is_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(error: Exception) -> object:
        def part(orders: object, say: object) -> None:
            raise error

        monkeypatch.setitem(PARTS, "torch", part)
        said: list[dict[str, object]] = []
        run_part("torch", [], said.append)
        return decode(Torch, said[0])

    assert answer(ModuleNotFoundError("gone", name="torch")) == Unread("gone", absent=True)
    assert answer(ModuleNotFoundError("gone", name="numpy")) == Unread("gone")
    assert answer(DwdpError(f"a\nb{DOCTOR}")) == Unread("a b")
    assert answer(OSError()) == Unread("OSError")


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """The tests run on it, so nothing fails here; and nothing is left."""
    before, children = descriptors(), psutil.Process().children(recursive=True)
    status = cli.main(["doctor", "--json"])
    captured = capsys.readouterr()
    lines = {line["name"]: line for line in json.loads(captured.out)["lines"]}
    assert status == 0 and not captured.err, captured
    for name in ("Python", "plugin", "vLLM", "vLLM's seams", "torch", "driver", "/proc", "/dev/shm"):
        assert lines[name]["state"] == "ok", lines[name]
    assert descriptors() == before and psutil.Process().children(recursive=True) == children


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_where_the_doctor_is_ended(how: signal.Signals) -> None:
    """`timeout` and service managers tell the doctor alone; its children import for seconds, in groups of their own."""
    doctor = subprocess.Popen([sys.executable, "-m", "vllm_dwdp.cli", "doctor"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        children: list[psutil.Process] = []
        # Until two of them import: torch does for a second at least.
        while len([child for child in children if child.is_running() and child.memory_info().rss > 30 << 20]) < 2:
            assert doctor.poll() is None and time.monotonic() < deadline
            children = psutil.Process(doctor.pid).children()
            time.sleep(0.01)
    finally:
        doctor.send_signal(how)
        doctor.wait(60)
    ended, left = psutil.wait_procs(children, timeout=0.3)
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE], (ended, left)


def test_a_machine_that_starts_no_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object, **__: object) -> object:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("vllm_dwdp.doctor.child.subprocess.Popen", full)
    assert cli.main(["doctor", "--json"]) == 1
    out = capsys.readouterr().out
    assert out.count("cannot be started (Resource temporarily unavailable)") >= 3, out


def test_a_memory_file_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process is asked for it, under a number that is not this one's."""
    assert memory_file_trouble() is None
    monkeypatch.setattr(memfd.os, "getpid", lambda: 1 << 22)
    trouble = memory_file_trouble()
    assert trouble is not None and "is gone" in trouble and DOCTOR not in trouble


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for words, *argv in (("name a model", "--ranks", "4"), ("/no/such", "/no/such/model"), ("nonsense", "--nonsense")):
        try:
            status = cli.main(["doctor", *argv])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        err = capsys.readouterr().err
        assert status == 2 and words in err and err.count("\n") == 1, err


def test_a_stop_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> list[Line]:
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_dwdp.doctor.examine.examine", stopped)
    assert cli.main(["doctor"]) == 130
