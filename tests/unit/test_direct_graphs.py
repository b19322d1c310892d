"""vLLM's own code captures and replays graphs of forwards that read directly; one that pulls leaves no graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.forward_context
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from tests.unit.fake_cuda import Machine
from tests.unit.gpu_layers import LAYERS
from tests.unit.gpu_sharing import MANY, GpuRank, share_on_gpus
from tests.unit.vllm_graphs import manager, use_simulated_graphs, wrapper
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import ModelBuild

FEW = 8


class Group:
    """One of two ranks, captured by vLLM."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine: Machine
        self.machine, self.ranks = share_on_gpus(monkeypatch, "split", direct_tokens=FEW)
        self.rank: GpuRank = self.ranks[0]
        use_simulated_graphs(self.rank.device, monkeypatch)
        self.rank.sharing.start()
        self.monkeypatch = monkeypatch

    def step(self, model: Any, mode: CUDAGraphMode, tokens: int) -> None:
        """Model runner V1: what vLLM's wrapper is told by its forward context."""
        context = SimpleNamespace(cudagraph_runtime_mode=mode, batch_descriptor=BatchDescriptor(num_tokens=tokens))
        self.monkeypatch.setattr(vllm.forward_context, "_forward_context", context)
        model()

    def turns(self, replay: Callable[[int], None]) -> None:
        """Replays of vLLM's graphs between forwards that pull: every byte is right, and each reads its own way."""
        rank = self.rank
        self.machine.drain()
        for tokens in (8, 4, 4, 8):
            compared, pulls = rank.compared_direct, rank.sharing.counters.fields.pulls
            replay(tokens)
            self.machine.wander(10)
            assert rank.sharing.counters.fields.pulls == pulls
            rank.forward(MANY, range(2))  # leaves other layers in the slots
            replay(tokens)
            self.machine.drain()
            assert rank.wrong == 0 and rank.compared_direct == compared + 2 * 3 * LAYERS


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    monkeypatch.setattr(ModelBuild, "_current", None)
    made = Group(monkeypatch)
    yield made
    made.machine.drain()
    assert made.rank.wrong == 0
    made.rank.forward(MANY)
    made.rank.forward(FEW)
    made.machine.drain()
    assert made.rank.compared and made.rank.wrong == 0
    for rank in made.ranks:
        rank.sharing.close()


def test_model_runner_v2_replays_direct_forwards(group: Group) -> None:
    target = manager([8, 4])
    target.capture(lambda desc, warmup: lambda mode: group.rank.forward(desc.num_tokens))
    found = {desc.num_tokens: desc for desc in target.graphs}
    assert sorted(found) == [4, 8]
    group.turns(lambda tokens: target.run_fullgraph(found[tokens]))


def test_model_runner_v1_replays_direct_forwards(group: Group) -> None:
    tokens_of: list[int] = []
    model = wrapper(lambda: group.rank.forward(tokens_of[-1]))
    for tokens in (8, 4):
        tokens_of.append(tokens)
        group.step(model, CUDAGraphMode.FULL, tokens)
    assert group.rank.compared == 0, "a capture runs nothing"
    group.turns(lambda tokens: group.step(model, CUDAGraphMode.FULL, tokens))


def test_a_forward_that_pulls_leaves_model_runner_v2_no_graph(group: Group) -> None:
    target = manager([MANY])

    def forward(desc: Any, warmup: bool) -> Any:
        return (lambda mode: None) if warmup else lambda mode: group.rank.forward(MANY)

    refused = r"layer 0 would be pulled inside of a CUDA graph.*-cc\.cudagraph_mode NONE"
    with pytest.raises(DwdpError, match=refused) as caught:
        target.capture(forward)
    assert "\n" not in str(caught.value)
    assert target.graphs == {}
    again = manager([4])
    again.capture(lambda desc, warmup: lambda mode: group.rank.forward(desc.num_tokens))
    again.run_fullgraph(next(iter(again.graphs)))


@pytest.mark.parametrize("first", [(), (0, 1)], ids=["at once", "behind direct layers"])
def test_a_forward_that_pulls_leaves_model_runner_v1_no_graph(first: tuple[int, ...], group: Group) -> None:
    def forward() -> None:
        group.rank.forward(FEW, first)
        group.rank.forward(MANY)

    model = wrapper(forward)
    for _ in range(2):
        with pytest.raises(DwdpError, match="would be pulled inside of a CUDA graph"):
            group.step(model, CUDAGraphMode.FULL, MANY)
        assert all(entry.cudagraph is None for entry in model.concrete_cudagraph_entries.values())
    assert group.rank.compared == 0
