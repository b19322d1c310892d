"""`ExpertSharing` of GPU ranks over the simulated device: slabs, handles, views, ring, kernels, rates, close."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.fake_cuda import Machine
from tests.unit.gpu_layers import EXPERTS, LAYERS, SHAPES, weights
from tests.unit.gpu_sharing import MANY, Group, Meeting, share_on_gpus
from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.layers import sharing
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.sharing import ExpertSharing
from vllm_dwdp.transport.cuda_copy import CudaCopyEngine
from vllm_dwdp.transport.cupy_ipc import CupyIpcTransport
from vllm_dwdp.transport.mirrored import MirroredTransport
from vllm_dwdp.transport.vmm import VmmTransport


@pytest.fixture(autouse=True)
def no_build_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelBuild, "_current", None)


@pytest.mark.parametrize(
    ("view", "transport", "kind"),
    [
        ("auto", "auto", CupyIpcTransport),
        ("contiguous", "cupy_ipc", CupyIpcTransport),
        ("auto", "vmm", VmmTransport),
        ("contiguous", "vmm", VmmTransport),
        ("composite", "auto", VmmTransport),
        ("split", "cuda_pinned", MirroredTransport),
    ],
)
def test_two_ranks_see_every_byte(view: str, transport: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, ranks = share_on_gpus(monkeypatch, view, num_slots=2, transport=transport)
    for rank in ranks:
        sharing = rank.sharing
        assert type(sharing.transport) is kind and isinstance(sharing.engine, CudaCopyEngine)
        assert sharing.view == ("split" if view == "auto" else view)
        # Kernels never read what is pinned in host memory.
        assert transport != "cuda_pinned" or sharing.direct_tokens == 0
        assert (
            len(sharing.slots) == 2 and len(sharing.refilled) == 2
        )  # the middle one of three layers has its slot alone
        copied = sum(program.pulled_bytes + program.merged_bytes for program in sharing.refilled)
        assert sharing.copies_s * sharing.link_rate == pytest.approx(copied)
        assert (copied > sharing.bytes_per_forward > 0) == (view == "contiguous")
        sharing.start()
    for _ in range(3):
        for rank in ranks:
            rank.sharing.forwards.add(MANY)
            rank.forward()
            machine.wander(10)
    machine.drain()
    for rank in ranks:
        counted = rank.sharing.snapshot()
        assert rank.compared == 3 * LAYERS * len(SHAPES) and rank.wrong == 0
        assert (counted["forwards"], counted["layers"], counted["on_demand_fetches"]) == (3, 3 * LAYERS, 0)
        assert (counted["direct_forwards"], counted["direct_bytes"]) == (0, 0)
        assert counted["view"] == rank.sharing.view
    for rank in ranks:
        rank.sharing.close()
        rank.sharing.close()
        assert len(rank.device.streams) == 1, "a stream is left"


@pytest.mark.parametrize(("span", "ways"), [((2, 4), [0, 1, 1, 0]), (None, [0, 0, 0, 0])])
def test_forwards_are_counted_as_they_travel(span: Any, ways: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def set_out(self: Any, most: int, *_: Any) -> None:
        self.travel = SimpleNamespace(span=span, told="from 2 up to 4 tokens", close=lambda timeout_s: None)

    monkeypatch.setattr(ExpertSharing, "_most_travelling", lambda self: 4 if span else 0)
    monkeypatch.setattr(ExpertSharing, "_set_out", set_out)
    _, ranks = share_on_gpus(monkeypatch, "split", direct_tokens=8)
    for rank in ranks:
        found = []
        for tokens in (1, 2, 4, 5):
            before = rank.sharing.counters.fields.travel_forwards
            rank.sharing.forwards.add(tokens)
            found.append(rank.sharing.counters.fields.travel_forwards - before)
        assert found == ways and rank.sharing.counters.fields.direct_forwards == 4 - sum(ways)
        said = rank.sharing.describe("a test")
        assert said.endswith(", or has their owners compute, from 2 up to 4 tokens") == (span is not None)
        rank.sharing.close()


@pytest.mark.parametrize("view", ["contiguous", "split", "composite"])
def test_kernels_are_made_again_for_all_experts(view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ranks = share_on_gpus(monkeypatch, view)
    for rank in ranks:
        for number, module in enumerate(rank.modules):
            kernel = module.quant_method.moe_kernel
            assert kernel.biases == EXPERTS and kernel.experts == (EXPERTS, "whole")
            assert kernel.fused_experts.tables == module.dwdp_tables
            assert (module.dwdp_tables is None) == (view != "split")
            assert torch.equal(module.w13_bias.data, weights(number, "w13_bias"))
        rank.sharing.close()


@pytest.mark.parametrize(("view", "kind"), [("contiguous", CupyIpcTransport), ("composite", VmmTransport)])
def test_nothing_is_published_before_it_is_in_the_slab(view: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies into slabs run on torch's stream; a peer may read as soon as it has a handle."""
    original: Any = kind.export_handle
    published = []

    def export_handle(self: Any, slab: Any) -> Any:
        published.append(len(self._device.streams[0].work))
        return original(self, slab)

    monkeypatch.setattr(kind, "export_handle", export_handle)
    _, ranks = share_on_gpus(monkeypatch, view)
    assert published == [0] * (2 * LAYERS), "copies were under way"
    for rank in ranks:
        rank.sharing.close()


def test_slots_are_not_freed_under_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a copy does not end, close says so and leaves all memory as it is: freeing would wait without a limit."""
    machine, ranks = share_on_gpus(monkeypatch, "contiguous")
    monkeypatch.setattr("vllm_dwdp.layers.sharing._CLOSE_TIMEOUT_S", 0.02)
    sharing, device = ranks[0].sharing, ranks[0].device
    machine.frozen = True
    sharing.engine.submit(sharing.refilled[0])  # as the measurement at start, before the ring has begun
    with pytest.raises(DwdpTimeout, match="not done after"):
        sharing.close()
    assert device.calls["free"] == 0 and device.calls["ipc_close"] == 0
    machine.frozen = False
    machine.drain()
    for rank in ranks:
        rank.sharing.close()
    assert device.calls["free"] > 0


def test_a_start_that_fails_lets_go_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def fails(engine: Any, *arguments: Any) -> float:
        devices.append(engine._device)
        raise DwdpError("made up")

    monkeypatch.setattr(sharing, "copy_rate", fails)
    with pytest.raises(DwdpError, match=r"^made up$"):
        share_on_gpus(monkeypatch, "split")
    assert devices and all(device.calls["free"] and device.calls["ipc_close"] for device in devices)


def test_a_copy_that_does_not_end_at_start_is_told_and_nothing_freed_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    group, measured, devices = Group(Machine(0), Meeting(2), []), sharing.copy_rate, []

    def never_ends(engine: Any, *arguments: Any) -> float:
        group.machine.frozen = True
        devices.append(engine._device)
        return measured(engine, *arguments)

    monkeypatch.setattr(sharing, "copy_rate", never_ends)
    monkeypatch.setattr(sharing, "_CLOSE_TIMEOUT_S", 0.02)
    with pytest.raises(DwdpTimeout, match=r"a copy is not done after 0\.05 s"):
        share_on_gpus(monkeypatch, "split", group=group, timeout_s=0.05)
    assert {(device.calls["free"], device.calls["ipc_close"]) for device in devices} == {(0, 0)}
