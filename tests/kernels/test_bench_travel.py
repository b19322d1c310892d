"""ci.bench.travel: its words, where experts lie, and that both ways and the local one compute the same from there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from ci.bench import travel
from ci.bench.travel_layers import Shape, shape_of
from ci.bench.travel_rank import TOKENS, Rank
from tests.kernels.travelling import Between
from vllm_dwdp.kernels import configs
from vllm_dwdp.kernels.bench.shapes import MODELS, TINY_MODELS, layer_ops
from vllm_dwdp.kernels.configs import layer_shape, tiles_for
from vllm_dwdp.kernels.direct_tiles import direct_tiles_for
from vllm_dwdp.kernels.mail import MailLayout
from vllm_dwdp.kernels.requester import Requester
from vllm_dwdp.kernels.served import Layers
from vllm_dwdp.kernels.split_moe import Workspace, split_experts
from vllm_dwdp.kernels.travel import ASKED, ENABLED, LATE

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--model", "nope"], "--model nope: write one of Qwen3-30B-A3B, .*gpt-oss-120b"),
        (["--held", "63"], "--held 63: each side of Qwen3-30B-A3B holds 64 to 127 of 128 experts"),
        (["--held", "128"], "--held 128: each side of Qwen3-30B-A3B holds 64 to 127 of 128 experts"),
        (["--model", "DeepSeek-V3", "--held", "127"], "--held 127: each side of DeepSeek-V3 holds 128 to 255 of 256"),
        (["--layers", "0"], "--layers 0: write 1 or more"),
        (["--tokens", "7"], "argument --tokens: invalid choice: 7"),
        (["--json", "/not/there/a.json"], "--json /not/there/a.json: there is no folder /not/there"),
    ],
)
def test_wrong_words(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        travel.arguments(words)
    assert re.search(f"error: {why}", capsys.readouterr().err.splitlines()[-1])


def test_a_gpu_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(travel, "visible_gpus", lambda: 1)
    monkeypatch.setattr("sys.argv", ["travel"])
    with pytest.raises(SystemExit, match="this takes 2 GPUs, and 1 can be seen"):
        travel.main()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], ("Qwen3-30B-A3B", 64, 128, 8)),
        (["--held", "112", "--tokens", "1", "64"], ("Qwen3-30B-A3B", 112, 128, 8)),
        (["--model", "gpt-oss-120b"], ("gpt-oss-120b", 64, 128, 8)),
        (["--model", "DeepSeek-V3", "--held", "192"], ("DeepSeek-V3", 192, 256, 4)),
        (["--model", "DeepSeek-V3", "--layers", "2"], ("DeepSeek-V3", 128, 256, 2)),
    ],
)
def test_what_is_measured(words: list[str], told: tuple[object, ...]) -> None:
    args, shape = travel.arguments(words)
    assert tuple(travel.about(args, shape).values()) == told
    assert args.layers * shape.nbytes < 55e9


@pytest.mark.parametrize("held", [None, 64, 96, 112, 127])
def test_who_owns_what(held: int | None) -> None:
    shape, slabs = shape_of("Qwen3-30B-A3B", held), [1 << 40, 1 << 41]
    count = 64 if held is None else held
    for rank in (0, 1):
        owners = shape.owners(rank)
        assert owners.count(rank) == count == len(shape.placement.shares[rank])
        # Who is asked has them: what it serves lies in its own slab.
        assert all(shape.owners(1 - rank)[e] == 1 - rank for e, owner in enumerate(owners) if owner != rank)
        for which in (0, 1):
            for expert, address in enumerate(shape.addresses(which, slabs, owners)):
                assert slabs[owners[expert]] <= address < slabs[owners[expert]] + shape.nbytes


@pytest.mark.parametrize("name", [model.name for model in MODELS])
def test_experts_fill_a_slab(name: str) -> None:
    """Side by side in order, nothing between but to align w2."""
    shape = shape_of(name, None)
    size = 1 if shape.model.quant == "block" else 2
    rows = [2 * shape.model.width * shape.model.hidden * size, shape.model.hidden * shape.model.width * size]
    first, second = (shape.addresses(which, [0, 0], [0] * shape.model.experts) for which in (0, 1))
    assert first == [expert * rows[0] for expert in range(shape.model.experts)]
    assert 0 <= second[0] - first[-1] - rows[0] < 256 and second[0] % 256 == 0
    assert 0 <= shape.nbytes - second[-1] - rows[1] < 256
    assert shape.layers * shape.nbytes < 55e9


def test_requests_of_fp8_have_scales() -> None:
    deepseek, gpt_oss = (shape_of(name, None).mail(64) for name in ("DeepSeek-V3", "gpt-oss-120b"))
    assert deepseek == MailLayout(64, 8, 7168, 56, torch.float8_e4m3fn, torch.bfloat16)
    assert gpt_oss == MailLayout(64, 4, 2880, 0, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("number", range(len(TINY_MODELS)), ids=[model.name for model in TINY_MODELS])
@pytest.mark.parametrize("more", [0, 1])
def test_three_ways_give_one_result(number: int, more: int) -> None:
    """A requester and its owner in one process, on slabs of either side: local, direct, travelled."""
    model, tokens = TINY_MODELS[number], 4
    shape = Shape(model, model.experts // 2 + more, torch.float16)
    slabs, beside = [], []
    for _ in (0, 1):
        slabs.append(torch.zeros(shape.nbytes + 256, dtype=torch.uint8))
        slabs[-1] = slabs[-1][-slabs[-1].data_ptr() % 256 :][: shape.nbytes]
        beside.append(shape.fill(slabs[-1], seed=3))
    assert torch.equal(*slabs) and slabs[0].any()
    assert all((each.bias is not None) == model.bias for side in beside for each in side)
    where = [slab.data_ptr() for slab in slabs]
    local = shape.tables(where, [0] * model.experts, beside[0], CPU)
    mine, theirs = (shape.tables(where, shape.owners(rank), beside[rank], CPU) for rank in (0, 1))
    for which, (rows, cols) in enumerate(shape.matrices):
        nbytes = rows * cols * shape.stored.itemsize
        for expert in shape.placement.missing(1):  # which the owner does not hold: nobody reads them there
            slabs[1][shape.begins[which] + expert * nbytes :][:nbytes] = 0x7F
    ops, layout, owners = layer_ops(model, CPU), shape.mail(tokens), torch.tensor(shape.owners(0), dtype=torch.int32)
    tiles = direct_tiles_for(layer_shape(*local, model.top_k), tokens, CPU, shape.block)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, model.hidden, dtype=shape.dtype)
    weights, ids = torch.rand(tokens, model.experts).topk(model.top_k)
    routes = ids.to(torch.int32)
    assert (owners[ids] == 1).any() and (owners[ids] == 0).any()

    mail, rows_of = torch.zeros(layout.mail_bytes, dtype=torch.uint8), torch.zeros(layout.rows_bytes, dtype=torch.uint8)
    bell, flags, state = (
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int32),
        Requester.new_state(2, CPU),
    )
    answers = rows_of.view(layout.row_type)[: tokens * model.top_k * model.hidden].view(-1, model.hidden)

    def at(tensor: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0, tensor.data_ptr()], dtype=torch.int64)

    limits = torch.full((1,), 1000, dtype=torch.int64)
    requester = Requester(0, 2, layout, (tokens,), state, flags, at(mail), at(bell), at(answers), limits)
    state[ENABLED.value, 0] = 1
    requester.wait(routes, torch.empty_like(routes), owners, 0)  # from the second layer on
    served = Layers.of([theirs])

    def serve() -> None:
        assert int(bell[0]) == 256
        served.serve(mail, layout, tokens, answers, flags[1:], ops, tiles)

    room = Workspace.allocate(2 * tokens * model.top_k, ops.width(local[0].rows), *local, hidden)
    given, scale = ops.quantize(hidden, None)
    found = requester.experts(
        given, mine, weights, routes, layer=0, owners=owners, ops=Between(ops, serve), tiles=tiles,
        workspace=room, out=torch.empty_like(hidden), a1_scale=scale,
    )  # fmt: skip
    assert (int(state[ASKED.value, 1]), int(state[LATE.value, 1])) == (1, 0)
    for tables in (local, mine):
        expected = split_experts(
            hidden,
            *tables,
            weights,
            routes,
            ops=ops,
            tiles=tiles,
            compute_dtype=shape.dtype,
            out=torch.empty_like(hidden),
        )
        assert torch.equal(found, expected) and found.isfinite().all()


@pytest.mark.parametrize("number", range(len(TINY_MODELS)), ids=[model.name for model in TINY_MODELS])
def test_calls_of_a_side(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU captures for each way, called here; the other side is silent, so that a request is late."""
    side = Rank.__new__(Rank)
    shape = side.layer = Shape(TINY_MODELS[number], None, torch.float16)
    model = side.model = shape.model
    side.torch, side.rank, side.layers, side.device = torch, 0, 2, CPU
    side.ops, side.graphs, side.kernels, side.kept = layer_ops(model, CPU), {}, {}, []
    slabs = [torch.zeros(shape.nbytes, dtype=torch.uint8) for _ in range(side.layers)]
    beside = [shape.fill(slab, seed) for seed, slab in enumerate(slabs)]
    where = [[slab.data_ptr()] * 2 for slab in slabs]
    side.local, side.direct = (
        [shape.tables(at, owners, each, CPU) for at, each in zip(where, beside, strict=True)]
        for owners in ([0] * model.experts, shape.owners(0))
    )
    side.shape = layer_shape(*side.local[0], model.top_k)
    side.tiles = {tokens: direct_tiles_for(side.shape, tokens, CPU, shape.block) for tokens in TOKENS}
    side.owners = torch.tensor(shape.owners(0), dtype=torch.int32)
    layout = shape.mail(max(TOKENS))
    memory = torch.zeros(layout.mail_bytes + layout.rows_bytes + 8, dtype=torch.uint8)
    mail, answers, bell = (
        torch.tensor([0, memory.data_ptr() + at], dtype=torch.int64)
        for at in (0, layout.mail_bytes, layout.mail_bytes + layout.rows_bytes)
    )
    state, flags = Requester.new_state(2, CPU), torch.zeros(2, dtype=torch.int32)
    limits = torch.full((len(TOKENS),), 1000, dtype=torch.int64)
    side.requester = Requester(0, 2, layout, TOKENS, state, flags, mail, bell, answers, limits)
    state[ENABLED.value, 0] = 1
    sent, tiled = list[Any](), list[Any]()
    ask = Requester.ask
    monkeypatch.setattr(Requester, "ask", lambda *given: sent.append(given[9:]) or ask(*given))
    monkeypatch.setattr(configs, "tiles_for", lambda *given: tiled.append(given[3]) or tiles_for(*given))
    side.call("echo", 1)()
    assert sent and all((scale is not None) == (model.quant == "block") for (scale,) in sent)
    monkeypatch.setattr(Requester, "ask", ask)
    assert memory[-7:].any() and memory[: layout.mail_bytes].any()
    found = []
    for way in ("local", "direct", "travel"):
        side.call(way, 8)()
        found.append(side.graphs["out", way, 8])
    assert tiled and set(tiled) == {shape.block}
    assert torch.equal(found[1], found[2]) and found[1].isfinite().all() and found[1].any()
    assert torch.allclose(found[0].float(), found[1].float(), rtol=0.05, atol=0.05)
    assert int(state[LATE.value, 1]) == int(state[ASKED.value, 1]) == 1
