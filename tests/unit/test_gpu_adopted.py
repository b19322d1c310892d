"""A rank on a GPU that is a server of its own: it dies, and returns to the device memory that others have kept, over
simulated CUDA with real pages and sockets."""

from __future__ import annotations

import errno
import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.cuda_pair import LIMIT_S
from tests.unit.cuda_rank import process_id
from tests.unit.fake_cuda import Machine
from tests.unit.fake_vmm import PAGE, FakeVmm, fail_at, open_descriptors
from tests.unit.gpu_layers import LAYERS, SHAPES
from tests.unit.gpu_sharing import GpuRank, Group, Meeting, share_on_gpus
from tests.unit.leftovers import check_message, refusal
from vllm_dwdp.engine import loader
from vllm_dwdp.errors import DwdpTimeout, PeerLost
from vllm_dwdp.group import apart as apart_of_a_group
from vllm_dwdp.group.apart import ApartRendezvous, left_in_memory
from vllm_dwdp.group.launch import Apart
from vllm_dwdp.group.meeting import Holder
from vllm_dwdp.group.meeting import Meeting as Folder
from vllm_dwdp.layers.build import BuildApart, ModelBuild
from vllm_dwdp.transport import vmm_kept
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.cuda_device import CudaError
from vllm_dwdp.transport.kept import KeptSlab, keep_slab
from vllm_dwdp.transport.vmm import VmmTransport

RANKS = 2
#: Abstract names are the machine's, where these tests may run twice at a time.
SILENT = f"dwdp-vmm-test-silent-{os.getpid()}"


@pytest.fixture(autouse=True)
def no_build_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelBuild, "_current", None)
    monkeypatch.setattr("vllm_dwdp.transport.vmm_kept._ENDING_S", 0.0)


