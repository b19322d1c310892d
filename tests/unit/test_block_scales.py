"""One factor for the block scales of all experts of a layer: the group's, whatever a rank has loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4

from tests.unit.quantised import RANKS, plain_of, rank_of, ranks_of, sizes
from tests.unit.whole_model import as_bytes, expert_layers
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers import block_scales
from vllm_dwdp.patches.block_scales import factor_of

pytestmark = pytest.mark.usefixtures("hopper", "no_build_stays")


def test_a_share_alone_would_have_another_factor(checkpoint: Callable[..., Path]) -> None:
    """Else the tests that compare bytes would show nothing."""
    folder = checkpoint(**sizes("nvfp4"))
    whole = next(iter(expert_layers(plain_of(folder, "nvfp4", "marlin").model).values()))
    alone = [rank_of(folder, rank, "marlin").build.layers[0] for rank in range(RANKS)]
    together = [loaded.build.layers[0] for loaded in ranks_of(folder, "nvfp4", "marlin")]
    for name in ("w13_weight_scale", "w13_weight_scale_2", "w2_weight_scale", "w2_weight_scale_2"):
        right = as_bytes(getattr(whole, name))
        same = []
        for layers in (alone, together):
            shares = [list(layer.placement.shares[rank]) for rank, layer in enumerate(layers)]
            pairs = zip(layers, shares, strict=True)
            same.append([torch.equal(as_bytes(getattr(layer.module, name)), right[share]) for layer, share in pairs])
        assert not all(same[0]) and all(same[1]), name


def test_vllm_is_asked_with_the_groups_largest() -> None:
    compute, scales = marlin_utils_fp4._nvfp4_compute_scale_factor, torch.tensor([[0.5, 2.0], [0.0, 1.0]])
    with factor_of([7.0, 448.0, 2.0]):
        factors = [marlin_utils_fp4._nvfp4_compute_scale_factor(scales.bfloat16(), torch.bfloat16) for _ in range(3)]
    assert factors == [64.0, 1.0, compute(scales)] == [64.0, 1.0, 128.0]
    assert marlin_utils_fp4._nvfp4_compute_scale_factor is compute


@pytest.mark.parametrize(
    ("largest", "calls", "said"),
    [((1.5,), 1, "up to 2.0, call 1"), ((3.0,), 2, "call 2 of a layer"), ((3.0, 3.0), 1, "took 1 of 2")],
)
def test_another_vllm_is_refused(largest: tuple[float, ...], calls: int, said: str) -> None:
    compute = marlin_utils_fp4._nvfp4_compute_scale_factor
    with pytest.raises(DwdpError, match=said), factor_of(largest):
        for _ in range(calls):
            marlin_utils_fp4._nvfp4_compute_scale_factor(torch.tensor([2.0]))
    assert marlin_utils_fp4._nvfp4_compute_scale_factor is compute


def layer(method: str = "ModelOptNvFp4FusedMoE") -> Any:
    module = torch.nn.Module()
    module.quant_method = type(method, (), {"process_weights_after_loading": lambda self, layer: None})()  # type: ignore[assignment]
    for product in ("w13", "w2"):
        scales = torch.nn.Parameter(torch.ones(2, 2, 2), requires_grad=False)
        module.register_parameter(f"{product}_weight_scale", scales)
    return SimpleNamespace(module=module, name="a.layer")


def test_ranks_that_come_and_go_are_refused_before_weights_load(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_dwdp.engine.loader.check_written", lambda *args: pytest.fail("weights are loaded"))
    apart: Any = SimpleNamespace(adopted=None, files_checked=True)
    with pytest.raises(DwdpError, match=r"^experts of model.layers.0.* in NVFP4 with dwdp.group.*: use another quant"):
        rank_of(checkpoint(**sizes("nvfp4")), 0, "marlin", apart=apart)
    build: Any = SimpleNamespace(apart=apart, layers=[layer("Fp8MoEMethod")])
    assert block_scales.scaled_layers(build) == []


def test_ranks_that_have_other_layers_are_told() -> None:
    build: Any = SimpleNamespace(apart=None, layers=[layer()], gather=lambda name, value: [value, []])
    scaled = block_scales.scaled_layers(build)
    assert scaled == build.layers
    with pytest.raises(DwdpError, match=r"^ranks have 1 and 0 MoE layers in NVFP4: start all"):
        block_scales.share_block_scales(build, scaled)


def test_a_layer_is_processed_once_with_the_largest_of_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever expert of whichever rank has it; a layer that vLLM processes again is as one of plain vLLM."""
    found, said, used = layer(), list[Any](), list[list[float]]()
    method = found.module.quant_method
    found.module.w13_weight_scale.data[1, 0, 0] = 3.0
    found.module.w2_weight_scale.data[0, 1, 1] = 5.0

    def gather(name: str, value: Any) -> list[Any]:
        said.append(value)
        return [value, [[7.0, 1.0]]]

    @contextmanager
    def factor(largest: list[float]) -> Iterator[None]:
        used.append(largest)
        yield

    monkeypatch.setattr(block_scales, "factor_of", factor)
    block_scales.share_block_scales(SimpleNamespace(gather=gather), [found])  # type: ignore[arg-type]
    method.process_weights_after_loading(found.module)
    assert said == [[[3.0, 5.0]]] and used == [[7.0, 5.0]] and not vars(method)
