"""The composite view on the simulated device, whose ranges are real mappings: bytes through both ranges of every tensor,
what is copied at start, and what is refused. Turns of pulls and direct reads: test_direct.py."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from tests.e2e.digests import Digests
from tests.unit import fake_vmm
from tests.unit.gpu_layers import EXPERTS, LAYERS, SHAPES, Kernel, weights
from tests.unit.gpu_sharing import MANY, GpuRank, as_bytes, share_on_gpus
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine.options import check_settings
from vllm_dwdp.engine.popularity import popularity_of
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hot_placement import place_hot
from vllm_dwdp.layers import gates
from vllm_dwdp.layers.build import LayerBuild, ModelBuild
from vllm_dwdp.layers.kept import kept_apart
from vllm_dwdp.layers.slabs import LayerTensors, expert_tensors
from vllm_dwdp.layers.views import choose_view, composite
from vllm_dwdp.placement import Placement, place
from vllm_dwdp.platform import CUDA
from vllm_dwdp.transport.vmm import VmmTransport

#: Rows of 32 and 16 KiB: on pages, off them and off the boundaries of shares, two and four to a page.
PAGES = [4096, 3 * 4096, 1 << 16]
FEW = 16


@pytest.fixture(autouse=True)
def no_build_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ModelBuild, "_current", None)
    yield
    gates._gates.clear()
    gc.collect()  # ranges, which are mappings and descriptors here


def seen(rank: GpuRank, layer: int, tokens: int) -> dict[str, bytes]:
    """Every tensor of a layer as kernels of a forward read it, once what was given to the device is done."""
    module = rank.modules[layer]
    assert module.dwdp_gate is not None
    module.dwdp_gate.acquire(layer, tokens)
    rank.device.machine.drain()
    found = {name: as_bytes(getattr(module, name).data) for name in SHAPES}
    module.dwdp_gate.release(layer, tokens)
    return found


# With 4 of 5 experts held, pages of 64 KiB leave rank 1 nothing to fetch.
@pytest.mark.parametrize(
    ("page", "num_ranks", "held"),
    [(page, *ranks) for page in PAGES for ranks in ((2, None), (3, None), (3, 2))]
    + [(page, 2, 4) for page in PAGES[:2]],
)
def test_every_expert_of_every_rank_through_both_ranges(
    page: int, num_ranks: int, held: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_vmm, "PAGE", page)
    machine, ranks = share_on_gpus(monkeypatch, "composite", num_ranks, direct_tokens=FEW, experts_per_rank=held)
    for rank in ranks:
        sharing = rank.sharing
        assert sharing.view == sharing.snapshot()["view"] == "composite" and isinstance(sharing.transport, VmmTransport)
        assert sharing.transport.page == page
        assert sharing.bytes_per_forward == 2 * sum(slot.nbytes for slot in sharing.slots[:1]), "a merge copy"
        sharing.start()
    for rank in ranks:
        for layer in range(LAYERS):
            right = {name: as_bytes(weights(layer, name)) for name in SHAPES}
            addresses = []
            for tokens in (MANY, FEW, 1, MANY):
                assert seen(rank, layer, tokens) == right
                addresses.append(rank.modules[layer].w13_weight.data_ptr())
            # Two ranges, made once.
            assert addresses[0] == addresses[3] != addresses[1] == addresses[2]
    for rank in ranks:
        rank.sharing.close()
    # Parameters keep what they are ranges of, gates keep layers.
    gates._gates.clear()
    ModelBuild._current = None
    del rank, sharing
    ranks.clear()
    gc.collect()
    assert not machine.allocations, "memory is left"


def test_pages_of_shares_are_whole_before_anybody_may_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others own on them comes from the owners' shares, and is there when `fill` returns."""
    monkeypatch.setattr(fake_vmm, "PAGE", 3 * 4096)
    original: Any = composite.fill
    checked = []

    def fill(layers: Any, rank: int) -> int:
        nbytes: int = original(layers, rank)
        device: Any = layers[0].slab._mapped()._device
        assert not device.streams[0].work, "copies were under way"
        for number, layer in enumerate(layers):
            for name, pages in layer.paged.pages.items():
                whole = as_bytes(weights(number, name))
                own = layer.slab.tensor()
                for page in pages.held[rank]:
                    at = layer.paged.slabs[rank].at(name, page * pages.page)
                    expected = whole[page * pages.page :][: pages.page]
                    assert own[at : at + len(expected)].numpy().tobytes() == expected
                    checked.append(page)
        return nbytes

    monkeypatch.setattr(composite, "fill", fill)
    _, ranks = share_on_gpus(monkeypatch, "composite", 3)
    pages = ranks[0].sharing.layers[0].paged
    assert pages is not None and sum(len(list(pages.foreign(rank))) for rank in range(3)) == 4
    for number, rank in enumerate(ranks):
        small = LAYERS * EXPERTS * 2 * SHAPES["w13_bias"][0]
        shared = LAYERS * sum(item.nbytes for item in pages.foreign(number))
        assert rank.sharing.replicated_bytes == rank.sharing.snapshot()["replicated_bytes"] == small + shared
        assert f" MB, and {(small + shared) / 1e6:.1f} MB replicated), worker in a test" in rank.sharing.describe(
            "a test"
        )
    assert len(checked) == LAYERS * sum(len(held) for tensor in pages.pages.values() for held in tensor.held)
    for rank in ranks:
        rank.sharing.close()