class Servers:
    """Two ranks, and what each told the group to hold."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, view: str) -> None:
        self._monkeypatch, self._view = monkeypatch, view
        self.group = Group(Machine(num_devices=2), Meeting(RANKS), [])
        self.held: dict[int, dict[int, list[dict[str, Any]]]] = {}
        self.start(None)

    def start(self, adopted: list[KeptSlab] | None) -> None:
        """Those that are not there."""

        def apart(rank: int) -> BuildApart:
            return BuildApart(
                adopted, 1, adopted is None, lambda held: self.held.update({rank: held}), lambda files: None
            )

        there = len(self.group.ranks)
        share_on_gpus(self._monkeypatch, self._view, RANKS, group=self.group, apart=apart, num_slots=2)
        for rank in self.group.ranks[there:]:
            rank.sharing.start()

    def kill(self) -> GpuRank:
        """Rank 1: the kernel closes its sockets and descriptors; device memory goes as the driver lets it go."""
        dead = self.group.ranks.pop()
        self.group.machine.drain()
        dead.sharing.close()
        return dead

    def adopted(self) -> list[KeptSlab]:
        return [keep_slab(Handle.from_dict(handle), "an adopted slab", LIMIT_S) for handle in self.held[0][1]]

    def forward(self) -> None:
        for rank in self.group.ranks:
            rank.wrong = rank.compared = 0
            rank.forward()
            self.group.machine.drain()
            assert (rank.compared, rank.wrong) == (LAYERS * len(SHAPES), 0)


@pytest.fixture(params=["split", "contiguous"])
def servers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    before = open_descriptors()
    found = Servers(monkeypatch, request.param)
    yield found
    while found.group.ranks:
        found.group.ranks.pop().sharing.close()
    # Each allocation that a tensor still holds has one of its own.
    assert open_descriptors() - before == len(found.group.machine.allocations)


def handle_of_the_dead(servers: Servers) -> Handle:
    return Handle.from_dict(servers.held[0][1][0])


def test_a_rank_dies_and_returns_to_its_memory(servers: Servers) -> None:
    servers.forward()
    first = servers.group.ranks[0]
    assert isinstance(first.sharing.transport, VmmTransport)
    of_first = first.sharing.slab_bytes
    servers.kill()
    servers.forward()
    before = servers.group.machine.used[0]
    servers.start(servers.adopted())
    servers.forward()
    second = servers.group.ranks[1]
    assert second.build.adopts and second.sharing.slab_bytes and first.sharing.slab_bytes == of_first
    # Nothing of its share was allocated once more.
    slots = sum(piece.nbytes for slot in second.sharing.slots for piece in slot.pieces)  # type: ignore[attr-defined]
    assert servers.group.machine.used[0] - before < slots + PAGE
    # What it was given it gives: the first may go, and return from the second.
    held = servers.held[1][0]
    assert [handle["nbytes"] for handle in held] == [layer.slab.nbytes for layer in first.sharing.layers]
    servers.kill()
    servers.start(servers.adopted())
    servers.forward()


def test_what_was_adopted_cannot_be_written(servers: Servers) -> None:
    servers.kill()
    adopted = servers.adopted()
    servers.start(adopted)
    # Closing them would close what others are given.
    assert not any(kept.descriptors for kept in adopted)  # type: ignore[union-attr]
    second = servers.group.ranks[1]
    for layer in second.sharing.layers:
        for piece in layer.slab.pieces:  # type: ignore[union-attr]
            assert not second.device.vmm.mappings[piece.address].writable


@pytest.mark.parametrize("refused", ["of the own device", "of others"])
def test_what_a_driver_says_of_one_device_is_not_taken_for_the_other(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """Whether memory can be mapped read-only may differ between that of the own device and that of a peer's."""
    set_access, dead = FakeVmm.set_access, servers.group.ranks[1]
    owned = [dead.device.vmm.mappings[layer.slab.pieces[0].address].allocation for layer in dead.sharing.layers]  # type: ignore[union-attr]

    def refusing(vmm: FakeVmm, address: int, nbytes: int, writable: bool) -> None:
        own = vmm.mappings[address].allocation in owned
        if not writable and own == (refused == "of the own device"):
            raise CudaError("set_access", "CUDA_ERROR_NOT_SUPPORTED", "made up")
        set_access(vmm, address, nbytes, writable)

    servers.kill()
    monkeypatch.setattr(FakeVmm, "set_access", refusing)
    servers.start(servers.adopted())
    servers.forward()
    second = servers.group.ranks[1]
    for layer in second.sharing.layers:
        written = [
            second.device.vmm.mappings[memory.pieces[0].address].writable  # type: ignore[union-attr]
            for memory in (layer.slab, layer.peers[0])
        ]
        assert written == [refused == "of the own device", refused == "of others"]


def test_a_rank_on_another_gpu_is_refused(servers: Servers) -> None:
    dead = servers.kill()
    kept = servers.adopted()
    other = servers.group.machine.process(1)
    transport = VmmTransport(other, other.vmm, process=process_id(other.number), keep_descriptors=True)
    here, there = (servers.group.machine.infos[number].uuid for number in (1, dead.device.index))
    refused = refusal(lambda: transport.adopt_slab(kept[0]))  # type: ignore[arg-type]
    check_message(refused, [f"in memory on cuda:{there}", f"started on cuda:{here}", "--device-ids"])
    for one in kept:
        one.close()
        one.close()
    transport.close()


