"""`experts_per_rank` auto counts what the composite view copies at the ends of shares, also where it comes unasked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.unit.test_auto_share import FACTS, GIB, launch
from tests.unit.whole_model import vllm_config
from vllm_dwdp.copy_plan import TensorSpec
from vllm_dwdp.engine import auto_share
from vllm_dwdp.engine.auto_share import PAGE, memory_of, page_ahead, page_ends, paged_of
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hold import Held, Paged, choose
from vllm_dwdp.layers import transports
from vllm_dwdp.layers.slabs import REPLICATED_PART
from vllm_dwdp.layers.views import composite
from vllm_dwdp.page_plan import PagedLayout
from vllm_dwdp.placement import place
from vllm_dwdp.platform import CPU, CUDA
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.read_config import load_model, parse_model

#: (model, format of its experts, if not as published): 16 bits; small scales; scales that are fetched like weights.
MODELS = [
    ("qwen3-30b-a3b", None), ("Mixtral-8x7B-v0.1", None), ("gpt-oss-120b", "bf16"), ("DeepSeek-V2-Lite", None),
    ("DeepSeek-V3", None), ("qwen3-30b-a3b", "fp8"), ("qwen3-30b-a3b", "int8"), ("Mixtral-8x7B-v0.1", "fp8"),
    ("gpt-oss-120b", None), ("qwen3-30b-a3b", "int4"), ("DeepSeek-V3", "nvfp4"),
]  # fmt: skip


def specs_of(model: MoeModel) -> tuple[TensorSpec, ...]:
    """The tensors of a layer, [E, bytes] each; of formats with a scale for many weights, small ones."""
    row, scales = (round(model.expert_params * each) // 3 for each in model.expert_format[1:3])
    specs = [TensorSpec("w13", 2 * row), TensorSpec("w2", row)]
    if model.expert_format.name in ("fp8", "int8"):
        scales = 64
    for name, nbytes in (("w13_scale", 2 * scales), ("w2_scale", scales)) if scales else ():
        specs.append(TensorSpec(name, nbytes, fetched=nbytes > REPLICATED_PART * model.expert_bytes))
    return tuple(specs)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("name", "form"), MODELS)
def test_pages_of_the_composite_view_take_no_more_than_was_counted(name: str, form: str | None, ranks: int) -> None:
    """Slabs and slots as they are laid out."""
    model = load_model(name, form)
    specs = specs_of(model)
    counted = page_ends(model) / model.moe_layers
    fetched = sum(spec.row_bytes for spec in specs if spec.fetched)
    scales = sum(spec.row_bytes for spec in specs) - fetched
    found = []
    for share in range(-(-model.experts // ranks), model.experts - 1, 5):
        layout = PagedLayout(place(model.experts, ranks, share), specs, PAGE)
        found += [sum(slab.sizes) - share * (fetched + scales) for slab in layout.slabs]
        # A slot needs no page that is held.
        for slab, slot in zip(layout.slabs, layout.slots, strict=True):
            both = sum(slab.sizes) + sum(slot.sizes) - share * scales
            assert both <= model.experts * fetched + counted
    assert 0.3 * counted <= max(found) <= counted
    if (name, form) == ("Mixtral-8x7B-v0.1", None):
        assert counted == 0, "rows of whole pages"


@pytest.mark.parametrize("num_slots", [2, 4])
@pytest.mark.parametrize(("name", "form"), MODELS)
def test_pages_are_counted_for_shares_that_will_have_them(
    name: str, form: str | None, num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once there are layers, `choose_view` asks `composite.fits`: with each share that is counted so, it has to say yes."""
    model = load_model(name, form)
    specs, ranks = specs_of(model), 2
    monkeypatch.setattr(composite, "specs_of", lambda layer: specs)
    facts = replace(
        FACTS, experts=model.experts, ranks=ranks, slots_hold="all", paged=paged_of(model, PAGE),
        expert=model.expert_bytes * model.moe_layers, slot_expert=num_slots * model.expert_bytes,
    )  # fmt: skip
    whole = replace(facts, paged=None)
    taken = []
    for share in (*range(facts.least, model.experts - 2, 5), model.experts - 2, model.experts - 1):
        layer: Any = SimpleNamespace(build=SimpleNamespace(placement=place(model.experts, ranks, share), name="layer"))
        fits = composite.fits([layer] * model.moe_layers, PAGE, num_slots)
        if facts.in_pages(share):
            assert fits
            taken.append(share)
            # What is counted is what these layers take, or more: with the share, and beside it.
            layout = PagedLayout(layer.build.placement, specs, PAGE)
            for slab, slot in zip(layout.slabs, layout.slots, strict=True):
                paged = model.moe_layers * sum(slab.sizes) + num_slots * sum(slot.sizes)
                assert paged <= (share * facts.expert + facts.slots(share)) * 1.0001
            assert facts.slots(share) <= whole.slots(share)
        else:
            assert facts.slots(share) == whole.slots(share)
    if (name, form, num_slots) != ("qwen3-30b-a3b", "int4", 2):
        assert taken and taken[0] < 0.97 * model.experts, "of no use"