def test_slots_have_pieces_and_pulls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_vmm, "PAGE", 3 * 4096)
    _, ranks = share_on_gpus(monkeypatch, "composite", 3, slice_bytes=8192)
    for number, rank in enumerate(ranks):
        sharing = rank.sharing
        pages: Any = sharing.layers[0].paged
        for slot in sharing.slots:
            assert [piece.nbytes for piece in slot.pieces] == list(pages.slots[number].sizes)  # type: ignore[attr-defined]
        sources = [item.source for item in pages.pulls(number, 8192)]
        assert sources[0] == (number + 1) % 3 and sources[1] == (number + 2) % 3
        assert {program.copies for program in sharing.programs} == {len(sources)}
        sharing.close()


def layer(number: int, placement: Placement, row: int = 32, dtype: torch.dtype = torch.bfloat16) -> LayerTensors:
    """A layer of the share of rank 0."""
    module = torch.nn.Module()
    for name in ("w13_weight", "w2_weight"):
        data = torch.zeros(len(placement.shares[0]), 32, row, dtype=dtype)
        module.register_parameter(name, torch.nn.Parameter(data, requires_grad=False))
    fetched, small = expert_tensors(module, len(placement.shares[0]), "layer")
    return LayerTensors(LayerBuild(module, f"layers.{number}", placement, False), fetched, small)


def build(**settings: Any) -> ModelBuild:
    return ModelBuild(DwdpConfig.parse(settings), 0, 2, platform=CUDA)


def test_scattered_shares_are_refused() -> None:
    scattered = place_hot(8, 2, 6, [9, 1, 9, 1, 1, 9, 1, 9])
    with pytest.raises(
        DwdpError, match=r'^weight_view "composite": experts of layers.0 are held in \d runs by rank 0 .*: use'
    ):
        choose_view(build(weight_view="composite"), [layer(0, scattered)])
    for placement in (place(8, 2), place(9, 3), place(5, 2, 4), place(9, 4, 5)):
        assert choose_view(build(weight_view="composite"), [layer(0, placement)]) == "composite"


def test_popularity_is_refused_before_anything_starts() -> None:
    config = DwdpConfig(weight_view="composite", popularity="hits.json", experts_per_rank=6)
    with pytest.raises(DwdpError, match=r'popularity scatters experts, .* "composite" .*: use weight_view auto'):
        popularity_of(config, CUDA)


def test_layers_that_differ_are_refused() -> None:
    """A page is as large as a row: another row has other pages."""
    same, other = layer(1, place(8, 2)), layer(2, place(8, 2), row=64)
    first = layer(0, place(8, 2))
    layouts = composite.lay_out([first, same], 2048)
    assert layouts[0] is layouts[1]
    with pytest.raises(
        DwdpError, match=r"experts of layers.2 are cut into other pages than those of layers.0, .*: use"
    ):
        composite.lay_out([first, same, other], 2048)


def test_nothing_left_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_vmm, "PAGE", 1 << 20)
    with pytest.raises(
        DwdpError, match=r"rank 0 of the group would hold every page \(1048576 bytes\) of layer0, .*: use"
    ):
        share_on_gpus(monkeypatch, "composite")
    with pytest.raises(DwdpError, match="rank 1 of the group would hold every page"):
        composite.lay_out([layer(0, place(5, 2, 4))], 4096)


def test_auto_takes_it_without_a_split_weight_kernel() -> None:
    """But only where all ranks can map pages."""
    odd, scattered = (
        layer(0, place(8, 2), dtype=torch.int8),
        layer(1, place_hot(8, 2, 6, [9, 1, 9, 1, 1, 9, 1, 9]), dtype=torch.int8),
    )
    assert choose_view(build(), [odd]) == "contiguous"
    page = lambda: 1024  # noqa: E731
    assert choose_view(build(), [odd], page) == choose_view(build(direct_tokens=8), [odd], page) == "composite"
    assert choose_view(build(), [odd]) == choose_view(build(), [odd, scattered], page) == "contiguous"
    # Rows of 1024 bytes, all on one page.
    assert choose_view(build(), [odd], lambda: 1 << 14) == "contiguous"
    assert choose_view(build(), [layer(0, place(8, 2))], lambda: pytest.fail("asked for nothing")) == "split"


