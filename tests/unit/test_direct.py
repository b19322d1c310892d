"""Forwards that read missing experts from their owners, in any turns with those that pull, on simulated CUDA: no stale byte,
whatever is captured, replayed, aborted, skipped or repeated. By tables (split view) or ranges of addresses (composite)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from tests.unit.direct_turns import FEW, close, group, play, ring_of
from tests.unit.fake_cuda import Machine
from tests.unit.gpu_layers import LAYERS
from tests.unit.gpu_sharing import MANY, GpuRank, end_process, share_on_gpus
from vllm_dwdp.layers import gates
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.views.split import SplitTables
from vllm_dwdp.transport.base import InCapture

both_views = pytest.mark.parametrize("view", ["split", "composite"])


@pytest.fixture(autouse=True)
def no_build_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ModelBuild, "_current", None)
    yield
    gates._gates.clear()
    gc.collect()  # ranges, which are mappings and descriptors here


# A seed is not simpler than another: nothing to shrink.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


@both_views
@settings(max_examples=8, deadline=None, phases=PHASES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(2, 3), st.floats(0.2, 0.9), st.booleans())
def test_no_read_is_stale_in_any_turns(
    monkeypatch: pytest.MonkeyPatch, view: str, seed: int, num_ranks: int, direct: float, overlap: bool
) -> None:
    with monkeypatch.context() as patched:
        held = 4 if overlap else None
        machine, ranks = group(patched, num_ranks, seed, view, experts_per_rank=held)
        play(machine, ranks, 40, direct)
        for rank in ranks:
            assert rank.wrong == 0 and rank.compared > rank.compared_direct > 0
        close(ranks)


@pytest.mark.parametrize(
    ("num_ranks", "view", "rounds"), [(2, "split", 10_000), (3, "split", 10_000), (3, "composite", 1000)]
)
def test_no_read_is_stale_in_many_rounds(
    num_ranks: int, view: str, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, ranks = group(monkeypatch, num_ranks, rounds + num_ranks, view)
    play(machine, ranks, rounds, direct=0.6)
    assert sum(rank.wrong for rank in ranks) == 0
    assert sum(rank.compared for rank in ranks) > 4 * rounds
    close(ranks)


def stale_table(rank: GpuRank) -> None:
    """Direct forwards read slots, as a graph of copies would be replayed."""
    for module in rank.modules:
        tables = module.quant_method.moe_kernel.fused_experts.tables
        module.dwdp_tables = SplitTables(tables.pulled, tables.pulled)
        module.dwdp_attach_tables()


def stale_range(rank: GpuRank) -> None:
    """As `stale_table`, in the composite view."""
    for module in rank.modules:
        assert module.dwdp_ranges is not None
        tensors = module.dwdp_ranges.tensors
        module.dwdp_ranges.tensors = tuple(tensor._replace(direct=tensor.pulled) for tensor in tensors)


def no_wait(rank: GpuRank) -> None:
    """Pulled forwards do not wait for their copies; that they are refused in a capture stays."""
    engine: Any = rank.sharing.engine

    def wait(event: Any, timeout_s: float) -> None:
        if engine.capturing():
            raise InCapture("made to be")

    engine.wait = wait


@pytest.mark.parametrize(
    ("view", "fault"),
    [
        ("split", stale_table),
        ("split", no_wait),
        ("composite", stale_range),
        ("composite", no_wait),
    ],
)
def test_the_harness_catches(view: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, ranks = group(monkeypatch, seed=3, view=view)
    play(machine, ranks, 20, direct=0.5)  # every layer is past its first use
    assert sum(rank.wrong for rank in ranks) == 0
    for rank in ranks:
        fault(rank)
    play(machine, ranks, 40, direct=0.5)
    assert sum(rank.wrong for rank in ranks) > 0
    close(ranks)


@both_views
@pytest.mark.parametrize("tokens", [1, FEW, FEW + 1, MANY])
def test_the_way_goes_by_the_tokens_of_each_forward(tokens: int, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, ranks = group(monkeypatch, view=view)
    rank = ranks[0]
    for other in (FEW, MANY, tokens):
        compared, direct, layers = rank.compared, rank.compared_direct, rank.sharing.counters.fields.layers
        rank.forward(other)
        machine.drain()
        assert rank.compared - compared == 3 * LAYERS
        assert rank.compared_direct - direct == (3 * LAYERS if other <= FEW else 0)
        assert rank.sharing.counters.fields.layers - layers == (0 if other <= FEW else LAYERS)
    assert rank.wrong == 0
    close(ranks)


@both_views
def test_a_direct_forward_unseals_a_layer_that_the_warm_up_left_out(view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, ranks = group(monkeypatch, view=view)
    rank = ranks[0]
    rank.forward(MANY, (0, 2))
    machine.drain()
    assert rank.sharing.unused() == ["layer1"]
    rank.sharing.seal_unused()
    kernel = rank.modules[1].quant_method.moe_kernel.fused_experts
    assert kernel.tables is None and rank.modules[1].w13_weight.isnan().all()
    before = ring_of(rank)
    for tokens in (FEW, FEW, MANY, FEW):
        direct = rank.compared_direct
        rank.forward(tokens, (1,))
        machine.drain()
        assert rank.compared_direct - direct == (3 if tokens == FEW else 0)
        assert rank.wrong == 0 and rank.sharing.unused() == []
        if tokens == FEW and rank.sharing.counters.fields.layers == 2:
            assert ring_of(rank) == before
    assert kernel.tables == rank.modules[1].dwdp_tables
    close(ranks)


@pytest.fixture(params=["split", "composite"])
def replaying(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Machine, list[GpuRank], list[int]]]:
    """Three ranks of which the last has a graph of a direct forward and is in the middle of a replay of it."""
    machine, ranks = group(monkeypatch, 3, view=request.param)
    for rank in ranks:
        rank.forward(MANY)
    machine.drain()
    graph = ranks[2].capture(FEW)
    ranks[2].device.launch(graph, 0)
    machine.wander(4)
    yield machine, ranks, [graph]


@pytest.mark.parametrize("ends", ["killed", "in order"])
def test_an_owner_that_ended_is_read_on(ends: str, replaying: tuple[Machine, list[GpuRank], list[int]]) -> None:
    """Its memory stays mapped: no illegal access (the simulated device would raise) and no other bytes, both ways."""
    machine, ranks, (graph,) = replaying
    reader = ranks[2]
    for owner in ranks[:2]:
        if ends == "killed":
            end_process(owner.device)
        else:
            owner.sharing.close()
        for _ in range(3):
            reader.device.launch(graph, 0)
            reader.forward(FEW)
            reader.forward(MANY)
            machine.wander(30)
    machine.drain()
    assert reader.wrong == 0 and reader.compared_direct > 0
    # Memory of a composite view goes with its last mapping.
    by_ipc = ends == "in order" and reader.sharing.view == "split"
    assert machine.freed_while_mapped == (2 * LAYERS * 2 - LAYERS if by_ipc else 0)
    reader.device.destroy_graph(graph)
    reader.sharing.close()
    for owner in ranks[:2]:
        owner.sharing.transport.close()  # of one that was killed: threads and descriptors that are this process's


def test_close_waits_for_kernels_that_read_peers(replaying: tuple[Machine, list[GpuRank], list[int]]) -> None:
    machine, ranks, (graph,) = replaying
    reader = ranks[2]
    reader.forward(FEW)
    assert reader.device.streams[0].work, "nothing is under way"
    reader.sharing.close()
    assert not reader.device.streams[0].work
    machine.drain()
    assert reader.wrong == 0 and reader.compared_direct > 0
    reader.device.destroy_graph(graph)
    close(ranks)


# In the composite view kernels read tensors, and would end this process.
@pytest.mark.parametrize("replaying", ["split"], indirect=True)
def test_the_simulated_device_faults_where_an_owner_is_unmapped(
    replaying: tuple[Machine, list[GpuRank], list[int]],
) -> None:
    machine, ranks, (graph,) = replaying
    device = ranks[2].device
    mapped = dict(device.mapped)
    device.mapped.clear()
    with pytest.raises(AssertionError, match="illegal address"):
        machine.drain()
    device.mapped.update(mapped)
    machine.drain()
    device.destroy_graph(graph)
    close(ranks)


@pytest.mark.parametrize(
    ("told", "captured", "most"), [(0, 0, 0), (0, 512, 0), (24, 0, 24), (24, 512, 512), (600, 512, 600)]
)
def test_sizes_that_the_user_named_raise_the_limit(
    told: int, captured: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ranks = share_on_gpus(monkeypatch, "split", direct_tokens=told, captured_tokens=captured)
    assert [rank.sharing.direct_tokens for rank in ranks] == [most, most]
    line = ranks[0].sharing.describe("a test")
    how = "as told" if told == most else "as the sizes of CUDA graphs ask"
    assert (f"at most {most} tokens ({how})" if most else "without CUDA graphs") in line
    close(ranks)


def test_measured_limits_are_those_of_the_slowest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter((40, 24, 32))
    monkeypatch.setattr("vllm_dwdp.layers.sharing.memory_rate", lambda device: 1e12)
    monkeypatch.setattr("vllm_dwdp.layers.sharing.product_rate", lambda *device: 1e12)
    monkeypatch.setattr("vllm_dwdp.layers.sharing.measured_tokens", lambda *measured: next(found))
    _, ranks = share_on_gpus(monkeypatch, "split", 3)
    assert [rank.sharing.direct_tokens for rank in ranks] == [24] * 3
    assert "at most 24 tokens (as measured)" in ranks[0].sharing.describe("a test")
    close(ranks)
