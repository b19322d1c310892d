"""ci/checks/gpu_ipc.py as far as a machine without a GPU can run it: its measurements on simulated CUDA, its processes
over shared memory."""

import gc
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ci.root import ROOT
from tests.unit.cuda_rank import process_id, start_ranks, transport_of
from tests.unit.fake_cuda import FakeCuda, Machine
from tests.unit.fake_vmm import PAGE
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.base import Memory
from vllm_dwdp.transport.cuda_copy import CopyOptions
from vllm_dwdp.transport.cuda_pinned import PinnedTransport
from vllm_dwdp.transport.cupy_ipc import CupyIpcTransport
from vllm_dwdp.transport.vmm import VmmTransport

SCRIPT = "ci.checks.gpu_ipc"
MIB = 1 << 20


@pytest.fixture(scope="module")
def measures() -> Any:
    from ci.bench import rates as gpu_rates

    return gpu_rates


class FakeCompute:
    def __init__(self, device: FakeCuda) -> None:
        self.device = device

    def sleep(self, stream: int, seconds: float) -> None:
        self.device.delay(stream, seconds)

    def matmul(self) -> None:
        self.device.kernel([lambda: None], seconds=0.01)


class Setup:
    def __init__(self, nbytes: int) -> None:
        self.machine = Machine(3)
        owner, self.device = self.machine.process(), self.machine.process()
        self.owner = CupyIpcTransport(owner, process=process_id(0))
        self.transport = CupyIpcTransport(self.device, process=process_id(1))
        slab = self.owner.allocate_slab(nbytes)
        slab.tensor().random_()
        self.source: Memory = self.transport.map_peer(self.owner.export_handle(slab))
        self.slot = self.transport.allocate_slot(nbytes)
        self.compute = FakeCompute(self.device)


