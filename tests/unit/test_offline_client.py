"""The offline client over several engines: which rank gets what, and what it knows of their loads."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from vllm import SamplingParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.engine.core_client import SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_dwdp.engine import offline_client
from vllm_dwdp.engine.offline_client import DwdpSyncClient, client_of
from vllm_dwdp.errors import DwdpError

#: A wait that does not end fails soon.
pytestmark = pytest.mark.timeout(60)

RANKS = 3
_KINDS = {kind.value: kind for kind in EngineCoreRequestType}


class Sent(NamedTuple):
    rank: int
    kind: EngineCoreRequestType
    payload: Any


class Wire:
    """The socket to the engines: keeps what was sent, decoded again, and has the engines answer utilities."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.answers: dict[str, list[Any]] = {}
        self.futures: dict[int, Future[Any]] = {}
        self.silent = False

    def send_multipart(self, frames: tuple[Any, ...], copy: bool) -> None:
        rank, kind = int(frames[0]), _KINDS[frames[1]]
        payload = MsgpackDecoder(EngineCoreRequest if kind == EngineCoreRequestType.ADD else None).decode(frames[2:])
        self.sent.append(Sent(rank, kind, payload))
        if kind == EngineCoreRequestType.UTILITY and not self.silent:
            _, call_id, method, _ = payload
            self.futures[call_id].set_result(self.answers[method][rank])


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def client(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> DwdpSyncClient:
    """A client whose engines are `wire`; all of its own code and vLLM's encoding are real."""

    def connect(self: Any) -> None:
        self.is_dp = True
        self.core_engines = [str(rank).encode() for rank in range(RANKS)]
        self.core_engine = self.core_engines[0]
        self.encoder = MsgpackEncoder()
        self.input_socket = wire
        self.outputs_queue = queue.Queue()
        self.utility_results = wire.futures
        self.resources = SimpleNamespace(engine_dead=False)
        self._finalizer = lambda: None  # there is nothing to end
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace())

    monkeypatch.setattr(SyncMPClient, "__init__", connect)
    monkeypatch.setattr(offline_client, "_PERIOD_S", 0.01)
    return DwdpSyncClient()


def request(name: str, rank: int | None = None) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=rank,
    )


def add(client: DwdpSyncClient, wire: Wire, name: str, rank: int | None = None) -> int:
    """The rank that gets a request."""
    client.add_request(request(name, rank))
    sent = wire.sent[-1]
    assert (sent.kind, sent.payload.request_id) == (EngineCoreRequestType.ADD, name)
    return sent.rank


def put(client: DwdpSyncClient, *outputs: EngineCoreOutput, finished: set[str] | None = None) -> None:
    client.outputs_queue.put(EngineCoreOutputs(outputs=list(outputs), finished_requests=finished))


def output(name: str, reason: FinishReason | None) -> EngineCoreOutput:
    return EngineCoreOutput(request_id=name, new_token_ids=[5], finish_reason=reason)


def test_the_rank_with_the_fewest_unfinished_requests_gets_the_next(client: DwdpSyncClient, wire: Wire) -> None:
    assert [add(client, wire, name) for name in "abcdef"] == [0, 1, 2, 0, 1, 2]
    # Two unfinished on each; rank 1 ends one, and with the pin rank 0 has one more.
    put(client, output("b", FinishReason.LENGTH))
    client.get_output()
    assert add(client, wire, "g", rank=0) == 0
    # Rank 1 has the fewest; then ranks 1 and 2 have two each, and rank 2 served fewer.
    assert [add(client, wire, name) for name in "hi"] == [1, 2]
    assert client._unfinished == [3, 2, 3]


def test_of_equally_loaded_ranks_the_one_that_served_least_is_next(client: DwdpSyncClient, wire: Wire) -> None:
    for name in "abc":
        assert add(client, wire, name, rank=0) == 0
    put(client, *(output(name, FinishReason.STOP) for name in "abc"))
    client.get_output()
    assert [add(client, wire, "d"), client._served] == [1, [3, 1, 0]]


def test_a_pinned_request_goes_to_its_rank_whatever_its_load(client: DwdpSyncClient, wire: Wire) -> None:
    assert [add(client, wire, str(i), rank=2) for i in range(4)] == [2] * 4
    assert client._unfinished == [0, 0, 4]
    for rank in (-1, RANKS):
        with pytest.raises(DwdpError, match=f"data_parallel_rank {rank} of {RANKS} ranks"):
            client.add_request(request("beyond", rank))
    assert len(wire.sent) == 4 and client._unfinished == [0, 0, 4]


