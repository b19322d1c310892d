"""What can go wrong between the config and the first token, without an engine: ranks that fail, differ or never come,
memory that does not suffice, layers that cannot be shared. One line each, at once, and nothing left behind."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from torch import nn

from tests.unit import leftovers
from tests.unit.leftovers import build, check_message, refusal
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.config import Rendezvous as Address
from vllm_dwdp.engine.rendezvous import Identity, Rendezvous, host_rendezvous
from vllm_dwdp.errors import DwdpError, DwdpTimeout, PeerLost
from vllm_dwdp.layers.build import LayerBuild, ModelBuild
from vllm_dwdp.placement import place
from vllm_dwdp.transport import limits
from vllm_dwdp.transport.shm import ShmTransport

pytestmark = pytest.mark.usefixtures("nothing_left")

#: Of a connection: torch looks the address up by DNS, which may take some seconds.
CONNECT_S = 30.0
MINE = Identity("0.32.0", "0.1.0", "model", "1a", "torch.bfloat16", "2b")


class Owner:
    """Whose life is that of a store."""


@pytest.fixture
def ranks() -> Iterator[tuple[Rendezvous, Rendezvous]]:
    owner = Owner()
    address = host_rendezvous(owner)
    yield Rendezvous(address, 0, CONNECT_S), Rendezvous(address, 1, CONNECT_S)


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


def test_the_front_end_ends() -> None:
    """In a process of its own, as in life: there the store ends with everything it was connected to."""
    code = (
        "import sys\nfrom vllm_dwdp.engine.rendezvous import host_rendezvous\n"
        "class Owner: pass\nowner = Owner()\naddress = host_rendezvous(owner)\n"
        "print(address.port, address.group_id, flush=True)\nsys.stdin.read()\n"
    )
    front = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert front.stdin and front.stdout
    port, launch = front.stdout.readline().split()
    address = Address("127.0.0.1", int(port), launch)
    rank = Rendezvous(address, 0, CONNECT_S)
    timer = threading.Timer(0.3, front.kill)
    timer.start()
    check_message(refusal(lambda: rank.get(1, "slabs"), PeerLost), ["rank 0", "lost", "front end is gone"])
    timer.join()
    front.communicate()
    rank.fail(RuntimeError("too late to tell anybody"))
    check_message(refusal(lambda: rank.peek(1, "counters"), PeerLost), ["store is gone", "front end has ended"])
    message = refusal(lambda: Rendezvous(address, 1, 1.0), DwdpTimeout)
    check_message(message, [f"rank 1 cannot reach the rendezvous store at 127.0.0.1:{port}", "still alive?"])


def test_the_store_takes_no_port_that_is_taken() -> None:
    """It asks the kernel for a free one, so that any number of launches fit on a machine."""
    owners = [Owner() for _ in range(3)]
    ports = {host_rendezvous(owner).port for owner in owners}
    assert len(ports) == 3
    for port in ports:
        with socket.socket() as other, pytest.raises(OSError):
            other.bind(("127.0.0.1", port))


def worker(moe: Path, rank: int, failure: Exception) -> Any:
    """A dwdp worker whose vLLM part fails to load the model."""
    from vllm_dwdp.engine.launch import launch_of
    from vllm_dwdp.engine.worker import DwdpWorkerMixin

    class Broken:
        def load_model(self) -> None:
            raise failure

    class Worker(DwdpWorkerMixin, Broken):
        def __init__(self) -> None:
            self.vllm_config = build(moe, disable_log_stats=True, additional_config={"dwdp": {"timeout_s": CONNECT_S}})
            launch = launch_of(self.vllm_config)
            assert launch is not None
            self.dwdp_launch, self.dwdp_rank, self.dwdp_sharing = launch, rank, None

    return Worker()


def test_a_worker_that_fails_to_load(tiny_moe: Path) -> None:
    """Its error stays what it was, and the peers get it."""
    from vllm_dwdp.engine.worker import identity_of

    broken = worker(tiny_moe, 1, OSError(28, "No space left on device"))
    peer = Rendezvous(broken.dwdp_launch.rendezvous, 0, CONNECT_S)
    peer.put("identity", dataclasses.asdict(identity_of(broken.vllm_config, broken.dwdp_launch)))
    assert "No space left" in refusal(broken.load_model, OSError)
    check_message(refusal(lambda: peer.get(1, "slabs"), PeerLost), ["rank 1 failed", "No space left on device"])


def test_a_worker_of_another_vllm(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version that is compared is the one that is installed."""
    from vllm_dwdp.engine.worker import identity_of

    mine = worker(tiny_moe, 0, RuntimeError("not reached"))
    peer = Rendezvous(mine.dwdp_launch.rendezvous, 1, CONNECT_S)
    with monkeypatch.context() as other:
        other.setattr("vllm.version.__version__", "0.99.1+cpu")
        peer.put("identity", dataclasses.asdict(identity_of(mine.vllm_config, mine.dwdp_launch)))
    check_message(refusal(mine.load_model), ["ranks 0 and 1", "vllm: 0.32.0 here, 0.99.1 there", "versions"])
    check_message(refusal(lambda: peer.get(0, "slabs"), PeerLost), ["rank 0 failed", "DwdpError", "0.99.1 there"])


