"""What a rank decides and counts of tokens that travel: sizes, who can, growth of counts, refusals."""

from __future__ import annotations

import importlib.util
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.direct import LayerCosts
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.kernels.travel import ASKED, LATE, STATE_ROWS
from vllm_dwdp.layers import travel, travel_counts
from vllm_dwdp.layers.sharing import ExpertSharing
from vllm_dwdp.layers.travel import Travel, sizes, why_not
from vllm_dwdp.layers.travel_counts import TravelCounts
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.transport.cupy_ipc import CupyIpcTransport


@settings(deadline=None)
@given(st.integers(1, 1024))
def test_a_batch_computes_at_most_twice_its_tokens(most: int) -> None:
    buckets = sizes(most)
    assert buckets == tuple(sorted(set(buckets))) and (buckets[0], buckets[-1]) == (1, most)
    for tokens in range(1, most + 1):
        assert next(room for room in buckets if room >= tokens) < 2 * tokens
    assert len(buckets) <= 256, "a bell has eight bits for it"


def layer(scales: str | None = None, rows: int = 64, on_input: bool = False, **computed: Any) -> Any:
    values = computed.get("values", torch.ones(8, 2, 2))
    kind = SimpleNamespace(kind=scales, values=values) if scales else None
    bias = computed.get("bias")
    table = SimpleNamespace(num_experts=8, rows=rows, cols=32, dtype=torch.bfloat16, scales=kind, bias=bias)
    kernel = SimpleNamespace(activation_config=computed.get("config"))
    module = SimpleNamespace(
        dwdp_tables=SimpleNamespace(direct=(table, table)),
        apply_router_weight_on_input=on_input,
        activation=computed.get("activation", "silu"),
        moe_config=SimpleNamespace(in_dtype=computed.get("dtype", torch.bfloat16)),
        quant_method=SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=kernel)),
        top_k=computed.get("top_k", 2),
    )
    return SimpleNamespace(build=SimpleNamespace(module=module))


@pytest.mark.parametrize(
    ("settings", "layers", "why"),
    [
        ({}, [layer(), layer()], None),
        ({}, [layer("block")], None),
        ({}, [layer("block", values=torch.ones(8, 4, 2).mT)], None),
        ({}, [layer("block", values=torch.ones(8, 2, 4)[:, :, :2])], "do not lie side by side"),
        ({}, [layer(bias=torch.ones(8, 4, dtype=torch.bfloat16))], None),
        ({}, [layer(bias=torch.ones(1, 3, dtype=torch.bfloat16))], "do not lie side by side"),
        ({}, [layer("channel")], "FP8 with scales per channel"),
        ({}, [layer("block", dtype=torch.float16)], "FP8 in a model of torch.float16"),
        ({}, [layer(dtype=torch.float16)], None),
        ({}, [layer("tensor")], "FP8 with scales per tensor"),
        ({}, [layer(on_input=True)], "multiplied onto the layers' inputs"),
        ({}, [layer(), layer(rows=128)], "2 kinds of MoE layers"),
        ({}, [layer(), layer(top_k=3)], "2 kinds of MoE layers"),
        ({}, [layer(), layer(activation="gelu")], "2 kinds of MoE layers"),
        ({}, [layer(config=7.0), layer(config=8.0), layer()], "3 kinds of MoE layers"),
        ({"ranks_per_device": 2}, [layer()], "2 ranks share a GPU"),
        ({"group": "g", "rank": 0, "ranks": 2}, [layer()], "may die, and would not answer"),
        ({"transport": "cuda_pinned"}, [layer()], '"cuda_pinned" reaches no GPU'),
    ],
)
def test_why_tokens_do_not_travel(settings: dict[str, Any], layers: list[Any], why: str | None) -> None:
    build: Any = SimpleNamespace(config=DwdpConfig(**settings))
    found = why_not(build, layers)
    assert found is None if why is None else found is not None and why in found


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    build: Any = SimpleNamespace(config=DwdpConfig())
    assert "Numba is not installed" in (why_not(build, [layer()]) or "")


