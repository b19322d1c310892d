"""Ranks on GPUs, servers of their own, that find each other and could not have each other's memory (group/reach.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.helpers import LIMIT_S, LaunchOwner
from tests.unit.leftovers import check_message, refusal
from tests.unit.member import Members
from tests.unit.test_other_machines import unshare
from vllm_dwdp.engine import peers
from vllm_dwdp.group import reach
from vllm_dwdp.group.apart import SLABS, ApartRendezvous
from vllm_dwdp.group.launch import Apart
from vllm_dwdp.group.launch_folder import make_folder
from vllm_dwdp.group.reach import check_reach, this_network
from vllm_dwdp.transport.cuda_device import DeviceInfo

pytestmark = pytest.mark.usefixtures("public")

SEEN = [DeviceInfo(0, "GPU-a", "H100"), DeviceInfo(1, "GPU-b", "H100")]


@pytest.fixture
def rank0(group_path: str) -> Iterator[ApartRendezvous]:
    owner = LaunchOwner()
    rendezvous = ApartRendezvous(make_folder(owner), Apart("group", 0, group_path), [0, 1], LIMIT_S)
    yield rendezvous
    rendezvous.leave()


def said_by(members: Members, rank: int, *told: str) -> Any:
    member = members.start(rank)
    assert member.ask("join") == 1
    member.ask("put", "reach", told)
    return member


def test_ranks_that_reach_each_other(rank0: ApartRendezvous, two_members: Members) -> None:
    said_by(two_members, 1, this_network(), "GPU-b")
    check_reach(rank0, "GPU-a", SEEN)
    assert rank0.meeting.said(0, "reach") == [this_network(), "GPU-a"]


def test_another_network_namespace_is_refused_at_once(rank0: ApartRendezvous, two_members: Members) -> None:
    said_by(two_members, 1, "net:[1]", "GPU-b")
    words = [f"rank 1 of the group in {rank0.meeting.path} runs in network namespace net:[1], this server in"]
    check_message(refusal(lambda: check_reach(rank0, "GPU-a", SEEN)), [*words, this_network(), "--network=host"])


def test_a_gpu_that_is_not_seen_is_refused_at_once(rank0: ApartRendezvous, two_members: Members) -> None:
    said_by(two_members, 1, this_network(), "GPU-c")
    words = ["rank 1 of the group in", "GPU-c is not among the 2 visible here (GPU-a, GPU-b)", "CUDA_VISIBLE_DEVICES"]
    check_message(refusal(lambda: check_reach(rank0, "GPU-a", SEEN)), words)


def test_a_rank_that_is_dead_is_not_waited_for(rank0: ApartRendezvous, two_members: Members) -> None:
    """Where its memory can be had from one that lives: here from this very rank."""
    dead = said_by(two_members, 1, "net:[1]", "GPU-c")
    rank0.hold({1: []})
    rank0.hold({1: [{"a": "handle"}]})
    dead.kill()
    check_reach(rank0, "GPU-a", SEEN)
    assert rank0.get(1, SLABS) == [{"a": "handle"}]


def test_an_extra_rank_may_hand_memory_on_but_has_none(rank0: ApartRendezvous, two_members: Members) -> None:
    """So that its GPU does not matter; and one that has not said anything is not waited for."""
    said_by(two_members, 1, this_network(), "GPU-b")
    rank0.put(SLABS, [])
    extra = two_members.start(2)
    assert extra.ask("join") == 1
    check_reach(rank0, "GPU-a", SEEN)
    extra.ask("put", "reach", (this_network(), "GPU-c"))
    check_reach(rank0, "GPU-a", SEEN)
    extra.ask("put", "reach", ("net:[1]", "GPU-c"))
    check_message(refusal(lambda: check_reach(rank0, "GPU-a", SEEN)), ["rank 2 of the group in", "net:[1]"])


def test_the_gpu_of_a_worker_is_the_one_that_it_computes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(index: int) -> Any:
        return SimpleNamespace(index=index, devices=lambda: SEEN)

    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setattr("vllm_dwdp.transport.cuda_cupy.CupyDevice", device)
    assert peers._gpus() == ("GPU-b", SEEN)


def test_a_container_with_a_network_of_its_own_tells_another_one() -> None:
    code = "from vllm_dwdp.group.reach import this_network; print(this_network())"
    found = subprocess.run(
        [*unshare("--net"), sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert found.stdout.startswith("net:[") and found.stdout.strip() != this_network()


def test_a_system_that_does_not_tell_is_no_other_one(
    rank0: ApartRendezvous, two_members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    said_by(two_members, 1, "net:[1]", "GPU-b")
    monkeypatch.setattr(reach, "this_network", lambda: "")
    check_reach(rank0, "GPU-a", SEEN)