@pytest.mark.parametrize("what", ["slab", "slot"])
def test_memory_that_does_not_suffice(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before a page of it is touched, or even reserved."""
    monkeypatch.setattr(limits, "available_memory", lambda: limits.Available(1 << 30, "the cgroup of this test"))
    monkeypatch.setattr(os, "memfd_create", lambda *_: pytest.fail("memory was taken"))
    transport = ShmTransport()
    message = refusal(lambda: getattr(transport, f"allocate_{what}")(5 << 30))
    check_message(message, [f"a {what} needs 5.00 GiB", "the cgroup of this test leaves 1.00 GiB", "use more ranks"])


def moe_layer(experts: int = 8, inner: int = 32, hidden: int = 32) -> Any:
    return SimpleNamespace(
        num_experts=experts, intermediate_size_per_partition=inner, hidden_dim=hidden, is_act_and_mul=True
    )


def add(settings: dict[str, Any], layer: Any, ranks: int = 2) -> tuple[int, ...]:
    build = ModelBuild(DwdpConfig.parse(settings), 0, ranks, on_cpu=True)
    return build.add_layer(None, "model.layers.3.mlp.experts", torch.bfloat16, layer)  # type: ignore[arg-type]


def test_in_place_where_experts_do_not_end_on_pages() -> None:
    odd = moe_layer(hidden=33)
    message = refusal(lambda: add({"weight_view": "inplace"}, odd))
    check_message(message, ['"inplace"', "model.layers.3", "4224 and 2112 bytes", "4096", "auto or contiguous"])
    assert add({"weight_view": "auto"}, odd) == (0, 1, 2, 3)


def test_a_layer_with_fewer_experts_than_ranks() -> None:
    check_message(refusal(lambda: add({}, moe_layer(experts=3), ranks=4)), ["4 ranks", "3 experts", "to 3 or less"])


def test_fused_shared_experts() -> None:
    from vllm_dwdp.layers.routed_experts import DwdpExpertsMixin

    fused = SimpleNamespace(num_fused_shared_experts=2)
    message = refusal(lambda: DwdpExpertsMixin("layers.3.experts", torch.bfloat16, None, None, fused))  # type: ignore[arg-type]
    check_message(message, ["layers.3.experts fuses 2 shared experts", "turn shared-expert fusion off"])


def test_models_that_are_not_covered() -> None:
    from vllm_dwdp.layers.coverage import check_coverage

    empty = ModelBuild(DwdpConfig(), 0, 2, on_cpu=True)
    check_message(refusal(lambda: check_coverage(nn.Linear(2, 2), empty)), ["Linear", "no MoE layer", "not support"])
    covered = dataclasses.replace(empty, layers=[LayerBuild(None, "layer", place(8, 2, None), False)])  # type: ignore[arg-type]
    model = nn.Module()
    model.add_module("experts", nn.Module())
    model.get_submodule("experts").register_parameter("w", nn.Parameter(torch.zeros(8, 2, 2)))
    holder = nn.Module()
    holder.add_module("mlp", model)
    check_message(refusal(lambda: check_coverage(holder, covered)), ["mlp.experts.w holds 8 experts", "not supported"])


def test_a_transport_that_is_not_there() -> None:
    from vllm_dwdp.layers.sharing import make_transport

    gpu = ModelBuild(DwdpConfig(), 0, 2, on_cpu=False)
    check_message(refusal(lambda: make_transport(gpu, ())), ["'auto'", "between CPU ranks", "shm"])


def test_the_check_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything that must not stay is seen when it does."""
    monkeypatch.setattr(leftovers, "WAIT_S", 0.2)
    (tmp_path / "empty").mkdir()
    stop = threading.Event()
    with pytest.raises(AssertionError) as seen, leftovers.nothing_left(tmp_path / "empty", monkeypatch):
        child = subprocess.Popen(["sleep", "60"])
        listener = socket.create_server(("127.0.0.1", 0))
        memory = os.memfd_create("dwdp-test")
        thread = threading.Thread(target=stop.wait, name="dwdp-test")
        thread.start()
        monkeypatch.setenv("DWDP_RENDEZVOUS", "h:1/g")
        folder = tempfile.mkdtemp()
    child.kill()
    child.wait()
    listener.close()
    os.close(memory)
    stop.set()
    thread.join()
    os.rmdir(folder)
    for word in (
        "sleep 60",
        "listening on",
        "/memfd:dwdp-test",
        "thread dwdp-test",
        "DWDP_RENDEZVOUS",
        "temporary file",
    ):
        assert word in str(seen.value)


def test_the_errors_are_one_family() -> None:
    """So that `except DwdpError`, or `except ValueError`, is enough."""
    assert issubclass(DwdpTimeout, DwdpError) and issubclass(PeerLost, DwdpError) and issubclass(DwdpError, ValueError)
