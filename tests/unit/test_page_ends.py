"""`experts_per_rank` auto counts what the composite view copies at the ends of shares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.unit.test_auto_share import FACTS, GIB, launch
from tests.unit.whole_model import vllm_config
from vllm_dwdp.copy_plan import TensorSpec
from vllm_dwdp.engine.auto_share import PAGE, memory_of, page_ends
from vllm_dwdp.hold import choose
from vllm_dwdp.page_plan import PagedLayout
from vllm_dwdp.placement import place
from vllm_dwdp.platform import CUDA
from vllm_dwdp.predict.read_config import load_model, parse_model


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "name", ["qwen3-30b-a3b", "DeepSeek-V3", "Mixtral-8x7B-v0.1", "gpt-oss-120b", "DeepSeek-V2-Lite"]
)
def test_pages_of_the_composite_view_take_no_more_than_was_counted(name: str, ranks: int) -> None:
    """Slabs and slots as they are laid out."""
    model = load_model(name, "bf16" if name == "gpt-oss-120b" else None)
    row = round(model.expert_params * model.expert_format.data) // 3
    scales = round(model.expert_bytes) - 3 * row
    small = (TensorSpec("scales", scales, fetched=False),) if scales else ()
    specs = (TensorSpec("w13", 2 * row), TensorSpec("w2", row), *small)
    counted = page_ends(model) / model.moe_layers
    found = []
    for share in range(-(-model.experts // ranks), model.experts - 1, 5):
        layout = PagedLayout(place(model.experts, ranks, share), specs, PAGE)
        found += [sum(slab.sizes) - share * model.expert_bytes for slab in layout.slabs]
        # A slot needs no page that is held.
        for slab, slot in zip(layout.slabs, layout.slots, strict=True):
            both = sum(slab.sizes) + sum(slot.sizes) - share * scales
            assert both <= model.experts * 3 * row + counted
    assert 0.3 * counted <= max(found) <= counted
    if name == "Mixtral-8x7B-v0.1":
        assert counted == 0, "rows of whole pages"


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
