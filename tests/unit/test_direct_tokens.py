"""Up to how many tokens a forward reads directly: what is expected, what follows from it, and what is counted."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dwdp.direct import GAP_S, KERNEL_PART, LayerCosts, _sizes, direct_tokens, expected_hits
from vllm_dwdp.layers.views.direct import ForwardCounts, measured_tokens
from vllm_dwdp.placement import place
from vllm_dwdp.prefetch.counters import CounterPage


@st.composite
def costs(draw: st.DrawFn, other: float = 1e-3) -> LayerCosts:
    """Any layer on any machine: links of 1 GB/s to 1 TB/s, pulls at the rate of the link or slower."""
    experts = draw(st.integers(2, 256))
    missing, top_k = draw(st.integers(1, experts - 1)), draw(st.integers(1, min(experts, 16)))
    link, nbytes = draw(st.floats(1e9, 1e12)), draw(st.floats(1e4, 1e8))
    return LayerCosts(
        experts=experts,
        missing=missing,
        top_k=top_k,
        expert_bytes=nbytes,
        pull_s=missing * nbytes / link * draw(st.floats(1.0, 3.0)),
        link=link,
        memory=draw(st.floats(1e10, 1e13)),
        flops=draw(st.floats(1e12, 1e15)),
        flop=draw(st.floats(1e5, 1e10)),
        other_s=draw(st.floats(0, other)),
    )


@settings(deadline=None)
@given(costs())
def test_every_size_up_to_the_limit_is_as_fast_directly(layer: LayerCosts) -> None:
    found = direct_tokens(layer)
    assert 0 <= found <= layer.most_tokens()
    sizes = _sizes(layer.most_tokens())
    assert all(layer.direct_s(size) <= layer.pulled_s(size) for size in sizes if size <= found)
    above = next((size for size in sizes if size > found), None)
    assert found == 0 or found in sizes
    assert above is None or layer.direct_s(above) > layer.pulled_s(above)


@settings(deadline=None)
@given(costs(), st.floats(1.0, 100.0))
def test_what_never_lowers_the_limit(layer: LayerCosts, times: float) -> None:
    """A faster link, as long as a pull takes as long; a slower pull, launch or compute; less beside the experts."""
    before = direct_tokens(layer)
    assert direct_tokens(replace(layer, link=layer.link * times)) >= before
    assert direct_tokens(replace(layer, pull_s=layer.pull_s * times)) >= before
    assert direct_tokens(replace(layer, flops=layer.flops / times)) >= before
    assert direct_tokens(replace(layer, memory=layer.memory / times)) >= before
    assert direct_tokens(replace(layer, other_s=layer.other_s / times)) >= before


@settings(deadline=None)
@given(costs(other=0.0), st.floats(1.1, 100.0))
def test_a_faster_link_for_pulls_and_reads_never_lowers_the_limit(layer: LayerCosts, times: float) -> None:
    """As rates are measured at start, where nothing is known of the rest of a layer. With some rest it may: pulls hide
    behind it, direct reads do not."""
    faster = replace(layer, link=layer.link * times, pull_s=layer.pull_s / times)
    assert direct_tokens(faster) >= direct_tokens(layer)


def test_figures_of_a_real_layer() -> None:
    """Qwen3-30B-A3B over NVLink: 64 of 128 experts of 9.4 MB missing, 8 of them hit by a token."""
    layer = LayerCosts(128, 64, 8, 9.4e6, 64 * 9.4e6 / 350e9, 350e9, 3.3e12, 800e12, 8 * 2 * 4.7e6)
    assert layer.direct_s(1) == pytest.approx(4 * 9.4e6 / (KERNEL_PART * 350e9), rel=1e-6)
    assert layer.pulled_s(1) == layer.pull_s + GAP_S == pytest.approx(1.77e-3, rel=1e-2)
    # As many of the missing experts as the kernel reads while all of them are pulled.
    assert 0.9 < expected_hits(128, 8, direct_tokens(layer)) / 128 <= KERNEL_PART * (1 + GAP_S / layer.pull_s)
    # An eighth missing: reading takes as long as the own experts.
    assert direct_tokens(replace(layer, missing=16, pull_s=16 * 9.4e6 / 350e9)) == 1024
    assert layer.most_tokens() == 1024
    # Where a pull is cheap, or hides behind much else, nothing is read directly.
    assert direct_tokens(replace(layer, other_s=2e-3, pull_s=1e-3)) == 0


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(5, 2, 2), (4, 1, 3), (4, 3, 2), (6, 6, 1)])
def test_expected_hits_are_those_of_all_choices(experts: int, top_k: int, tokens: int) -> None:
    choices = list(itertools.combinations(range(experts), top_k))
    batches = list(itertools.product(choices, repeat=tokens))
    some = set(range(experts // 2))
    for of, within in ((None, set(range(experts))), (len(some), some)):
        mean = sum(len(within & set(itertools.chain(*batch))) for batch in batches) / len(batches)
        assert expected_hits(experts, top_k, tokens, of=of) == pytest.approx(mean)


def test_expected_hits_are_those_of_an_even_router() -> None:
    rng, found = random.Random(0), []
    for _ in range(300):
        hit = {expert for _ in range(20) for expert in rng.sample(range(128), 8)}
        found.append(len([expert for expert in hit if expert < 64]))
    assert sum(found) / len(found) == pytest.approx(expected_hits(128, 8, 20, of=64), rel=0.02)
    assert expected_hits(128, 8, 0) == 0 and expected_hits(8, 8, 1) == 8


def layer(experts: int, top_k: int, row: int, held: int | None = None, ranks: int = 2) -> Any:
    tensors = [SimpleNamespace(row_bytes=nbytes, dtype=torch.bfloat16) for nbytes in (2 * row, row)]
    sizes = SimpleNamespace(is_act_and_mul=True, hidden_dim=row // 2, intermediate_size_per_partition=1)
    module = SimpleNamespace(top_k=top_k, moe_config=sizes)
    return SimpleNamespace(build=SimpleNamespace(placement=place(experts, ranks, held), module=module), fetched=tensors)


def test_forwards_whose_tokens_travel_are_counted() -> None:
    """Those of fewer than the least that travel are read."""
    page = CounterPage.create()
    counts = ForwardCounts(page, [layer(8, 2, 100)], 0, 8, (2, 4))
    ways = []
    for tokens in (1, 2, 4, 5, 8, 9):
        before = page.fields.travel_forwards, page.fields.direct_forwards
        counts.add(tokens)
        ways.append((page.fields.travel_forwards - before[0], page.fields.direct_forwards - before[1]))
    assert ways == [(0, 1), (1, 0), (1, 0), (0, 1), (0, 1), (0, 0)]
    page.close()


@pytest.mark.parametrize("most", [0, 8, None])
def test_forwards_are_counted_by_the_way_they_go(most: int | None) -> None:
    """None: every forward reads in place. Bytes are those of missing experts, of every kind of layer."""
    page, layers = CounterPage.create(), [layer(8, 2, 100), layer(8, 2, 100), layer(5, 1, 300, held=4)]
    counts = ForwardCounts(page, layers, 0, most)
    expected = 0
    for number, tokens in enumerate((1, 8, 9, 500, 3), 1):
        direct = most is None or tokens <= most
        before = page.fields.direct_bytes
        counts.add(tokens)
        if direct:
            expected += 1
            nbytes = 2 * expected_hits(8, 2, tokens, of=4 * 300) + expected_hits(5, 1, tokens, of=900)
            assert page.fields.direct_bytes - before == int(nbytes) > 0
        else:
            assert page.fields.direct_bytes == before
        assert (page.fields.forwards, page.fields.direct_forwards) == (number, expected)
    page.close()


def test_the_limit_is_that_of_the_layer_for_which_it_is_least() -> None:
    """All layers of a forward go one way."""
    rates = {"link": 350e9, "memory": 3.3e12, "flops": 8e14}
    few, many = layer(128, 8, 1 << 20), layer(16, 4, 1 << 20)
    alone = [measured_tokens([one], 0, **rates) for one in (few, many)]
    assert alone[0] != alone[1] and min(alone) > 0
    assert measured_tokens([few, many, few], 0, **rates) == measured_tokens([many, few], 0, **rates) == min(alone)
    costs = LayerCosts(16, 8, 4, 3 << 20, 8 * (3 << 20) / 350e9, 350e9, 3.3e12, 8e14, 2 * 4 * (3 << 20) // 2)
    assert alone[1] == direct_tokens(costs)
    # Weights that are packed, eight to an element, are multiplied all the same.
    packed = layer(16, 4, 1 << 18)
    packed.build.module.moe_config.hidden_dim *= 4
    costs = LayerCosts(16, 8, 4, 3 << 18, 8 * (3 << 18) / 350e9, 350e9, 3.3e12, 8e14, 2 * 4 * (3 << 20) // 2)
    assert measured_tokens([packed], 0, **rates) == direct_tokens(costs)