@pytest.mark.parametrize("reason", FinishReason)
def test_a_request_that_ends_is_no_load(client: DwdpSyncClient, wire: Wire, reason: FinishReason) -> None:
    for name in "abc":
        add(client, wire, name)
    put(client, output("a", None), output("b", reason))
    assert [item.request_id for item in client.get_output().outputs] == ["a", "b"]
    assert client._unfinished == [1, 0, 1]
    # An engine names some that ended without an output; a request told twice counts once.
    put(client, output("a", reason), finished={"a", "b", "c"})
    client.get_output()
    assert client._unfinished == [0, 0, 0] and client._engine_of == {}


def test_aborts_go_to_the_ranks_that_have_the_requests(client: DwdpSyncClient, wire: Wire) -> None:
    for name in "abcdef":
        add(client, wire, name)
    wire.sent.clear()
    client.abort_requests(["b", "never sent", "f", "e"])
    kind = EngineCoreRequestType.ABORT
    assert wire.sent == [Sent(1, kind, ["b", "e"]), Sent(2, kind, ["f"])]
    assert client._unfinished == [2, 0, 1]
    client.abort_requests(["b", "f"])
    assert len(wire.sent) == 2 and client._unfinished == [2, 0, 1]
    assert add(client, wire, "g") == 1


def test_nothing_is_sent_to_engines_that_are_dead(client: DwdpSyncClient, wire: Wire) -> None:
    add(client, wire, "a")
    client.resources.engine_dead = True
    client.abort_requests(["a"])
    for call in (lambda: client.add_request(request("b")), lambda: client.call_utility("profile", True)):
        with pytest.raises(EngineDeadError):
            call()
    assert len(wire.sent) == 1 and client._unfinished == [1, 0, 0]


@pytest.mark.timeout(15)
def test_a_dead_engine_ends_the_waits(client: DwdpSyncClient, wire: Wire) -> None:
    wire.silent = True
    for wait in (client.get_output, lambda: client.call_utility("profile", True)):
        client.resources.engine_dead = False
        dies = threading.Timer(0.05, setattr, (client.resources, "engine_dead", True))
        dies.start()
        with pytest.raises(EngineDeadError):
            wait()
        dies.join()


def test_outputs_that_came_before_an_engine_died_are_given_out(client: DwdpSyncClient, wire: Wire) -> None:
    add(client, wire, "a")
    put(client, output("a", FinishReason.STOP))
    client.resources.engine_dead = True
    assert client.get_output().outputs[0].request_id == "a"


def test_an_output_ends_the_wait_for_it(client: DwdpSyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline_client, "_PERIOD_S", 60.0)
    late = threading.Timer(0.05, put, (client, output("a", None)))
    late.start()
    assert client.get_output().outputs[0].request_id == "a"
    late.join()


def test_utilities_are_called_on_all_ranks_and_joined_in_their_order(client: DwdpSyncClient, wire: Wire) -> None:
    wire.answers = {
        "collective_rpc": [["worker 0"], ["worker 1"], ["worker 2"]],
        "reset_prefix_cache": [True, True, False],
        "get_supported_tasks": [["generate"], ["generate"], ["generate"]],
    }
    assert client.call_utility("collective_rpc", "name", None, (), None) == ["worker 0", "worker 1", "worker 2"]
    assert [(sent.rank, sent.payload[2:]) for sent in wire.sent] == [
        (rank, ["collective_rpc", ["name", None, [], None]]) for rank in range(RANKS)
    ]
    assert client.reset_prefix_cache() is False
    wire.answers["reset_prefix_cache"][2] = True
    assert client.reset_prefix_cache() is True
    assert client.get_supported_tasks() == ["generate"]


@pytest.mark.parametrize("timeout_s", [None, 20.0])
def test_a_late_answer_is_waited_for(timeout_s: float | None, client: DwdpSyncClient, wire: Wire) -> None:
    wire.silent = True

    def answer() -> None:
        for rank, future in enumerate(list(wire.futures.values())):
            future.set_result(rank)

    late = threading.Timer(0.2, answer)
    late.start()
    assert client.call_utility_all("profile", True, timeout_s=timeout_s) == list(range(RANKS))
    late.join()


def test_counters_carry_the_requests_of_their_rank(client: DwdpSyncClient, wire: Wire) -> None:
    add(client, wire, "a", rank=1), add(client, wire, "b", rank=1), add(client, wire, "c", rank=2)
    wire.answers = {"collective_rpc": [[{"rank": rank}] for rank in range(RANKS)]}
    assert client.dwdp_counters() == [{"rank": rank, "requests": requests} for rank, requests in enumerate([0, 2, 1])]


def test_llm_waits_for_requests_and_not_for_waves(client: DwdpSyncClient) -> None:
    # With is_dp, vLLM's LLM.generate waits until engines that run in step say that a wave is complete.
    assert client.is_dp is False
    llm: Any = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=client))
    assert client_of(llm) is client
    with pytest.raises(DwdpError, match="does not run on dwdp"):
        client_of(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=object())))  # type: ignore[arg-type]
