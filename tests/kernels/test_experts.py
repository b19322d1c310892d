"""`SplitExperts` as vLLM calls it, with plain torch in place of vLLM's CUDA operators."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.layers import Layer
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.kernels import vllm_ops
from vllm_dwdp.kernels.torch_ops import assign, quantize_fp8

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

from vllm_dwdp.kernels import experts as module
from vllm_dwdp.kernels.experts import SplitExperts, scales_of, stand_in
from vllm_dwdp.kernels.tiles import Tiles


class _Moe:
    """What the class reads of vLLM's MoE config."""

    swiglu_limit = swiglu_alpha = swiglu_beta = activation_situ_beta = activation_situ_linear_beta = None


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's operators for CUDA, in torch."""

    def activation(self: Any, kind: Any, out: torch.Tensor, gate_up: torch.Tensor, **_: Any) -> None:
        gate, up = gate_up.float().chunk(2, 1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    def quantize(x: torch.Tensor, scale: Any, kind: Any, group: int) -> Any:
        return (x, None) if kind == "none" else quantize_fp8(x, kind, group, scale)

    monkeypatch.setattr(vllm_ops, "assign", assign)
    monkeypatch.setattr(vllm_ops, "quantize", quantize)
    monkeypatch.setattr(SplitExperts, "activation", activation)
    monkeypatch.setattr(SplitExperts, "moe_sum", lambda self, partial, out: out.copy_(partial.float().sum(1)))
    monkeypatch.setattr(module, "is_deep_gemm_e8m0_used", lambda: False)


def _apply(experts: SplitExperts, layer: Layer, **changes: Any) -> torch.Tensor:
    """As vLLM's modular kernel does: shapes from the stand-ins, workspaces of the sizes that the class asks for."""
    w1, w2 = (stand_in(table) for table in layer.tables)
    E, M, N, K, top_k = experts.moe_problem_size(layer.x, w1, w2, layer.ids)
    shapes = experts.workspace_shapes(M, N, K, top_k, E, E, None, MoEActivation.SILU)
    dtype = torch.float16
    first, second, output = (torch.full(shape, float("nan"), dtype=dtype) for shape in shapes)
    states, scale = layer.ops.quantize(layer.x, layer.static)
    given = {"expert_map": None, "apply_router_weight_on_input": False} | changes
    experts.apply(
        output=output, hidden_states=states, w1=w1, w2=w2, topk_weights=layer.router, topk_ids=layer.ids,
        activation=MoEActivation.SILU, global_num_experts=E, a1q_scale=scale, a2_scale=layer.static,
        workspace13=first, workspace2=second, expert_tokens_meta=None, **given,
    )  # fmt: skip
    return output


def _made(layer: Layer) -> SplitExperts:
    config = FusedMoEQuantConfig.make(w1_bias=layer.biases[0], w2_bias=layer.biases[1])
    if layer.scales is not None:
        config = FusedMoEQuantConfig.make(
            torch.float8_e4m3fn,
            w1_scale=layer.tables[0].scales.values,
            w2_scale=layer.tables[1].scales.values,
            per_act_token_quant=layer.quant == "token",
            per_out_ch_quant=layer.scales == "channel",
            block_shape=list(layer.group) if layer.scales == "block" else None,
        )
    experts = SplitExperts(_Moe(), config)  # type: ignore[arg-type]
    experts.attach_tables((layer.tables[0], layer.tables[1]))
    return experts


@pytest.mark.parametrize("quant", ["none", "block", "token", "tensor"])
def test_apply(on_cpu: None, quant: Any) -> None:
    """Nothing of the stand-ins reaches the result, and vLLM's workspaces suffice."""
    scales = {"none": None, "block": "block", "token": "channel", "tensor": "tensor"}[quant]
    layer = Layer(experts=6, hidden=64, width=48, tokens=13, top_k=2, dtype=torch.float16, scales=scales, quant=quant)  # type: ignore[arg-type]
    found, expected = _apply(_made(layer), layer), layer.expected()
    # FP8 layers are computed in bfloat16, as vLLM does. The interpreter cuts it instead of rounding, and a value that is
    # cut may fall to its other neighbour in FP8.
    assert (found.float() - expected).norm() <= (2e-3 if quant == "none" else 5e-2) * expected.norm()


def test_biases_come_from_the_quantisation_config(on_cpu: None) -> None:
    layer = Layer(experts=4, hidden=32, width=32, tokens=7, top_k=2, dtype=torch.float16, bias=True)
    layer.tables = [replace(table, bias=None) for table in layer.tables]
    experts = _made(layer)
    torch.testing.assert_close(_apply(experts, layer).float(), layer.expected(), atol=2e-2, rtol=0)


def test_weights_on_the_input_are_left_to_vllm(on_cpu: None) -> None:
    """vLLM's prepare step has multiplied them already."""
    layer = Layer(experts=4, hidden=32, width=32, tokens=7, top_k=1, dtype=torch.float16)
    found = _apply(_made(layer), layer, apply_router_weight_on_input=True)
    layer.router.fill_(1.0)
    torch.testing.assert_close(found.float(), layer.expected(), atol=2e-2, rtol=0)


def test_direct_forwards_take_the_second_tables(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles of their own, each looked up once per number of tokens; biases are those of both."""
    shape = dict(experts=4, hidden=32, width=32, tokens=7, top_k=2, dtype=torch.float16, bias=True)
    pulled, direct = Layer(**shape), Layer(**shape, seed=1)  # type: ignore[arg-type]
    direct.x, direct.ids, direct.router = pulled.x, pulled.ids, pulled.router
    direct.biases = pulled.biases
    asked: list[str] = []
    for name in ("tiles_for", "direct_tiles_for"):
        choose = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, choose=choose, name=name: (asked.append(name), choose(*a))[1])
    experts = _made(pulled)
    pairs = [tuple(replace(table, bias=None) for table in layer.tables) for layer in (pulled, direct)]
    experts.attach_tables(pairs[0], pairs[1])  # type: ignore[arg-type]
    for experts.direct in (True, False, True, True, False):
        layer = direct if experts.direct else pulled
        torch.testing.assert_close(_apply(experts, layer).float(), layer.expected(), atol=2e-2, rtol=0)
    assert asked == ["direct_tiles_for", "tiles_for"]
    assert not torch.equal(pulled.expected(), direct.expected())


class _Journey:
    """Of batches of at most 4 tokens, in rooms of 2 and 4."""

    most_tokens = 4

    def __init__(self, least_tokens: int = 1) -> None:
        self.least_tokens = least_tokens
        self.tokens: list[int] = []

    def room(self, tokens: int) -> int:
        return 2 if tokens <= 2 else 4

    def experts(self, hidden: torch.Tensor, tables: Any, *args: Any, out: torch.Tensor, **named: Any) -> None:
        self.tokens.append(len(hidden))
        w13, w2 = tables
        assert named["workspace"].gemm.numel() == len(hidden) * 2 * (w13.rows + w2.rows), (
            "a row of both products a route"
        )
        out.fill_(5.0)


@pytest.mark.parametrize("least", [1, 2])
def test_tokens_of_small_direct_forwards_travel(least: int, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tiles of what owners compute, and routes that are sorted however few they are; but of fewer than `least`."""
    layer = Layer(experts=16, hidden=32, width=32, tokens=7, top_k=2, dtype=torch.float16)
    asked: list[tuple[str, int]] = []
    for name in ("tiles_for", "direct_tiles_for"):
        choose = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, choose=choose, name=name: (asked.append((name, a[1])), choose(*a))[1]
        )
    compiled: list[tuple[int, bool | None]] = []
    monkeypatch.setattr(module, "compile_layer", lambda *a: compiled.append((a[2], a[6])))
    experts, journey = _made(layer), _Journey(least)
    tables = layer.tables[0], layer.tables[1]
    experts.attach_tables(tables, tables)
    experts.journey = journey  # type: ignore[assignment]
    x, ids, router, expected = layer.x, layer.ids, layer.router, layer.expected()
    for experts.direct in (False, True):
        for tokens in (1, 3, 4, 5):
            layer.x, layer.ids, layer.router = x[:tokens], ids[:tokens], router[:tokens]
            travels = experts.direct and least <= tokens <= 4
            assert experts.travels(tokens) == travels
            found = _apply(experts, layer)
            assert torch.equal(found, torch.full_like(found, 5.0)) == travels
            if not travels:
                torch.testing.assert_close(found.float(), expected[:tokens], atol=2e-2, rtol=0)
            experts.compile(tokens, 2)
    alone = least > 1
    assert journey.tokens == [1, 3, 4][alone:]
    first = (1, None if alone else False)
    assert compiled == [(1, None), (3, None), (4, None), (5, None), first, (3, False), (4, False), (5, None)]
    rooms = [tokens for name, tokens in asked if name == "direct_tiles_for"]
    assert rooms == [1 if alone else 2, 4, 5]


def test_a_rank_that_computes_for_others_leaves_them_room(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the pointer kernel, which is compiled as well, where tokens travel at all."""
    layer = Layer(experts=4, hidden=32, width=32, tokens=7, top_k=2, dtype=torch.float16)
    monkeypatch.setattr(module, "tiles_for", lambda *a: Tiles(16, 16, 16, kernel="persistent"))
    used: list[str] = []
    compute = module.split_experts
    monkeypatch.setattr(
        module, "split_experts", lambda *a, **named: (used.append(named["tiles"].kernel), compute(*a, **named))[1]
    )
    compiled: list[str] = []
    monkeypatch.setattr(module, "compile_layer", lambda *a: compiled.append(a[1].kernel))
    experts = _made(layer)
    experts.compile(7, 2)
    experts.journey = _Journey()  # type: ignore[assignment]
    experts.compile(7, 2)
    assert compiled == ["persistent", "persistent", "pointer"]
    found = []
    for gives_way in (False, True, False):
        experts.gives_way = lambda gives_way=gives_way: gives_way
        found.append(_apply(experts, layer))
    assert used == ["persistent", "pointer", "persistent"]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_it_refuses(on_cpu: None) -> None:
    layer = Layer(experts=4, hidden=32, width=32, tokens=7, top_k=1, dtype=torch.float16)
    experts = SplitExperts(_Moe(), FusedMoEQuantConfig.make())  # type: ignore[arg-type]
    other = Layer(experts=5, hidden=32, width=32, tokens=7, top_k=1)
    with pytest.raises(DwdpError, match="call attach_tables before"):
        _apply(experts, layer)
    with pytest.raises(DwdpError, match="needs as many experts"):
        experts.attach_tables((layer.tables[0], other.tables[1]))
    tables = (layer.tables[0], layer.tables[1])
    with pytest.raises(DwdpError, match="needs as many experts"):
        experts.attach_tables(tables, (layer.tables[0], other.tables[1]))
    experts.attach_tables(tables)
    experts.direct = True
    with pytest.raises(DwdpError, match="call attach_tables before"):
        _apply(experts, layer)
    with pytest.raises(DwdpError, match="with an expert map"):
        _apply(_made(layer), layer, expert_map=torch.arange(4))
    with pytest.raises(DwdpError, match=r"no split-weight kernel for experts quantised to torch\.int8"):
        SplitExperts(_Moe(), FusedMoEQuantConfig.make(torch.int8))  # type: ignore[arg-type]


def test_stand_ins_take_no_memory() -> None:
    table = Layer(experts=4, hidden=32, width=16, tokens=1, top_k=1).tables[0]
    made = stand_in(table)
    assert made.shape == (4, 32, 32) and made.stride(-1) == 1
    assert made.untyped_storage().nbytes() == 32 * 4


@pytest.mark.parametrize(
    ("shape", "block", "kind"),
    [((4, 2, 3), [32, 32], "block"), ((4, 64), None, "channel"), ((4, 64, 1), None, "channel"), ((4,), None, "tensor"),
     ((4, 1), None, "tensor")],
)  # fmt: skip
def test_scales_by_their_shape(shape: tuple[int, ...], block: Any, kind: str) -> None:
    assert scales_of(torch.ones(shape), block, 64).kind == kind