def test_auto_leaves_it_where_its_pages_take_more_memory() -> None:
    """A small tensor has a page of its own in every layer, while slots of all experts are two."""
    layers = []
    for number in range(5):
        made = layer(number, place(8, 2), dtype=torch.int8).build
        made.module.register_parameter("bias", torch.nn.Parameter(torch.zeros(4), requires_grad=False))
        layers.append(LayerTensors(made, *expert_tensors(made.module, 4, made.name)))
    for count, view in ((4, "composite"), (5, "contiguous")):
        assert choose_view(build(), layers[:count], lambda: 4096) == view


@pytest.mark.parametrize("transport", ["cupy_ipc", "cuda_pinned"])
def test_other_transports_map_no_pages(transport: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(name=name))
    for fine in ("auto", "vmm"):
        check_settings(DwdpConfig(weight_view="composite", transport=fine), CUDA)  # type: ignore[arg-type]
    with pytest.raises(
        DwdpError, match=f'"composite" with transport "{transport}", but only "vmm" maps .*: leave transport'
    ):
        check_settings(DwdpConfig(weight_view="composite", transport=transport), CUDA)


def test_tokens_do_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of direct reads is not raised for them either."""
    _, ranks = share_on_gpus(monkeypatch, "composite", decode="auto", direct_tokens=FEW, travel_tokens=64)
    assert [rank.sharing.direct_tokens for rank in ranks] == [FEW, FEW]
    assert all(rank.sharing.travel is None for rank in ranks)
    for rank in ranks:
        rank.sharing.close()
    with pytest.raises(DwdpError, match=r'decode is "travel", but the view is not split, .*: leave it out, or write'):
        share_on_gpus(monkeypatch, "composite", decode="travel", direct_tokens=FEW)


@pytest.mark.parametrize("view", ["composite", "contiguous"])
@pytest.mark.parametrize("kept", ["alias", "slice of it", "copy", "another type", "more elements", "fewer elements"])
def test_a_kernel_that_would_not_follow_is_refused(kept: str, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An alias of a slot's data is right; where there is none, the data moves."""
    follows = kept in ("alias", "slice of it")
    # What is as large as w2 in one of two ways may be as large as w13 in the other.
    name = "w2_weight" if follows or kept == "copy" else "w13_weight"

    class Keeping(Kernel):
        def __init__(self, layer: Any) -> None:
            super().__init__(layer)
            data = getattr(layer, name).data
            found = {"alias": data.view(-1), "slice of it": data[3:], "another type": data.float()}.get(kept)
            other = {"more elements": torch.uint8, "fewer elements": torch.int64}.get(kept, data.dtype)
            found = data.view(other).clone() if found is None else found
            self.config = SimpleNamespace(parameters=[layer.w2_weight, layer.w13_bias], scales={"w2": found})

    monkeypatch.setattr("tests.unit.gpu_layers.Kernel", Keeping)
    other = {"composite": "contiguous", "contiguous": "split"}[view]
    said = f'^weight_view "{view}": Method keeps layer0.{name} in a tensor of its own, .*, or use weight_view {other}$'
    with nullcontext() if follows and view == "contiguous" else pytest.raises(DwdpError, match=said):
        share_on_gpus(monkeypatch, view)


def test_what_vllms_quant_config_keeps() -> None:
    """Parameters as they are follow; vLLM's own object, with and without one that does not."""
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    w1, w2 = (torch.nn.Parameter(torch.rand(EXPERTS, rows, 4), requires_grad=False) for rows in (6, 7))
    for number, given in ((None, (w1, w2)), (0, (w1.data, w2)), (1, (w1, w2.data[1:]))):
        config = fp8_w8a8_moe_quant_config(w1_scale=given[0], w2_scale=given[1], block_shape=[128, 128])
        method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=SimpleNamespace(quant_config=config)))
        assert kept_apart(method, [w1, w2]) == number
    # A parameter that is replicated is no copy of another one that is as large.
    method = SimpleNamespace(moe_kernel=SimpleNamespace(bias=(bias := torch.nn.Parameter(torch.rand(w1.shape)))))
    assert (kept_apart(method, [w1]), kept_apart(method, [w1], replicated=[bias])) == (0, None)


def test_digests_compare_both_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (rank, other) = share_on_gpus(monkeypatch, "composite", direct_tokens=FEW)
    rank.sharing.start()
    module, probe = rank.modules[0], Digests()
    seen(rank, 0, MANY)
    module.dwdp_gate.acquire(0, MANY)  # type: ignore[union-attr]
    rank.device.machine.drain()
    for name in SHAPES:
        probe._check_direct_range(module, getattr(module, name))
    rank.sharing.slots[0].tensor()[0] ^= 1
    with pytest.raises(AssertionError, match="other bytes than the slot"):
        for name in SHAPES:
            probe._check_direct_range(module, getattr(module, name))
    rank.sharing.close()
    other.sharing.close()
