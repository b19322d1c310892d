"""What is alone the transport vmm's, on simulated CUDA with real pages and real sockets: pieces, composed ranges,
descriptors, and nothing left behind whichever call fails."""

import gc
import threading
import time
from collections.abc import Iterator

import pytest

from tests.unit.cuda_pair import LIMIT_S, Pair, one_line, with_payload
from tests.unit.cuda_rank import process_id
from tests.unit.fake_cuda import Machine
from tests.unit.fake_vmm import INVALID, PAGE, fail_at, open_descriptors
from vllm_dwdp.errors import DOCTOR, DwdpError, DwdpTimeout, PeerLost
from vllm_dwdp.transport import vmm_socket
from vllm_dwdp.transport.base import Copy
from vllm_dwdp.transport.cuda_copy import CopyOptions
from vllm_dwdp.transport.cuda_vmm import INSTEAD
from vllm_dwdp.transport.vmm import Part, VmmTransport
from vllm_dwdp.transport.vmm_memory import VmmSlab

SIZES = [PAGE, 3 * PAGE, 2 * PAGE]


class Vmm(Pair):
    owner: VmmTransport
    reader: VmmTransport

    def __init__(self) -> None:
        super().__init__("vmm")

    def filled(self, sizes: list[int]) -> VmmSlab:
        """A slab of the owner, whose piece i holds i + 1 everywhere."""
        slab = self.owner.allocate_pieces(sizes)
        at = 0
        for number, size in enumerate(sizes):
            slab.tensor()[at : at + size] = number + 1
            at += size
        return slab


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vmm]:
    monkeypatch.setattr("vllm_dwdp.transport.vmm_kept._ENDING_S", 0.0)
    made = Vmm()
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "dwdp-descriptors"]


def test_pieces_lie_side_by_side_and_are_allocated_apart(pair: Vmm) -> None:
    assert pair.owner.page == PAGE
    slab, slot = pair.owner.allocate_pieces(SIZES), pair.owner.allocate_slot_pieces(SIZES)
    for memory in (slab, slot):
        assert memory.nbytes == sum(SIZES) and not memory.tensor().any()
        assert [piece.nbytes for piece in memory.pieces] == SIZES
        assert [piece.address - memory.address for piece in memory.pieces] == [0, PAGE, 4 * PAGE]
    assert len(pair.machine.allocations) == 6 and not pair.mine.vmm.handles
    assert [piece.nbytes for piece in pair.owner.allocate_slab(PAGE + 1).pieces] == [2 * PAGE]
    for sizes in ([PAGE, PAGE - 1], [0, PAGE], [-PAGE]):
        with pytest.raises(DwdpError, match=rf"must have at least one|must be a multiple of {PAGE} bytes"):
            pair.owner.allocate_pieces(sizes)
    with pytest.raises(DwdpError, match="must have at least one"):
        pair.owner.allocate_slot_pieces([])


def test_a_composed_range_is_the_same_memory(pair: Vmm) -> None:
    peer, slot = pair.reader.map_peer(pair.owner.export_handle(pair.filled(SIZES))), pair.reader.allocate_slot(PAGE)
    own = pair.reader.allocate_pieces([2 * PAGE])
    parts = [Part(peer, 1), Part(own, 0), Part(peer, 0), Part(slot, 0)]
    composed = pair.reader.compose(parts)
    own.tensor().fill_(7)
    slot.tensor().fill_(8)
    seen = composed.tensor()
    assert seen.unique_consecutive(return_counts=True)[0].tolist() == [2, 7, 1, 8]
    assert composed.nbytes == 7 * PAGE and [piece.nbytes for piece in composed.pieces] == [
        3 * PAGE,
        2 * PAGE,
        PAGE,
        PAGE,
    ]
    seen[3 * PAGE] = 9
    assert own.tensor()[0] == 9
    written = [pair.theirs.vmm.mappings[piece.address].writable for piece in composed.pieces]
    assert written == [False, True, False, True]
    # A copy over the border of two pieces.
    target, engine = pair.reader.allocate_slot(4 * PAGE), pair.reader.copy_engine()
    engine.finish(engine.submit(engine.bind([Copy(target.address, composed.address + PAGE, 4 * PAGE)])), LIMIT_S)
    assert (target.tensor() == seen[PAGE : 5 * PAGE]).all()
    engine.close(LIMIT_S)


def test_a_composed_range_outlives_what_it_is_made_of(pair: Vmm) -> None:
    peer, own = pair.reader.map_peer(pair.owner.export_handle(pair.filled(SIZES))), pair.reader.allocate_slot(PAGE)
    view = pair.reader.compose([Part(peer, 2), Part(own, 0)]).tensor()
    own.tensor().fill_(4)
    pair.reader.unmap_peer(peer)
    own.close()
    pair.owner.close()
    pair.reader.close()
    assert view.unique_consecutive().tolist() == [3, 4] and len(pair.theirs.vmm.mappings) == 2
    del view
    assert pair.theirs.clean() and not pair.machine.allocations