def test_auto_counts_page_ends_in_the_composite_view_alone(tiny_moe: Path) -> None:
    config = vllm_config(tiny_moe)
    split, composite = (memory_of(config, launch(weight_view=view), CUDA, GIB) for view in ("split", "composite"))
    model = parse_model(config.model_config.hf_config.to_dict(), "m")
    assert split.ends == 0 < composite.ends == page_ends(model) <= model.moe_layers * 6 * PAGE
    assert composite.kv(4) == split.kv(4) - composite.ends
    # What is left for the KV cache decides, and what is there while weights are loaded.
    tight = replace(FACTS, ends=60)
    assert choose(FACTS).share == 6 and choose(tight).share == 4
    assert FACTS.loads(15) and not replace(FACTS, ends=60, limit=FACTS.dense + 16 * 50).loads(15)


def test_a_share_in_pages_is_larger_where_memory_is_the_same() -> None:
    whole = replace(FACTS, slots_hold="all")
    # With ends of 60, a share of three is the smallest for which pages take no more than the other experts in slots.
    paged = replace(whole, paged=Paged(60, 7))
    assert [paged.in_pages(share) for share in (2, 3, 7, 8)] == [False, True, True, False]
    assert choose(replace(whole, limit=1080)).share == 5 < choose(replace(paged, limit=1080)).share == 6
    assert paged.slots(3) == whole.slots(3) == 160 and paged.slots(6) == 2 * 20 + 60 and paged.slots(8) == 160
    # Ends are there while a share is loaded, slots are not.
    assert whole.loads(15) and not replace(paged, paged=Paged(60, 15)).loads(15)
    assert [Held(facts, 4).expert_cost for facts in (paged, whole)] == [30, 50]


def test_ranks_try_pages_where_the_view_may_be_composite_unasked(
    tiny_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def page_of_group(build: Any, rendezvous: Any, group: list[int], name: str) -> int:
        asked.append((build.rank, build.group_size, build.platform, group, name))
        return PAGE

    monkeypatch.setattr(auto_share, "page_of_group", page_of_group)
    config, made = vllm_config(tiny_moe), launch(4, group_size=2)
    rendezvous: Any = SimpleNamespace(rank=3)
    ahead = lambda made, platform=CUDA: page_ahead(config, made, platform, rendezvous)  # noqa: E731
    assert ahead(made) is None and not asked, "there are split-weight kernels"
    monkeypatch.setattr(config.kernel_config, "moe_backend", "marlin")
    assert ahead(made) == PAGE and asked == [(1, 2, CUDA, [2, 3], "page_ahead")]
    asked.clear()
    for view in ("split", "composite", "contiguous"):
        assert ahead(launch(4, group_size=2, weight_view=view)) is None
    apart: Any = SimpleNamespace()
    for other in (replace(made, apart=apart), replace(made, popularity=apart)):
        assert ahead(other) is None
    assert ahead(made, CPU) is None and not asked
    facts = memory_of(config, made, CUDA, GIB, PAGE)
    model = parse_model(config.model_config.hf_config.to_dict(), "m", "bf16", "bf16")
    assert facts.slots_hold == "all" and facts.ends == 0 and facts.paged == paged_of(model, PAGE)
    assert facts.paged.ends == page_ends(model) and memory_of(config, made, CUDA, GIB).paged is None


def test_a_trial_of_pages_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport that tells the page is let go of before others are waited for; a refusal is no page."""
    did: list[str] = []
    transport = SimpleNamespace(page=PAGE, close=lambda: did.append("close"))

    def gather(name: str, page: int | None, group: list[int]) -> list[int | None]:
        did.append(name)
        return [page] * len(group)

    rendezvous: Any = SimpleNamespace(gather=gather)
    build: Any = SimpleNamespace(apart=None, platform=CUDA, config=SimpleNamespace(transport="auto"))
    monkeypatch.setattr(transports, "make_transport", lambda *_: transport)
    assert transports.page_of_group(build, rendezvous, [0, 1], "page_ahead") == PAGE and did == ["close", "page_ahead"]

    def refuse(*_: object) -> None:
        raise DwdpError("no pages here")

    monkeypatch.setattr(transports, "make_transport", refuse)
    assert transports.page_of_group(build, rendezvous, [0, 1]) is None and did[2:] == ["page"]


def test_no_share_is_in_pages_beside_which_none_is_missing() -> None:
    """With 3 MiB of an expert in the second product, one that is missing has a whole page of 2 MiB in the first."""
    model = load_model("qwen3-30b-a3b")
    assert paged_of(model, PAGE).most == model.experts - 1 and paged_of(model, 4 << 20).most == model.experts - 2
