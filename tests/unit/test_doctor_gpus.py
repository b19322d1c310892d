"""The doctor's GPUs, on simulated CUDA: pairs, CUDA IPC, rates; and the processes it looks with."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.cuda_rank import process_id
from tests.unit.fake_cuda import GIB, Machine
from vllm_dwdp.doctor import examine, gpus
from vllm_dwdp.doctor.child import Child, ChildFailed
from vllm_dwdp.doctor.examine import Links, link_lines, measure
from vllm_dwdp.doctor.gpu_rank import GpuRank
from vllm_dwdp.doctor.line import Line
from vllm_dwdp.doctor.readings import Cupy, Offer, Read, Torch, Unread, Vllm
from vllm_dwdp.doctor.smi import Gpu, Smi
from vllm_dwdp.errors import DwdpError

H200 = Gpu(0, "GPU-a", "NVIDIA H200", 140 * GIB, 139 * GIB, (9, 0), False)
OFFERS = [Offer(i, f"GPU-{i}", "NVIDIA H200", 13000, {}, "", True) for i in range(2)]
READS = [Read(0, 1, True, "", 395e9, True), Read(1, 0, True, "", 391e9, True)]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Three GPUs; a child is a rank in this process. Afterwards nothing of CUDA is left."""
    made = Machine(num_devices=3)
    monkeypatch.setattr("vllm_dwdp.doctor.gpu_rank.NBYTES", 4 << 20)
    yield made
    gc.collect()
    assert all(process.clean() for process in made.processes) and made.used == [0, 0, 0]


class Local:
    """A child's part `gpu`, on simulated CUDA."""

    def __init__(self, machine: Machine, index: int) -> None:
        self.device = machine.process(index)
        self.rank = GpuRank(self.device, process_id(self.device.number), lambda _: None)
        self.asked = 0

    def ask(self, limit_s: float, order: Any = None) -> dict[str, Any]:
        assert limit_s > 0
        self.asked += 1
        if order is None:
            return asdict(self.rank.offer())
        return {"reads": [asdict(self.rank.read(owner)) for owner in order]}

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        self.rank.__exit__(None, None, None)


def measured(machine: Machine, monkeypatch: pytest.MonkeyPatch, count: int) -> Links:
    part = lambda name, index: Local(machine, int(index))  # noqa: E731
    monkeypatch.setattr(examine, "Child", SimpleNamespace(part=part))
    return measure(count)


def told(lines: Sequence[Line]) -> dict[str, Line]:
    return {line.name: line for line in lines}


def test_every_ordered_pair_is_read_and_timed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    links = measured(machine, monkeypatch, 3)
    assert not links.trouble
    pairs = [(read.reader, read.owner) for read in links.reads]
    assert pairs == [(a, b) for a in range(3) for b in range(3) if a != b]
    assert all(read.right and read.access and read.rate == pytest.approx(1e9) for read in links.reads)
    lines = told(link_lines(links))
    assert lines["peer access"].text == "all 6 ordered pairs" and lines["CUDA IPC"].state == "ok"
    assert lines["links of GPU 2"].text.startswith("GB/s: 1 from GPU 0, 1 from GPU 1")


