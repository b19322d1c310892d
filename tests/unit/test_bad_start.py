"""Ranks that fail, differ or never come, without an engine: one line that says which and why, at once, nothing left."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.v1.worker.cpu_worker import CPUWorker

from tests.unit import leftovers
from tests.unit.helpers import LIMIT_S, LaunchOwner
from tests.unit.leftovers import build, check_message, refusal
from vllm_dwdp.engine.worker import DwdpWorkerMixin, identity_of
from vllm_dwdp.errors import DwdpError, DwdpTimeout, PeerLost
from vllm_dwdp.group.launch import launch_of
from vllm_dwdp.group.launch_folder import make_folder
from vllm_dwdp.group.rendezvous import Identity, Rendezvous

pytestmark = pytest.mark.usefixtures("nothing_left")

MINE = Identity("0.32.0", "0.1.0", "model", "1a", "torch.bfloat16", "2b")


@pytest.fixture
def ranks() -> Iterator[tuple[Rendezvous, Rendezvous]]:
    owner = LaunchOwner()
    folder = make_folder(owner)
    yield Rendezvous(folder, 0, LIMIT_S), Rendezvous(folder, 1, LIMIT_S)


Ranks = tuple[Rendezvous, Rendezvous]


def test_a_rank_that_fails_tells_the_others(ranks: Ranks) -> None:
    first, second = ranks
    second.fail(RuntimeError("Cannot find any model weights with `/models/m`\nsecond line"))
    started = time.monotonic()
    message = refusal(lambda: first.gather("slabs", [], [0, 1]), PeerLost)
    check_message(message, ["rank 1 failed", "RuntimeError: Cannot find any model weights with `/models/m`"])
    assert time.monotonic() - started < 5


def test_a_rank_that_fails_while_others_wait(ranks: Ranks) -> None:
    first, second = ranks
    timer = threading.Timer(0.3, second.fail, [MemoryError("no memory")])
    timer.start()
    check_message(refusal(lambda: first.get(1, "slabs"), PeerLost), ["rank 1 failed", "MemoryError: no memory"])
    timer.join()


def test_a_peer_that_never_arrives(ranks: Ranks) -> None:
    started = time.monotonic()
    message = refusal(lambda: ranks[0].get(1, "identity", timeout_s=1.0), DwdpTimeout)
    check_message(message, ["rank 0 waited 1 s for rank 1 (identity)", "look at its log", '"timeout_s"'])
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        pytest.param("vllm", "0.33.0", ["vllm: 0.32.0 here, 0.33.0 there"], id="vllm"),
        pytest.param("vllm_dwdp", "0.2.0", ["vllm_dwdp: 0.1.0 here, 0.2.0 there"], id="vllm-dwdp"),
        pytest.param("model", "other", ["model: model here, other there"], id="model"),
        pytest.param("model_hash", "9f", ["model_hash: 1a here, 9f there"], id="model-config"),
        pytest.param("dtype", "torch.float16", ["torch.bfloat16 here, torch.float16 there"], id="dtype"),
        pytest.param("dwdp", "9f", ["dwdp: 2b here, 9f there"], id="settings"),
    ],
)
def test_a_peer_that_differs(ranks: Ranks, field: str, value: str, words: list[str]) -> None:
    first, second = ranks
    second.put("identity", dataclasses.asdict(dataclasses.replace(MINE, **{field: value})))
    message = refusal(lambda: first.check_identity(MINE, [0, 1]))
    check_message(message, ["ranks 0 and 1 cannot share experts", *words, "same model, options and versions"])
    assert message.count(" here, ") == 1


class Broken(CPUWorker):
    """vLLM's worker on a full disk."""

    def load_model(self) -> None:
        raise OSError(28, "No space left on device")


class Worker(DwdpWorkerMixin, Broken):
    """A dwdp worker whose vLLM part fails to load the model."""

    def __init__(self, moe: Path, rank: int) -> None:
        self.vllm_config = build(moe, disable_log_stats=True, additional_config={"dwdp": {"timeout_s": LIMIT_S}})
        launch = launch_of(self.vllm_config)
        assert launch is not None
        self.dwdp_launch, self.dwdp_rank, self.dwdp_sharing = launch, rank, None

    def peer(self, rank: int) -> Rendezvous:
        """Another rank of this launch, which published the same identity."""
        peer = Rendezvous(self.dwdp_launch.folder, rank, LIMIT_S)
        peer.put("identity", dataclasses.asdict(identity_of(self.vllm_config, self.dwdp_launch)))
        return peer


def test_a_worker_that_fails_to_load(tiny_moe: Path) -> None:
    """Its error stays what it was, and the peers get it."""
    broken = Worker(tiny_moe, 1)
    peer = broken.peer(0)
    assert "No space left" in refusal(broken.load_model, OSError)
    check_message(refusal(lambda: peer.get(1, "slabs"), PeerLost), ["rank 1 failed", "No space left on device"])


def test_a_worker_of_another_vllm(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version that is compared is the one that is installed."""
    mine = Worker(tiny_moe, 0)
    with monkeypatch.context() as other:
        other.setattr("vllm.version.__version__", "0.99.1+cpu")
        peer = mine.peer(1)
    check_message(refusal(mine.load_model), ["ranks 0 and 1", "vllm: 0.32.0 here, 0.99.1 there", "versions"])
    check_message(refusal(lambda: peer.get(0, "slabs"), PeerLost), ["rank 0 failed", "DwdpError", "0.99.1 there"])


def test_the_check_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything that must not stay is seen when it does."""
    (tmp_path / "empty").mkdir()
    stop = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(leftovers, "WAIT_S", 0.2)
        with pytest.raises(AssertionError) as seen, leftovers.nothing_left(tmp_path / "empty", patched):
            child = subprocess.Popen(["sleep", "60"])
            listener = socket.create_server(("127.0.0.1", 0))
            memory = os.memfd_create("dwdp-test")
            shared = SharedMemory(create=True, size=1)
            thread = threading.Thread(target=stop.wait, name="dwdp-test")
            thread.start()
            patched.setenv("DWDP_RENDEZVOUS", "/tmp/dwdp-launch")
            folder = tempfile.mkdtemp()
    child.kill()
    child.wait()
    listener.close()
    os.close(memory)
    shared.close()
    shared.unlink()
    stop.set()
    thread.join()
    os.rmdir(folder)
    kinds = (
        "sleep 60",
        "listening on",
        "/memfd:dwdp-test",
        "/dev/shm/",
        "thread dwdp-test",
        "DWDP_REND",
        "temporary file",
    )
    for kind in kinds:
        assert kind in str(seen.value)


def test_the_errors_are_one_family() -> None:
    """So that `except DwdpError`, or `except ValueError`, is enough."""
    assert issubclass(DwdpTimeout, DwdpError) and issubclass(PeerLost, DwdpError) and issubclass(DwdpError, ValueError)
