"""Two ranks share the experts of a model over shared memory: every byte of every expert, and what layers compute from them.

vLLM's own layers, built, loaded and processed by vLLM from a gpt-oss checkpoint (biases, which are replicated), 5 experts on
2 ranks. The ranks are threads of this process; each has its model, slabs, mappings and copy thread.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("vllm")

from tests.unit.helpers import LIMIT_S
from tests.unit.leftovers import check_message, refusal
from tests.unit.meeting import Meeting
from tests.unit.whole_model import Loaded, as_bytes, expert_layers, load
from vllm_dwdp.copy_plan import LayerLayout, build_plan
from vllm_dwdp.layers import coverage, slabs
from vllm_dwdp.layers.coverage import check_coverage
from vllm_dwdp.layers.routed_experts import DwdpExpertsMixin
from vllm_dwdp.layers.sharing import ExpertSharing
from vllm_dwdp.layers.views.split import addresses, slot_bytes
from vllm_dwdp.prefetch.ring import Ring

pytestmark = pytest.mark.usefixtures("groups")

RANKS, EXPERTS, LAYERS, TOKENS, HIDDEN = 2, 5, 3, 7, 128
#: The third: 4 experts on each rank, so that what a rank reads begins within its peer's share.
SETTINGS: dict[str, dict[str, Any]] = {
    "inplace": {"weight_view": "inplace"},
    "contiguous": {"weight_view": "contiguous"},
    "overlapping": {"weight_view": "inplace", "experts_per_rank": 4},
}


LAUNCH: Any = SimpleNamespace(group_of=lambda rank: list(range(RANKS)), cores=())


class Group(NamedTuple):
    """A plain model and the same one on two ranks that share it."""

    plain: Loaded
    ranks: list[Loaded]
    sharing: list[ExpertSharing]
    view: str

    def layers(self) -> Iterator[tuple[int, int, Any, Any]]:
        """(rank, place of the layer, plain vLLM's layer, that of the rank)."""
        for rank, loaded in enumerate(self.ranks):
            pairs = zip(expert_layers(self.plain.model).values(), expert_layers(loaded.model).values(), strict=True)
            yield from ((rank, i, plain, shared) for i, (plain, shared) in enumerate(pairs))


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(family="gpt_oss", num_experts=EXPERTS, num_layers=LAYERS, hidden=HIDDEN, intermediate=128)


@pytest.fixture(scope="module")
def plain(model: Path) -> Loaded:
    return load(model, 0, 1)


def load_ranks(model: Path, settings: dict[str, Any]) -> list[Loaded]:
    return [load(model, rank, RANKS, settings) for rank in range(RANKS)]


def turned(layout: LayerLayout) -> LayerLayout:
    """Replicated tensors before those that are fetched."""
    assert [spec.fetched for spec in layout.tensors] == [True, True, False, False]
    return replace(layout, tensors=layout.tensors[::-1])


@pytest.fixture(scope="module", params=[*SETTINGS, "inplace turned", "contiguous turned"])
def group(request: pytest.FixtureRequest, model: Path, plain: Loaded) -> Iterator[Group]:
    name, _, order = request.param.partition(" ")
    settings = SETTINGS[name]
    ranks = load_ranks(model, settings)
    meeting = Meeting()
    with ThreadPoolExecutor(RANKS) as pool, pytest.MonkeyPatch.context() as patch:
        if order:
            patch.setattr(slabs, "lay_out", lambda *layer, lay_out=slabs.lay_out: turned(lay_out(*layer)))
        sharing = list(pool.map(lambda r: ExpertSharing(ranks[r].build, meeting.of(r), LAUNCH), range(RANKS)))
    for one in sharing:
        one.start()
    yield Group(plain, ranks, sharing, settings["weight_view"])
    for one in sharing:
        one.close()


def test_the_group_is_what_is_to_be_tested(group: Group) -> None:
    for sharing in group.sharing:
        assert sharing.view == group.view and len(sharing.layers) == LAYERS
        assert {tensor.name for tensor in sharing.layers[0].replicated} == {"w13_bias", "w2_bias"}
        assert sharing.replicated_bytes == LAYERS * EXPERTS * (256 + HIDDEN) * 2
    placement = group.ranks[0].build.layers[0].placement
    overlapping = len(placement.shares[0]) == 4
    assert [len(share) for share in placement.shares] == ([4, 4] if overlapping else [2, 3])
    assert any(run.local for rank in range(RANKS) for run in placement.runs(rank) if run.owner != rank) == overlapping
    assert len(group.sharing[0].slots) == (2 if group.view == "contiguous" else 0)


def test_every_byte_of_every_expert(group: Group) -> None:
    compared = 0
    for _, i, plain, shared in group.layers():
        shared.dwdp_gate.acquire(i, TOKENS)
        for name, parameter in plain.named_parameters():
            found = shared.get_parameter(name)
            assert found.shape == parameter.shape and found.dtype == parameter.dtype, name
            for expert in range(EXPERTS):
                assert torch.equal(as_bytes(found)[expert], as_bytes(parameter)[expert]), (name, expert)
                compared += 1
        shared.dwdp_gate.release(i, TOKENS)
    assert compared == RANKS * LAYERS * 4 * EXPERTS
    # Equal rows would compare equal in any order.
    rows = [row.numpy().tobytes() for layer in expert_layers(group.plain.model).values() for p in layer.parameters()
            for row in as_bytes(p)]  # fmt: skip
    assert len(set(rows)) == len(rows) == LAYERS * 4 * EXPERTS


def test_vllm_sees_all_experts(group: Group) -> None:
    for _, _, plain, shared in group.layers():
        assert isinstance(shared, DwdpExpertsMixin) and not isinstance(plain, DwdpExpertsMixin)
        assert shared.local_num_experts == shared.moe_config.num_local_experts == EXPERTS  # type: ignore[attr-defined]
        assert shared.expert_map is None and plain.expert_map is None  # type: ignore[attr-defined]


class OverwritingGate:
    """The gate of a rank whose slots are overwritten the moment they are released, and hold nothing until acquired."""

    def __init__(self, sharing: ExpertSharing, events: list[str]) -> None:
        self.sharing, self.events = sharing, events
        self.gate: Any = sharing.layers[0].build.module.dwdp_gate
        self.released: int | None = None

    def acquire(self, layer: int, tokens: int) -> None:
        assert tokens == TOKENS
        self.events.append(f"acquire {layer}")
        if self.released is not None:
            self.gate.release(self.released, tokens)
            self.released = None
        self.gate.acquire(layer, tokens)

    def release(self, layer: int, tokens: int) -> None:
        assert tokens == TOKENS
        self.events.append(f"release {layer}")
        prefetcher = self.sharing.prefetcher
        # A layer with a slot of its own stays there.
        if prefetcher is not None and Ring(LAYERS, len(self.sharing.slots)).next_layer(layer) is not None:
            self.sharing.slots[prefetcher.slot_of(layer)].tensor().fill_(0xFF)
        self.released = layer


def noting(compute: Callable[..., Any], events: list[str]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        events.append("compute")
        return compute(*args, **kwargs)

    return noted


def test_layers_compute_from_their_own_weights(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forwards on each rank, through vLLM's own kernel."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(TOKENS)]).to(torch.int32)
    weights = torch.rand(TOKENS, 2)
    gates: dict[int, OverwritingGate] = {}
    for rank, sharing in enumerate(group.sharing):
        gates[rank] = OverwritingGate(sharing, [])
    results = []
    for _ in range(2):
        for rank, i, plain, shared in group.layers():
            monkeypatch.setattr(shared, "dwdp_gate", gates[rank])
            with monkeypatch.context() as noted:
                noted.setattr(shared.quant_method, "apply", noting(shared.quant_method.apply, gates[rank].events))
                found = shared.forward_modular(x, weights, ids)
            results.append(plain.forward_modular(x, weights, ids))
            assert torch.equal(found, results[-1]), (rank, i)
            assert gates[rank].events[-3:] == [f"acquire {i}", "compute", f"release {i}"]
    for gate in gates.values():
        gate.gate.release(gate.released, TOKENS)
    assert not torch.equal(results[0], results[1]) and results[0].abs().max() > 0.01


def test_counters_say_what_was_done(group: Group) -> None:
    for sharing, loaded in zip(group.sharing, group.ranks, strict=True):
        before = sharing.snapshot()
        for _ in range(2):
            sharing.forwards.add(TOKENS)
            for i, layer in enumerate(loaded.build.layers):
                layer.module.dwdp_gate.acquire(i, TOKENS)  # type: ignore[union-attr]
                layer.module.dwdp_gate.release(i, TOKENS)  # type: ignore[union-attr]
        after = sharing.snapshot()
        assert after["forwards"] == before["forwards"] + 2 and after["layers"] == before["layers"] + 2 * LAYERS
        # In place every forward reads its experts where they are; from slots none does.
        direct = 2 if group.view == "inplace" else 0
        assert after["direct_forwards"] - before["direct_forwards"] == direct
        assert (after["direct_bytes"] > before["direct_bytes"]) is bool(direct)
        held = sharing.experts_held
        row = sum(tensor.row_bytes for tensor in sharing.layers[0].fetched)
        assert sharing.slab_bytes == sum(layer.slab.nbytes for layer in sharing.layers) >= LAYERS * held * row
        # Of three layers on two slots one has a slot of its own.
        refilled = 2 if group.view == "contiguous" else 0
        assert sharing.bytes_per_forward == refilled * (EXPERTS - held) * row
        assert after["pulled_bytes"] - before["pulled_bytes"] == 2 * sharing.bytes_per_forward


def test_splits_plan_brings_what_a_rank_lacks(group: Group) -> None:
    """The split view's copies between these slabs; its kernels run on GPUs."""
    if group.view == "inplace":
        pytest.skip("peers' slabs are unmapped once their pages are in the range")
    for rank, sharing in enumerate(group.sharing):
        slot = sharing.transport.allocate_slot(slot_bytes(sharing.layers, rank))
        for layer, plain in zip(sharing.layers, expert_layers(group.plain.model).values(), strict=True):
            plan = build_plan(layer.layout, rank, 4096, split=True)
            for item in plan.pulls:
                source = layer.memory(item.source).address + item.src_offset
                ctypes.memmove(slot.address + item.dst_offset, source, item.nbytes)
            for tensor in layer.fetched:
                rows = as_bytes(plain.get_parameter(tensor.name))
                for expert, address in enumerate(addresses(layer, rank, tensor.name, slot, plan.slot)):
                    assert ctypes.string_at(address, tensor.row_bytes) == rows[expert].numpy().tobytes()


def test_nobody_goes_on_before_all_have_mapped(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner that left earlier would take its slabs along."""
    ranks, meeting, proceed = load_ranks(model, SETTINGS["inplace"]), Meeting(), threading.Event()
    made = [threading.Event() for _ in range(RANKS)]
    attach = ExpertSharing._attach_pages

    def late(sharing: ExpertSharing) -> None:
        if sharing.build.rank == 1:
            assert proceed.wait(LIMIT_S)
        attach(sharing)

    monkeypatch.setattr(ExpertSharing, "_attach_pages", late)

    def share(rank: int) -> ExpertSharing:
        sharing = ExpertSharing(ranks[rank].build, meeting.of(rank), LAUNCH)
        made[rank].set()
        return sharing

    with ThreadPoolExecutor(RANKS) as pool:
        found = [pool.submit(share, rank) for rank in range(RANKS)]
        # Rank 0 is where it has to wait, or past it.
        until = time.monotonic() + LIMIT_S
        while (0, "mapped") not in meeting.said and not made[0].is_set():
            assert time.monotonic() < until
            time.sleep(0.01)
        early = made[0].wait(0.5)
        proceed.set()
        for future in found:
            future.result(LIMIT_S).close()
    assert not early


def test_memory_is_asked_again_where_weights_are_off_the_pages_after_all(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor of one layer, which nobody could foresee, makes the view another one, with slots that were not planned."""
    ranks, meeting, asked = load_ranks(model, {}), Meeting(), []
    monkeypatch.setattr(coverage, "require_memory", lambda nbytes, purpose: asked.append((nbytes, purpose)))
    met = []
    for loaded in ranks:
        assert loaded.build.expects_pages
        loaded.build.meet = met.append
        module: Any = loaded.build.layers[1].module
        more = torch.zeros(len(module.dwdp_share), 3, 100)
        module.w2_bias = torch.nn.Parameter(more, requires_grad=False)
    with ThreadPoolExecutor(RANKS) as pool:
        found = list(pool.map(lambda r: ExpertSharing(ranks[r].build, meeting.of(r), LAUNCH), range(RANKS)))
    for sharing in found:
        assert sharing.view == "contiguous"
        slots = sum(slot.nbytes for slot in sharing.slots)
        assert slots and met == ["slots"] * RANKS
        assert asked[0][0] == RANKS * slots and "experts end on no pages" in asked[0][1]
        sharing.close()
    assert len(asked) == RANKS


def test_a_layer_that_is_not_covered(group: Group) -> None:
    """A plain layer in a model of which others are ours."""
    message = refusal(lambda: check_coverage(group.plain.model, group.ranks[0].build))
    check_message(message, ["GptOssForCausalLM", "model.layers.0.mlp.experts", "(GptOssRoutedExperts)", "not covered"])