def test_one_gpu_is_read_by_a_second_process(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told(link_lines(measured(machine, monkeypatch, 1)))
    assert list(lines) == ["CUDA IPC", "CUDA VMM"] and lines["CUDA IPC"].state == "ok"


def test_a_pair_without_peer_access(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.unreachable = {(0, 1)}
    lines = told(link_lines(measured(machine, monkeypatch, 2)))
    assert lines["peer access"].state == "failure" and "1 of 2 pairs have none: GPU 0 of 1" in lines["peer access"].text
    assert lines["CUDA IPC"].state == "ok"
    machine.unreachable |= {(1, 0)}
    assert told(link_lines(measured(machine, monkeypatch, 2)))["CUDA IPC"].state == "warning"


@pytest.mark.parametrize(("call", "words"), [("ipc_handle", "gives no IPC handle"), ("ipc_open", "was refused")])
def test_ipc_that_is_refused(call: str, words: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Machine.process

    def failing(self: Machine, index: int = 0) -> Any:
        made = process(self, index)
        made.fail[call] = "cudaErrorNotSupported"
        return made

    monkeypatch.setattr(Machine, "process", failing)
    line = told(link_lines(measured(machine, monkeypatch, 2)))["CUDA IPC"]
    assert line.state == "failure" and words in line.text and "--ipc=host" in line.remedy
    assert "vllm-dwdp doctor" not in line.text


def test_bytes_that_are_not_the_owners(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Local(machine, 0), Local(machine, 1)
    offer = first.ask(1.0)
    first.rank._slab.tensor().fill_(200)
    read = second.ask(1.0, [offer])["reads"][0]
    assert read["right"] is False
    for rank in (second, first):
        rank.__exit__()
    assert "wrong bytes: GPU 1 of 0" in gpus.ipc(OFFERS, [Read(**read)]).text


def test_a_gpu_that_is_almost_full(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.total = 40 << 20
    assert [read.right for read in measured(machine, monkeypatch, 2).reads] == [True, True]
    monkeypatch.setattr("vllm_dwdp.doctor.gpu_rank.NBYTES", 32 << 20)
    assert [read.right for read in measured(machine, monkeypatch, 2).reads] == [True, True]
    machine.total = 12 << 20
    with pytest.raises(DwdpError, match="GiB free"):
        measured(machine, monkeypatch, 2)


def test_a_copy_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(num_devices=2)
    monkeypatch.setattr("vllm_dwdp.doctor.gpu_rank.NBYTES", 4 << 20)
    monkeypatch.setattr("vllm_dwdp.doctor.gpu_rank._LIMIT_S", 0.05)
    first, second = Local(machine, 0), Local(machine, 1)
    offer = first.ask(1.0)
    machine.frozen = True
    with pytest.raises(DwdpError, match=r"not done|did not end"):
        second.ask(1.0, [offer])


class Answer:
    """A child that has one answer."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.answer = answer

    def ask(self, limit_s: float, order: Any = None) -> dict[str, Any]:
        return self.answer if order is None else {"error": "no /proc here"}

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_machine_with_two_gpus(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of it, from made-up readings, and rates over simulated CUDA."""
    smi = Smi((H200, replace(H200, index=1, uuid="GPU-b", free=100 * GIB)), "580.65", (13, 0))
    answers: dict[str, dict[str, Any]] = {
        "torch": asdict(Torch("2.13.0", "13.0", ["GPU-a", "GPU-b"])),
        "vllm": asdict(Vllm("0.32.0")),
        "cupy": asdict(Cupy("14.2.0", 13000)),
        "memfd": {},
    }

    def part(name: str, *index: str) -> Any:
        return Local(machine, int(*index)) if name == "gpu" else Answer(answers[name])

    monkeypatch.setattr(examine, "Child", SimpleNamespace(part=part))
    monkeypatch.setattr(examine, "ask_smi", lambda: smi)
    lines = examine.examine("DeepSeek-R1-FP4", 4)
    assert [line.name for line in lines] == [
        "Python", "plugin", "vLLM", "vLLM's seams", "torch", "CuPy", "driver", "GPUs", "GPU 0", "GPU 1", "peer access",
        "CUDA IPC", "CUDA VMM", "links of GPU 0", "links of GPU 1", "/proc", "descriptors", "locked memory", "/dev/shm",
        "memory", "cores", "plan",
    ]  # fmt: skip
    found = told(lines)
    assert {name for name, line in found.items() if line.state == "failure"} == {"/proc", "plan"}
    assert "PCIe" in found["links of GPU 0"].text  # the simulated rate
    assert found["GPU 1"].state == "warning" and "DeepSeek-R1-FP4 on 4 x H200" in found["plan"].text
    answers["cupy"] = {"error": "No module named 'cupy'", "absent": True}
    found = told(examine.examine())
    assert found["CuPy"].state == "failure" and "CUDA IPC" not in found and "plan" not in found


NO_PEER = replace(READS[0], access=False, rate=0.0)
CHECKS = [
    (gpus.one(H200), "ok", "139.0 of 140.0 GiB free"),
    (gpus.one(replace(H200, free=100 * GIB)), "warning", "--gpu-memory-utilization"),
    (gpus.one(replace(H200, mig=True)), "warning", "-mig 0"),
    (gpus.one(replace(H200, capability=(7, 5))), "warning", "BF16"),
    (gpus.one(replace(H200, total=None)), "warning", "memory not told"),
    (gpus.number([H200])[0], "warning", "two or more"),
    (gpus.number([H200, H200])[0], "ok", "2"),
    (gpus.wsl("6.6-microsoft-standard-WSL2", [H200])[0], "failure", "no CUDA IPC under WSL"),
    (gpus.wsl("6.6-microsoft-standard-WSL2", [])[0], "ok", "CPU"),
    (gpus.links(OFFERS, READS)[0], "ok", "GB/s: 395 from GPU 1"),
    (gpus.links(OFFERS, [replace(READS[0], rate=50e9)])[0], "warning", "no more than PCIe gives"),
    (gpus.links(OFFERS, [replace(READS[0], rate=150e9)])[0], "warning", "are usual"),
    (gpus.links([replace(OFFERS[0], name="NVIDIA A100")], [replace(READS[0], rate=150e9)])[0], "ok", "150"),
    (gpus.vmm(OFFERS)[0], "ok", "descriptors; fabric handles: not allowed"),
    (gpus.vmm([replace(OFFERS[0], fabric=True)])[0], "ok", "descriptors; fabric handles: allowed"),
    (gpus.vmm([replace(OFFERS[0], vmm=False)])[0], "ok", "not allowed"),
    (gpus.vmm([replace(OFFERS[0], vmm=None)])[0], "ok", "not looked at"),
    (gpus.ipc(OFFERS, [NO_PEER]), "warning", "not tried"),
    (link_lines(Links(OFFERS, [], "no answer after 120 s"))[0], "failure", "no answer after 120 s"),
]


@pytest.mark.parametrize(("line", "state", "words"), CHECKS)
def test_a_check_says(line: Line, state: str, words: str) -> None:
    assert line.state == state and words in f"{line.text} -> {line.remedy}", line


def test_only_gpus_that_torch_sees_are_looked_at() -> None:
    other = replace(H200, index=1, uuid="GPU-b")
    smi = Smi((H200, other), "580", (13, 0))
    assert gpus.visible(smi, Torch("2", "13.0", ["GPU-b"])) == [other]
    assert gpus.visible(smi, Torch("2", "13.0", ["MIG-x"])) == [H200, other]
    assert gpus.visible(smi, Unread("gone")) == [H200, other] and gpus.visible(None, Unread("gone")) == []
    assert gpus.wsl("6.6.0-generic", [H200]) == [] and gpus.peer_access([]) == []


def test_children_without_cupy_say_so() -> None:
    """Two real children, on this machine."""
    links = measure(2)
    assert not links.offers and ("CuPy cannot be imported" in links.trouble or "GPU" in links.trouble)
    assert "vllm-dwdp doctor" not in links.trouble


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_child_that_hangs_is_gone_with_all_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_dwdp.doctor.child._END_S", 0.2)
    code = (
        "import json, os, signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "started = subprocess.Popen(['sleep', '99'])\n"
        "print(json.dumps({'pids': [os.getpid(), started.pid]}), flush=True)\n"
        "time.sleep(99)"
    )
    with Child([sys.executable, "-c", code]) as child:
        pids = child.ask(20.0)["pids"]
        with pytest.raises(ChildFailed, match="no answer after 0 s"):
            child.ask(0.1)
    deadline = time.monotonic() + 10
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, "left behind"
        time.sleep(0.02)


def test_a_child_that_crashes_is_told() -> None:
    code = "import os; os.kill(os.getpid(), 11)"
    with Child([sys.executable, "-c", code]) as child, pytest.raises(ChildFailed, match=r"ended with SIGSEGV"):
        child.ask(20.0)
    code = "import os; os.kill(os.getpid(), 40)"
    with Child([sys.executable, "-c", code]) as child, pytest.raises(ChildFailed, match=r"ended with signal 40$"):
        child.ask(20.0)
    with Child([sys.executable, "-c", ""]) as child, pytest.raises(ChildFailed, match="ended with status 0"):
        child.ask(20.0)
    with pytest.raises(ChildFailed, match="nowhere cannot be started"):
        Child(["/no/such/nowhere"])


def test_a_child_ends_with_its_orders() -> None:
    """As where the doctor itself is killed: the pipe closes."""
    with Child.part("memfd") as child:
        assert "cannot be read" in child.ask(20.0, {"odd": 1})["error"]
        assert child._process.wait(20) == 0
    with Child.part("memfd") as child:
        assert child._process.stdin is not None
        child._process.stdin.close()
        assert child._process.wait(20) == 0
