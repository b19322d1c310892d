"""vLLM's own code captures and replays graphs over the simulated device; what is counted is what ran."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.forward_context
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.model_executor.offloader import base

from tests.unit.cuda_rank import Rank, start_ranks
from tests.unit.fake_cuda import Machine
from tests.unit.vllm_graphs import manager, use_simulated_graphs, wrapper
from vllm_dwdp.engine.graphs import follow_graphs
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.patches import cuda_graph
from vllm_dwdp.prefetch.replays import ReplayCounts
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.cuda_copy import CopyOptions

LAYERS = 4


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    """One of two ranks, with vLLM telling its prefetcher of graphs."""
    machine = Machine(11)
    ranks = start_ranks(machine, 2, 5, Ring(LAYERS, 2), CopyOptions())
    use_simulated_graphs(ranks[0].device, monkeypatch)
    monkeypatch.setattr(base, "_instance", base.NoopOffloader())
    ranks[0].prefetcher.start()
    follow_graphs(ranks[0].prefetcher, cut=False)
    yield ranks[0]
    machine.drain()
    assert ranks[0].wrong == 0
    for one in ranks:
        one.close()
    for one in ranks:
        one.transport.close()


def forward(rank: Rank, order: Sequence[int]) -> Callable[..., None]:
    """A model whose MoE layers are these."""

    def run(*_: Any) -> None:
        for layer in order:
            rank.prefetcher.acquire(layer)
            rank.use(layer)
            rank.prefetcher.release(layer)

    return run


def found(rank: Rank) -> ReplayCounts:
    return ReplayCounts.of(rank.page.fields)


def test_a_dense_drafter_counts_as_no_forward(rank: Rank) -> None:
    """Model runner V2: three steps of the target, and three drafts in each."""
    target, drafter = manager([8, 4]), manager([8, 4])
    target.capture(lambda desc, warmup: forward(rank, range(LAYERS)))
    drafter.capture(lambda desc, warmup: forward(rank, ()))
    eager = found(rank)  # of the two warm-ups
    assert (eager.forwards, eager.layers) == (2, 2 * LAYERS)
    for step in range(3):
        target.run_fullgraph(list(target.graphs)[step % 2])
        for _ in range(3):
            drafter.run_fullgraph(list(drafter.graphs)[step % 2])
    added = found(rank).since(eager)
    assert (added.forwards, added.layers, added.unmeasured) == (3, 3 * LAYERS, 3 * LAYERS)
    assert added.pulls == 3 * LAYERS and added.pulled_bytes == added.pulls * rank.plan.pulled_bytes
    assert added.on_demand == 0


def test_graphs_of_different_layers_count_their_own(rank: Rank) -> None:
    target = manager([8, 4, 2])
    orders = {8: range(LAYERS), 4: (0, 3), 2: (1, 2, 1)}
    target.capture(lambda desc, warmup: forward(rank, orders[desc.num_tokens]))
    for desc in [one for one in target.graphs for _ in range(one.num_tokens)]:
        before = found(rank)
        target.run_fullgraph(desc)
        assert found(rank).since(before).layers == len(orders[desc.num_tokens])


def test_model_runner_v1_counts_by_graph_too(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Target and drafter have graphs for the same batches."""
    target, drafter = wrapper(forward(rank, range(LAYERS))), wrapper(forward(rank, ()))

    def step(model: Any, tokens: int) -> ReplayCounts:
        context = SimpleNamespace(
            cudagraph_runtime_mode=CUDAGraphMode.FULL, batch_descriptor=BatchDescriptor(num_tokens=tokens)
        )
        monkeypatch.setattr(vllm.forward_context, "_forward_context", context)
        before = found(rank)
        model()
        return found(rank).since(before)

    for model in (target, drafter):
        for tokens in (8, 4):
            assert step(model, tokens).layers == 0, "a capture runs nothing"
    assert sum(step(target, tokens).forwards for tokens in (8, 4, 8)) == 3
    assert all(step(drafter, tokens) == ReplayCounts() for tokens in (8, 4, 8) * 3)


def test_an_aborted_capture_gives_its_counts_to_no_graph(rank: Rank) -> None:
    def failing(*_: Any) -> None:
        forward(rank, (0, 1, 2))()
        raise ValueError("as a kernel that cannot be captured")

    before = found(rank)
    target = manager([4])
    with pytest.raises(DwdpError, match="Unjoined"):
        target.capture(lambda desc, warmup: (lambda mode: None) if warmup else failing)
    assert target.graphs == {} and found(rank).since(before).layers == 0
    again = manager([4, 2])
    again.capture(lambda desc, warmup: forward(rank, range(LAYERS)))
    for desc in list(again.graphs) * 2:
        again.run_fullgraph(desc)
    assert found(rank).since(before).forwards == 2 + 4


def test_graphs_that_torch_did_not_begin_are_refused(rank: Rank) -> None:
    rank.prefetcher.align()
    rank.device.begin_torch_capture()
    forward(rank, (0, 1))()
    with pytest.raises(DwdpError, match="cannot be counted") as caught:
        base.get_offloader().join_after_forward()
    assert "\n" not in str(caught.value)
    rank.device.end_torch_capture()


def test_a_graph_is_not_kept_once_its_capture_has_ended(rank: Rank) -> None:
    """vLLM captures some to see how much memory they take."""
    for failing in (False, True):
        graph: Any = torch.cuda.CUDAGraph()
        with contextlib.suppress(ValueError), torch.cuda.graph(graph):
            if failing:
                raise ValueError("as a kernel that cannot be captured")
        gone = weakref.ref(graph)
        del graph
        assert gone() is None


def test_a_capture_that_cannot_begin_leaves_the_one_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        def capture_begin(self, inside: bool = False) -> None:
            if inside:
                raise RuntimeError("as CUDA does in a capture of the same stream")

        def capture_end(self) -> None: ...

        def replay(self) -> None: ...

    counted: list[ReplayCounts] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Plain)
    give_counts = cuda_graph.install(counted.append)
    outer: Any = torch.cuda.CUDAGraph()
    inner: Any = torch.cuda.CUDAGraph()
    outer.capture_begin()
    with pytest.raises(RuntimeError):
        inner.capture_begin(inside=True)
    inner.capture_end()
    give_counts(ReplayCounts(layers=3))
    outer.capture_end()
    outer.replay()
    inner.replay()
    assert counted == [ReplayCounts(layers=3)]
    # Captured once more, by somebody who tells nobody of it.
    outer.capture_begin()
    outer.capture_end()
    outer.replay()
    assert len(counted) == 1


def test_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = type("CUDAGraph", (), {"capture_begin": None, "capture_end": None})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", plain)
    with pytest.raises(DwdpError, match=r"torch\.cuda\.CUDAGraph has no replay") as caught:
        cuda_graph.install(lambda counts: None)
    assert "\n" not in str(caught.value) and torch.cuda.CUDAGraph is plain


def test_what_torch_has_is_what_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of this torch, as far as it can be seen without a GPU."""
    kept = torch.cuda.CUDAGraph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", kept)
    cuda_graph.install(lambda counts: None)
    made: Any = torch.cuda.CUDAGraph
    assert made is not kept and issubclass(made, kept)
    for name in ("capture_begin", "capture_end", "replay"):
        assert callable(getattr(kept, name)) and getattr(made, name) is not getattr(kept, name)