def test_rates(measures: Any) -> None:
    setup = Setup(2 * MIB)
    rows = measures.rates(setup.device, "fake", setup.source, setup.slot, [MIB // 4, MIB])
    assert len(rows) == 3 and measures.same_bytes(setup.device, setup.source, setup.slot).ok
    by_name = {row.name: row.value for row in rows}
    assert by_name["fake, 256 KiB, 1 in flight"] == pytest.approx(1.0)  # the simulated rate, GB/s
    assert by_name["fake, 1024 KiB, 1 in flight, without a graph"] == pytest.approx(1.0)
    setup.slot.tensor()[5] ^= 1
    assert not measures.same_bytes(setup.device, setup.source, setup.slot).ok


def test_launch_times(measures: Any) -> None:
    setup = Setup(2 * 3 * 64 * 32)
    layer = measures.Layer(experts=8, ranks=4, hidden=64, intermediate=32)
    rows = measures.launch_times(setup.device, setup.transport, setup.source, layer, [4096, MIB])
    assert len(rows) == 6 and all(row.value > 0 for row in rows)
    assert [row.ok for row in rows[:5]] == [None] * 5
    assert rows[5].ok is False  # no host launches so small a layer in 1 % of its pull
    assert measures.Layer().tensors[0].row_bytes + measures.Layer().tensors[1].row_bytes == 44_040_192


def test_merge_copy_against_split(measures: Any) -> None:
    layer = measures.Layer(experts=8, ranks=4, hidden=64, intermediate=32)
    setup = Setup(layer.share_bytes)
    rows = measures.merge(setup.device, setup.transport, setup.source, layer, 2, 4096)
    assert [row.name for row in rows] == [
        f"2 of 8 held: {what}" for what in ("contiguous", "merge copy", "split", "contiguous / split")
    ]
    assert rows[3].ok and rows[3].value == pytest.approx(8 / 6, rel=0.1)  # all experts copied against those that lack


def test_overlap(measures: Any) -> None:
    setup = Setup(MIB)
    rows = measures.overlap(setup.device, setup.compute, setup.source, setup.slot, [MIB // 4], products=3)
    assert [row.name for row in rows] == ["256 KiB: slow-down", "one copy: slow-down"]
    assert all(row.ok and row.value == pytest.approx(0.0, abs=1e-6) for row in rows)


def test_exposed_waits(measures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(MIB)
    # Nothing runs before compute waits, so that the copy is never done by then.
    monkeypatch.setattr(setup.machine, "wander", lambda most: None)
    monkeypatch.setattr(measures.time, "sleep", lambda seconds: setup.machine.drain())
    monkeypatch.setattr("vllm_dwdp.transport.cuda_copy.time.sleep", lambda seconds: setup.machine.drain())
    rows = measures.exposed(setup.device, setup.compute, setup.source, setup.slot, [1e-3, 5e-3])
    assert [row.ok for row in rows] == [True] * 3, rows
    assert rows[1].value == pytest.approx(5.0, rel=1e-3) and rows[2].value == 0.0


def test_a_wrong_measurement_of_waits_is_caught(measures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(MIB)
    monkeypatch.setattr(setup.machine, "wander", lambda most: None)
    monkeypatch.setattr("vllm_dwdp.transport.cuda_copy.time.sleep", lambda seconds: setup.machine.drain())
    monkeypatch.setattr(setup.device, "wait_event", lambda stream, event: None)  # compute does not wait
    monkeypatch.setattr(measures.time, "sleep", lambda seconds: setup.machine.drain())
    rows = measures.exposed(setup.device, setup.compute, setup.source, setup.slot, [1e-3, 5e-3])
    assert [row.ok for row in rows] == [False, False, True]


def test_pinned_source(measures: Any) -> None:
    machine = Machine()
    owner, reader = PinnedTransport(machine.process()), PinnedTransport(machine.process())
    slab = owner.allocate_slab(MIB)
    slab.tensor().random_()
    source, slot = reader.map_peer(owner.export_handle(slab)), reader.allocate_slot(MIB)
    measures.rates(machine.processes[1], "pinned", source, slot, [MIB])
    assert measures.same_bytes(machine.processes[1], source, slot).ok
    reader.close()
    owner.close()
    del slab, source, slot
    gc.collect()


@pytest.mark.parametrize("broken", ["", "bytes", "rate"])
def test_composed_ranges(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ci.checks.gpu_compose import compose_rows, mark

    machine = Machine(3, num_devices=2)
    owner, reader = (transport_of("vmm", machine.process(rank), process=process_id(rank)) for rank in (0, 1))
    assert isinstance(owner, VmmTransport) and isinstance(reader, VmmTransport)
    slab = owner.allocate_pieces([2 * PAGE, 2 * PAGE])
    mark(slab, 1)
    peer = reader.map_peer(owner.export_handle(slab))
    if broken == "bytes":
        slab.tensor()[-1] = 0
    taken: list[int] = []

    def product(weights: torch.Tensor, tokens: int) -> float:
        taken.append(weights.nbytes)
        return 2.0 if broken == "rate" and len(taken) > 1 else 1.0

    monkeypatch.setattr("vllm_dwdp.transport.cuda_copy.time.sleep", lambda seconds: machine.drain())
    rows = compose_rows(reader.device, reader, peer, product)
    assert taken == [4 * PAGE] * 6
    wrong = [row.name for row in rows if row.ok is False]
    expected = {"": [], "bytes": ["own first: wrong bytes", "a peer's first: wrong bytes"]}
    assert wrong == expected.get(broken, ["own: rate of a product, 16 tokens"]), rows
    reader.close()
    owner.close()
    gc.collect()
    assert machine.used == [0, 0]


def test_parts_of_the_transports() -> None:
    from ci.checks.gpu_ipc import parts

    assert parts("vmm", 1).keys() - parts("cupy_ipc", 1).keys() == {"compose", "adopted"}
    assert parts("shm", 1).keys() == {"ranks", "killed", "left", "direct", "adopted"}


@pytest.mark.parametrize("broken", [False, True])
def test_graphs_that_skip_and_repeat_layers(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the part "direct" does on a GPU, over the simulated one; graphs that read slots are noticed."""
    from ci.checks import gpu_ranks
    from tests.unit.vllm_graphs import use_simulated_graphs

    machine = Machine(5)
    ranks = start_ranks(machine, 2, 5, Ring(gpu_ranks.LAYERS, gpu_ranks.SLOTS), CopyOptions())
    rank = ranks[0]
    use_simulated_graphs(rank.device, monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", machine.drain)
    slabs: list[Any] = list(rank.transport._peers)
    rights = [slab.tensor().clone() for slab in slabs]
    seen: list[bool] = []

    def read(layer: int) -> None:
        rank.device.kernel([lambda: seen.append(torch.equal(slabs[layer].tensor(), rights[layer]))])

    player: Any = object.__new__(gpu_ranks.Player)
    player.__dict__.update(
        torch=torch, rng=random.Random(1), on_gpu=True, prefetcher=rank.prefetcher, engine=rank.engine, page=rank.page
    )
    player.wrong, player.use = torch.zeros((), dtype=torch.int64), rank.use
    player.read = rank.use if broken else read
    rank.prefetcher.start()
    player.direct(400)
    machine.drain()
    assert rank.compared > 100 and int(player.wrong) == 0
    assert (rank.wrong > 0) is broken and all(seen) and (broken or len(seen) > 200)
    rank.prefetcher.close(30.0)


def test_processes_and_report_over_shared_memory(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", SCRIPT, "--cpu", "--acquires", "60", "--json", str(out), "--limit", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=320, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed of 4 checks" in done.stdout
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows if row["ok"]] == [
        "shm, 2 ranks: wrong bytes",
        "shm, play: wrong bytes after the owner's end",
        "shm, direct: wrong bytes after the owner's end",
        "shm, 2 ranks: wrong bytes",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU these parts do not fail")
def test_a_part_that_fails_hides_no_other(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", SCRIPT, "--transport", "vmm", "--only", "refusals,compose", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["part"] for row in rows if row["ok"] is False} == {"refusals", "compose"}


def test_an_owner_is_killed_and_its_next_life_adopts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", SCRIPT, "--cpu", "--only", "adopted", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=320, cwd=ROOT)
    assert done.returncode == 0 and "0 failed of 5 checks" in done.stdout, done.stdout + done.stderr