@pytest.mark.parametrize(
    ("decode", "direct", "why", "most"),
    [
        ("auto", 2000, None, DwdpConfig().travel_tokens),
        ("auto", 8, None, 8),
        ("travel", 2000, None, DwdpConfig().travel_tokens),
        ("direct", 500, None, 0),
        ("auto", 500, "of the moon", 0),
        ("auto", 0, None, 0),
        ("travel", 500, "of the moon", "but of the moon: leave it out"),
        ("travel", 0, None, "but experts are not read directly: leave it out"),
    ],
)
def test_which_forwards_travel(
    decode: Any, direct: int, why: str | None, most: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(travel, "why_not", lambda build, layers: why)
    sharing: Any = SimpleNamespace(
        build=SimpleNamespace(config=DwdpConfig(decode=decode)), layers=[], direct_tokens=direct
    )
    if isinstance(most, int):
        assert ExpertSharing._most_travelling(sharing) == most
        return
    with pytest.raises(DwdpError) as caught:
        ExpertSharing._most_travelling(sharing)
    assert most in str(caught.value) and "\n" not in str(caught.value)


def test_limits_are_those_of_direct_reads_and_some_more() -> None:
    costs = LayerCosts(128, 64, 8, 9.4e6, 64 * 9.4e6 / 350e9, 350e9, 3.3e12, 800e12, 8 * 2 * 4.7e6)
    made: Any = object.__new__(Travel)
    made._rank, made._ranks, made.buckets, made._layout = 0, 2, (1, 64), None
    made._device = SimpleNamespace(index=0)
    slab = SimpleNamespace(address=1 << 20, tensor=lambda: torch.zeros(4096, dtype=torch.uint8))
    places = SimpleNamespace(mail=lambda rank: 256 * rank, rows=lambda rank: 1024 + 256 * rank, flags=2048)
    made.exchange = SimpleNamespace(
        places=places, own=slab, memory=lambda rank: SimpleNamespace(address=(rank + 1) << 20),
        bell=lambda owner, requester: 100 * owner + requester,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "device", lambda *a: "cpu")
        found = made._make_requester(costs)
    assert found.limits.tolist() == [int(costs.direct_s(tokens) * 1e9) + 100_000 for tokens in (1, 64)]
    # Of each owner: the mailbox there from rank 0, its bell for rank 0, its rows here.
    assert found.mails.tolist() == [1 << 20, 2 << 20] and found.bells.tolist() == [0, 100]
    assert found.answers.tolist() == [(1 << 20) + 1024, (1 << 20) + 1280]


def test_every_layer_gives_way_where_its_rank_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a start sets up, all but that is left out: it needs a GPU."""
    tables = [SimpleNamespace(rows=64, cols=32, dtype=torch.bfloat16)] * 2
    kernels = [SimpleNamespace(tables=tables, quant_kind="none") for _ in range(2)]
    layers: Any = [
        SimpleNamespace(
            build=SimpleNamespace(
                module=SimpleNamespace(
                    top_k=2,
                    activation="silu",
                    quant_method=SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=one)),
                )
            )
        )
        for one in kernels
    ]
    exchange = SimpleNamespace(handles=lambda: None, map=lambda peers: None)
    attendant = SimpleNamespace(served=0, failed=0, start=lambda prepare: None)
    monkeypatch.setattr(travel, "Exchange", lambda *given: exchange)
    state = torch.zeros(STATE_ROWS, 2, dtype=torch.int32)
    monkeypatch.setattr(Travel, "_make_requester", lambda self, costs: setattr(self, "state", state))
    monkeypatch.setattr(Travel, "_attach", lambda self, layers: None)
    monkeypatch.setattr(Travel, "_make_attendant", lambda self, layers: attendant)
    transport: Any = object.__new__(CupyIpcTransport)
    transport.device = SimpleNamespace(index=0)
    meeting: Any = SimpleNamespace(gather=lambda name, mine, group: [mine, mine])
    page = CounterPage.create(rank=0)
    build: Any = SimpleNamespace(rank=0, config=DwdpConfig(decode="travel"))
    made = Travel(build, layers, transport, meeting, [0, 1], None, 8, page)  # type: ignore[arg-type]
    assert made.span == (1, 8) and made.told == "up to 8 tokens"
    made._first = 2
    assert made.span == (2, 8) and made.told == "from 2 up to 8 tokens"
    for asked in (False, True, False):
        made.counts.asked_lately = asked
        assert [kernel.gives_way() for kernel in kernels] == [asked, asked]
    page.close()


@pytest.mark.parametrize(("decode", "held", "others", "least"), [
    ("auto", 64, 5, 1), ("auto", 112, 5, 2), ("auto", 112, 1, 1), ("travel", 112, 5, 1),
])  # fmt: skip
def test_one_token_is_read_where_nearly_all_experts_are_held(decode: Any, held: int, others: int, least: int) -> None:
    """If all ranks of a group find so. Qwen3-30B-A3B's layer at the rates of an H100."""
    row, missing = 9437184.0, 128 - held
    costs = LayerCosts(128, missing, 8, row, missing * row / 394e9, 394e9, 2.99e12, 600e12, 8 * row)
    made: Any = object.__new__(Travel)
    made._ranks, made._layout, made.buckets = 2, SimpleNamespace(hidden=2048), (1, 2, 1024)
    asked: list[int] = []
    meeting: Any = SimpleNamespace(gather=lambda name, mine, group: [asked.append(mine) or mine, others])
    build: Any = SimpleNamespace(config=DwdpConfig(decode=decode))
    assert made._least(build, costs, torch.bfloat16, meeting, [0, 1]) == least
    assert asked == [1 if decode == "travel" or held == 64 else 2]


def test_layers_are_told_from_how_many_tokens_on_they_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(travel, "compile_ahead", list)
    made: Any = object.__new__(Travel)
    made._rank, made._requester, made._first, made.buckets = 1, SimpleNamespace(buckets=(1, 2, 8)), 2, ()
    made._kernel, made._layout, made.state = None, SimpleNamespace(top_k=2), torch.zeros(1)
    told: list[Any] = []
    placement = SimpleNamespace(owners=[[0, 0, 1, 1], [0, 1, 0, 1]])
    module = SimpleNamespace(dwdp_travel=told.append)
    made._attach([SimpleNamespace(build=SimpleNamespace(module=module, placement=placement))] * 2)
    assert [(each.layer, each.least_tokens, each.most_tokens) for each in told] == [(0, 2, 8), (1, 2, 8)]
    assert told[0].owners.tolist() == [0, 1, 0, 1] and told[0].owners is told[1].owners


def test_a_rank_that_was_asked_lately_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    now, page = [50.0], CounterPage.create(rank=5)
    monkeypatch.setattr(travel_counts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    attendant: Any = SimpleNamespace(served=7, failed=0)
    counts = TravelCounts(torch.zeros(STATE_ROWS, 2, dtype=torch.int32), attendant, page)
    lately = []
    for seconds, served in ((0.0, 7), (0.1, 8), (0.9, 8), (1.1, 8), (1.1, 9)):
        now[0] += seconds
        attendant.served = served
        counts.count()
        lately.append(counts.asked_lately)
    assert lately == [False, True, True, False, True]
    page.close()


def test_counts_grow_as_those_of_the_device_and_wrap(caplog: pytest.LogCaptureFixture) -> None:
    state, page = torch.zeros(STATE_ROWS, 3, dtype=torch.int32), CounterPage.create(rank=5)
    attendant: Any = SimpleNamespace(served=0, failed=0)
    counts = TravelCounts(state, attendant, page)
    told = page.fields
    for asked, late, served in ((10, 2, 1), ((1 << 31) - 1, 5, 2), (-(1 << 31) + 4, 5, 3)):
        state[ASKED.value, 1], state[ASKED.value, 2], state[LATE.value, 2] = asked, 7, late
        attendant.served = served
        counts.publish(now=True)
        assert told.travel_requests == asked % (1 << 32) + 7 and (told.travel_late, told.travel_served) == (
            late,
            served,
        )
    state[ASKED.value, 2] = 8
    before = told.travel_requests
    counts.publish()
    assert told.travel_requests == before, "without a wait: what was there at the call before"
    counts.publish()
    assert told.travel_requests == before + 1
    counts.publish(now=True)
    state[ASKED.value, 2] = 9
    counts.count()
    counts.count()
    assert told.travel_requests == before + 1, "a look every quarter of a second, at what was there at the one before"
    counts._published -= 1
    counts.count()
    assert told.travel_requests == before + 2
    attendant.failed = 719
    with caplog.at_level(logging.WARNING, logger="vllm.dwdp"):
        counts.publish()
        counts.publish()
    assert [record.getMessage().split(" (")[0] for record in caplog.records if "rank 5" in record.getMessage()] == [
        "dwdp rank 5 answers no requests of other ranks any more"
    ]
    page.close()
