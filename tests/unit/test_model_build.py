"""Which experts of each layer a rank allocates and loads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import LayerBuild, ModelBuild
from vllm_dwdp.layers.slabs import LayerSlab, expert_tensors
from vllm_dwdp.layers.views import choose_view, inplace
from vllm_dwdp.placement import place
from vllm_dwdp.platform import CPU, CUDA

PAGE_OF_ROWS = {"hidden_dim": 64, "intermediate_size_per_partition": 32, "is_act_and_mul": True}  # 4096 and 8192 bytes


def build(rank: int, on_cpu: bool = False, **config: Any) -> ModelBuild:
    return ModelBuild(DwdpConfig(**config), rank, 2, CPU if on_cpu else CUDA)


def add(made: ModelBuild, experts: int, **sizes: Any) -> tuple[int, ...]:
    """The share of a new layer."""
    moe: Any = SimpleNamespace(num_experts=experts, **{**PAGE_OF_ROWS, **sizes})
    return made.add_layer(None, f"layers.{len(made.layers)}", torch.bfloat16, moe)  # type: ignore[arg-type]


def test_every_rank_has_its_own_share_of_every_layer() -> None:
    first, second = build(0), build(1)
    assert [add(first, 8), add(second, 8)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [add(first, 12), add(second, 12)] == [tuple(range(6)), tuple(range(6, 12))]
    # Names say which expert a tensor is of, not which layer's: what any layer needs is loaded.
    assert first.local_experts() == set(range(6)) and second.local_experts() == set(range(4, 12))


@pytest.mark.parametrize(("experts", "granularity", "on_pages"), [(10, 2, True), (10, 4, True), (22, 8, False)])
def test_a_boundary_that_would_move_far_is_left(experts: int, granularity: int, on_pages: bool) -> None:
    made = build(0, on_cpu=True)
    placement, found = made._place(experts, (4096 // granularity, 4096 // granularity), "layer")
    assert found is on_pages
    assert abs(len(placement.shares[0]) - experts // 2) <= 1


def test_pages_add_one_expert_to_what_is_asked_for_at_most() -> None:
    # A share of 9 becomes one of 10 in blocks of 2; in blocks of 4 it would become one of 12.
    for held, row, on_pages, found in ((9, 2048, True, 10), (9, 1024, False, 9)):
        placement, whole = build(0, on_cpu=True, experts_per_rank=held)._place(16, (row, row), "layer")
        assert (whole, {len(share) for share in placement.shares}) == (on_pages, {found})


def test_tensors_that_have_no_row_per_expert_of_the_share_are_refused() -> None:
    module = torch.nn.Module()
    module.register_parameter("w13_weight", torch.nn.Parameter(torch.zeros(4, 32, 32)))
    module.register_parameter("e_score_correction_bias", torch.nn.Parameter(torch.zeros(8)))
    module.register_parameter("bias", torch.nn.Parameter(torch.zeros(4)))
    fetched, replicated = expert_tensors(module, 4, "layer")
    assert [tensor.name for tensor in fetched] == ["w13_weight"]
    assert [tensor.name for tensor in replicated] == ["bias"]
    for rows in (3, 8):
        module.register_parameter("w2_weight", torch.nn.Parameter(torch.zeros(rows, 32, 32)))
        with pytest.raises(DwdpError, match=f"layer.w2_weight has {rows} rows for a share of 4 experts"):
            expert_tensors(module, 4, "layer")


def test_runs_have_to_begin_on_pages_at_their_owners_too() -> None:
    module = torch.nn.Module()
    module.register_parameter("w2_weight", torch.nn.Parameter(torch.zeros(6, 32, 16)))  # rows of 2048 bytes
    fetched, _ = expert_tensors(module, 6, "layer")

    def fits(experts: int, held: int | None, on_pages: bool = True) -> bool:
        layer = LayerBuild(None, "layer", place(experts, 2, held), on_pages)  # type: ignore[arg-type]
        return inplace.why_not(LayerSlab(layer, fetched, (), None, None), page=4096) is None  # type: ignore[arg-type]

    assert fits(8, None) and not fits(8, None, on_pages=False)
    # Rank 1 holds experts 5 to 9: off the pages in the view.
    assert not fits(10, None)
    # Experts 6 to 8 are on a page in the view, and at a page and a half at rank 1, which holds 3 more before them.
    assert place(9, 2, 6).runs(0)[1][:3] == (1, 6, 3) and not fits(9, 6)
    # What fits one rank does not fit the other: the group has one view.
    assert not fits(6, 4) and not fits(5, 3)


def test_one_layer_takes_the_others_along() -> None:
    def layer(number: int, row: int, *names: str) -> Any:
        module = torch.nn.Module()
        for name in names:
            module.register_parameter(name, torch.nn.Parameter(torch.zeros(4, 32, row)))
        fetched, _ = expert_tensors(module, 4, "layer")
        made = LayerBuild(None, f"layers.{number}", place(8, 2), True)  # type: ignore[arg-type]
        return LayerSlab(made, fetched, (), None, None)  # type: ignore[arg-type]

    fitting, odd = layer(0, 32, "w13_weight", "w2_weight"), layer(1, 33, "w13_weight", "w2_weight", "w2_more")
    cases = ((True, "inplace", "w2_more 4224 bytes"), (False, "split", "w13_weight, w2_weight, w2_more"))
    for on_cpu, best, why in cases:
        assert choose_view(build(0, on_cpu), [fitting, fitting]) == best
        assert choose_view(build(0, on_cpu), [fitting, odd]) == choose_view(build(0, on_cpu), [odd]) == "contiguous"
        assert choose_view(build(0, on_cpu, weight_view="contiguous"), [fitting]) == "contiguous"
        assert choose_view(build(0, on_cpu, weight_view=best), [fitting]) == best
        with pytest.raises(
            DwdpError, match=rf'weight_view "{best}": experts of layers.1 .*{why}.*: use weight_view auto'
        ):
            choose_view(build(0, on_cpu, weight_view=best), [fitting, odd])
    with pytest.raises(DwdpError, match=r"direct_tokens is 8, but experts of layers.1 .*w2_more"):
        choose_view(build(0, direct_tokens=8), [fitting, odd])