def test_what_cannot_be_composed(pair: Vmm) -> None:
    slab = pair.owner.allocate_slab(PAGE)
    other = pair.reader.allocate_slot(PAGE)
    for parts, words in (
        ([], "no parts"),
        ([Part(slab, 1)], "piece 1 of 1"),
        ([Part(slab, -1)], "piece -1 of 1"),
        ([Part(other, 0)], "a VmmSlot: it is made of live memory of this transport"),
    ):
        with pytest.raises(DwdpError, match=words):
            pair.owner.compose(parts)


def test_a_driver_without_read_only_mappings(pair: Vmm) -> None:
    assert pair.reader.peers_read_only is None
    handle = pair.owner.export_handle(pair.filled(SIZES))
    peer = pair.reader.map_peer(handle)
    assert pair.reader.peers_read_only is True
    pair.theirs.vmm.reads_only = False
    with pytest.raises(DwdpError, match=INVALID):  # what was allowed once is not taken for refused
        pair.reader.map_peer(handle)
    assert not pair.theirs.vmm.mappings[peer.address].writable

    other = pair.machine.process(2)
    other.vmm.reads_only = False
    reader = pair.transport(other)
    assert isinstance(reader, VmmTransport)
    peer = reader.map_peer(handle)
    assert reader.peers_read_only is False and other.vmm.mappings[peer.address].writable
    before = other.calls["set_access"]
    reader.map_peer(handle)
    assert other.calls["set_access"] == before + len(SIZES), "asked once"
    reader.close()


def start_and_share(machine: Machine, transports: list[VmmTransport]) -> None:
    """All that a rank does, on the devices 0 and 1, with what is made appended to `transports`."""
    for number in (0, 1):
        device = machine.processes[number]
        transports.append(VmmTransport(device, device.vmm, process=process_id(number)))  # type: ignore[attr-defined]
    owner, reader = transports
    peer = reader.map_peer(owner.export_handle(owner.allocate_pieces(SIZES)))
    slot = reader.allocate_slot_pieces(SIZES)
    reader.compose([Part(peer, 0), Part(slot, 1), Part(peer, 2)])


@pytest.mark.parametrize("call", ["reserve", "create", "retain", "export", "import_descriptor", "map", "set_access"])
@pytest.mark.parametrize("rank", [0, 1])
def test_no_failed_call_leaves_anything(call: str, rank: int) -> None:
    """Each call in turn, for as often as it is made."""
    failed = 0
    for turn in range(30):
        machine = Machine(num_devices=2)
        device = [machine.process(number) for number in (0, 1)][rank]
        fail_at(device.vmm, call, turn)
        transports: list[VmmTransport] = []
        try:
            start_and_share(machine, transports)
        except DwdpError as error:
            assert "CUDA_ERROR_UNKNOWN" in str(error) and "\n" not in str(error)
            failed += 1
        else:
            assert failed or (call, rank) == ("import_descriptor", 0)
            turn = 30
        # What failed has let go already, before anything is closed.
        gc.collect()
        assert not any(one.vmm.handles for one in machine.processes)  # type: ignore[attr-defined]
        for transport in reversed(transports):
            transport.close()
        gc.collect()
        assert all(one.clean() for one in machine.processes)  # type: ignore[attr-defined]
        assert machine.used == [0, 0] and not machine.allocations and not open_descriptors()
        if turn == 30:
            break
    assert turn == 30, "it was called more often than was tried"


@pytest.mark.parametrize("call", ["unmap", "free_range", "synchronize"])
def test_a_failed_step_of_letting_go_keeps_no_other(pair: Vmm, call: str, caplog: pytest.LogCaptureFixture) -> None:
    undo = fail_at(pair.mine.vmm, call, 0)
    pair.owner.allocate_pieces(SIZES).close()
    undo()
    assert "CUDA_ERROR_UNKNOWN" in caplog.text
    left = pair.mine.vmm
    assert len(left.mappings) == (call == "unmap") and len(left.ranges) == (call != "synchronize")
    for address, mapped in list(left.mappings.items()):
        left.unmap(address, mapped.nbytes)
    for address, nbytes in list(left.ranges.items()):
        left.free_range(address, nbytes)