def test_a_keeper_that_is_gone_or_has_it_no_longer(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    servers.kill()
    handle = handle_of_the_dead(servers)
    other = Handle(handle.transport, handle.host, handle.device, handle.nbytes, handle.payload | {"token": 64 * "0"})
    process = handle.payload["process"]["pid"]
    check_message(refusal(lambda: keep_slab(other, "it", LIMIT_S), PeerLost), [f"process {process} gives no slab"])
    servers.kill()
    monkeypatch.setattr("vllm_dwdp.transport.vmm_kept.is_gone", lambda process: True)
    check_message(
        refusal(lambda: keep_slab(handle, "it", LIMIT_S), PeerLost),
        [f"process {process}, which had a slab open, is gone"],
    )


def test_a_limit_of_descriptors_is_not_taken_for_a_keeper_that_is_gone(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers.kill()

    def full(descriptor: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(vmm_kept.os, "dup", full)
        told = refusal(lambda: keep_slab(handle_of_the_dead(servers), "it", LIMIT_S))
    check_message(told, ["keeping a slab of 1 pieces failed", "Too many open files", "raise ulimit -n"])


@pytest.mark.parametrize("call", ["reserve", "import_descriptor", "map"])
def test_no_failed_call_leaves_anything(servers: Servers, call: str) -> None:
    servers.kill()
    device, kept = servers.group.machine.process(), servers.adopted()
    transport = VmmTransport(device, device.vmm, process=process_id(device.number), keep_descriptors=True)
    before = len(device.vmm.mappings), len(device.vmm.ranges)
    undo = fail_at(device.vmm, call, 0)
    check_message(
        refusal(lambda: transport.adopt_slab(kept[0])),  # type: ignore[arg-type]
        [
            "refuses to map experts that other ranks have kept",
            "CUDA_ERROR_UNKNOWN",
            "start all ranks of the group again",
        ],
    )
    undo()
    gc.collect()
    assert (len(device.vmm.mappings), len(device.vmm.ranges)) == before and not device.vmm.handles
    for one in kept:
        one.close()
    transport.close()


def test_memory_that_was_left_counts_as_the_ranks_own(
    servers: Servers, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM measures what is free before the model is built."""
    folder = str(public / "group")
    apart = Apart("group", 1, folder)
    assert left_in_memory(apart, range(RANKS)) == 0 and not os.path.exists(folder)
    meeting = Folder(folder)
    meeting.join(0, LIMIT_S)
    # The locks of this process are not seen by itself.
    monkeypatch.setattr(Folder, "holder", lambda self, rank: Holder(os.getpid(), 1) if rank == 0 else None)
    assert left_in_memory(apart, range(RANKS)) == 0
    meeting.say(0, "holds", {str(rank): handles for rank, handles in servers.held[0].items()})
    whole = sum(piece.nbytes for layer in servers.group.ranks[1].sharing.layers for piece in layer.slab.pieces)  # type: ignore[union-attr]
    assert whole % PAGE == 0 and left_in_memory(apart, range(RANKS)) == whole
    found = SimpleNamespace(apart=apart, num_ranks=RANKS)
    monkeypatch.setattr(loader, "launch_of", lambda config: config)
    ours: Any = object.__new__(loader.ShareOnlyLoader)
    assert ours.get_external_weight_memory(found) == whole
    for other in (None, SimpleNamespace(apart=None)):
        assert ours.get_external_weight_memory(other) == 0
    meeting.leave()


def test_a_dead_rank_says_nothing_of_small_steps(servers: Servers) -> None:
    servers.kill()
    servers.group.meeting.said["direct_tokens"][0] = None
    servers.start(servers.adopted())
    assert (servers.group.ranks[1].sharing.direct_tokens or 0) > 0 or servers.group.ranks[
        1
    ].sharing.view == "contiguous"
    servers.forward()


def test_a_keeper_that_is_stopped_is_not_the_only_one_asked(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart_of_a_group, "ANSWER_S", 0.2)
    servers.kill()
    good = servers.held[0][1]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(f"\0{SILENT}")
        silent.listen()
        stopped = [{**handle, "payload": {**handle["payload"], "socket": SILENT}} for handle in good]
        keepers = {"0": {"1": stopped}, "2": {"1": good}}
        meeting = SimpleNamespace(said=lambda rank, name: keepers.get(str(rank)), positions=lambda: [])
        rank: Any = object.__new__(ApartRendezvous)
        rank.__dict__.update(meeting=meeting, share=1, rank=1, ranks=[0, 1, 2], timeout_s=LIMIT_S)
        kept = rank.adopt()
        assert kept is not None and [slab.handle.payload["socket"] for slab in kept] == [
            handle["payload"]["socket"] for handle in good
        ]
        for slab in kept:
            slab.close()
        keepers.pop("2")
        rank.timeout_s = 0.3
        check_message(refusal(rank.adopt, DwdpTimeout), ["gave no descriptors"])