def test_work_ends_before_memory_goes(pair: Vmm, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[int] = []
    monkeypatch.setattr(pair.mine.vmm, "synchronize", lambda: mapped.append(len(pair.mine.vmm.mappings)))
    pair.owner.allocate_pieces(SIZES).close()
    assert mapped == [len(SIZES)] and not pair.mine.vmm.mappings


def test_more_descriptors_than_a_message_holds(pair: Vmm) -> None:
    sizes = [PAGE] * (2 * vmm_socket.AT_ONCE + 3)
    slab = pair.filled(sizes)
    handle = pair.owner.export_handle(slab)
    assert open_descriptors() == 2 * len(sizes)  # the simulated driver's, and the owner's
    assert pair.owner.export_handle(slab) == handle and open_descriptors() == 2 * len(sizes)
    peer = pair.reader.map_peer(handle)
    assert (peer.tensor() == slab.tensor()).all() and open_descriptors() == 2 * len(sizes)
    slab.close()
    assert open_descriptors() == len(sizes)  # mapped by the reader
    assert "was refused" in one_line(pair.reader, handle)


def test_a_wrong_token_or_a_forged_handle(pair: Vmm) -> None:
    handle = pair.handle()
    for changes, words in (
        ({"token": "0" * 64}, "was refused (0 descriptors came, 1 are left)"),
        ({"socket": "dwdp-vmm-nobody"}, "--network=host"),
        ({"pieces": [PAGE - 1]}, f"does not fit pages of {PAGE} bytes"),
        ({"pieces": ["65536"]}, "does not fit"),
        ({"pieces": []}, "does not fit"),
        ({"pieces": [2 * PAGE]}, INVALID),
        ({"pieces": [PAGE, PAGE]}, "0 descriptors came, 1 are left"),
        ({"pieces": "65536"}, "cannot be read"),
    ):
        text = one_line(pair.reader, with_payload(handle, **changes))
        assert words in text, text
    assert text and pair.reader.map_peer(handle).nbytes == handle.nbytes


@pytest.mark.parametrize("side", ["owner", "reader"])
def test_another_user_gets_and_gives_nothing(pair: Vmm, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, original = pair.handle(), vmm_socket._user

    def user(end: object) -> int:
        serves = threading.current_thread().name == "dwdp-descriptors"
        return original(end) + ((side == "owner") == serves)  # type: ignore[arg-type]

    monkeypatch.setattr(vmm_socket, "_user", user)
    before = open_descriptors()
    text = one_line(pair.reader, handle)
    assert ("was refused" if side == "owner" else "runs as another user") in text
    assert open_descriptors() == before


def test_an_owner_that_does_not_answer(pair: Vmm, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, ended = pair.handle(), threading.Event()
    monkeypatch.setattr(vmm_socket.DescriptorServer, "_serve", lambda *_: ended.wait(LIMIT_S))
    other = pair.machine.process(1)
    reader = VmmTransport(other, other.vmm, CopyOptions(timeout_s=0.3), process_id(5))
    begin = time.monotonic()
    text = one_line(reader, handle, DwdpTimeout)
    ended.set()
    assert "process 1000 gave no descriptors of its slab within 0.3 s" in text and time.monotonic() - begin < 5
    reader.close()


def test_a_reader_that_says_nothing_holds_up_nobody(pair: Vmm, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(vmm_socket, "_CLIENT_S", 0.2)
    handle = pair.handle()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect("\0" + handle.payload["socket"])
        assert pair.reader.map_peer(handle).nbytes == handle.nbytes


def test_an_owner_that_ends_meanwhile(pair: Vmm, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = pair.handle()
    pair.owner.close()
    text = one_line(pair.reader, handle)
    assert "Connection refused" in text and text.endswith(f"{INSTEAD}{DOCTOR}")
    monkeypatch.setattr("vllm_dwdp.transport.vmm_kept.is_gone", lambda process: True)
    assert "(process 1000) is gone (Connection refused)" in one_line(pair.reader, handle, PeerLost)
    # One whose socket has closed may be seen a little longer.
    looks = iter([False, False, False, True])
    monkeypatch.setattr("vllm_dwdp.transport.vmm_kept.is_gone", lambda process: next(looks))
    monkeypatch.setattr("vllm_dwdp.transport.vmm_kept._ENDING_S", LIMIT_S)
    assert "(process 1000) is gone (Connection refused)" in one_line(pair.reader, handle, PeerLost)


def test_a_machine_that_refuses_says_what_else_there_is() -> None:
    machine = Machine()
    device = machine.process()
    device.vmm.missing = "made up"
    # The composite view has no other transport: both have to go.
    instead = r'no transport vmm \(made up\): set dwdp.transport to "cupy_ipc", without weight_view "composite"'
    with pytest.raises(DwdpError, match=instead):
        VmmTransport(device, device.vmm)
    device.vmm.missing = ""
    for call in ("create", "export"):
        device.fail[call] = "CUDA_ERROR_NOT_PERMITTED"
        with pytest.raises(DwdpError, match=rf'\({call}: CUDA_ERROR_NOT_PERMITTED\): set dwdp.transport to "cupy_ipc"'):
            VmmTransport(device, device.vmm)
    gc.collect()
    assert device.clean() and machine.used == [0] and not open_descriptors()
