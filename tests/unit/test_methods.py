"""Quantised experts as vLLM's own methods load and process them, shared on the simulated device: every byte of every
parameter, and of whatever kernel objects keep, as plain vLLM has it. Kernels do not run here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from tests.unit import fake_vmm
from tests.unit.gpu_sharing import MANY, share_on_gpus
from tests.unit.leftovers import check_message, refusal
from tests.unit.meeting import Meeting
from tests.unit.quantised import EXPERTS, FLASHINFER, RANKS, TAKEN, UNREAD, plain_of, rank_of, ranks_of, sizes
from tests.unit.whole_model import expert_layers
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers import methods
from vllm_dwdp.layers.kept import _tensors_in, aliased
from vllm_dwdp.layers.largest import share_largest
from vllm_dwdp.layers.slabs import tensors_of
from vllm_dwdp.layers.views import choose_view, split

FEW = 16

#: One of each method, kernels and kind of parameters.
COMPOSITE = [
    ("fp8-block", "triton"), ("fp8-tensor-static", "triton"), ("fp8-block", "marlin"), ("ct-fp8-channel", "cutlass"),
    ("ct-fp8-tensor-static", "cutlass"), ("gptq-int4", "marlin"), ("awq-int4", "marlin"), ("ct-int4-zeros", "marlin"),
    ("ct-int4", "triton"), ("ct-w8a8", "triton"), ("mxfp4", "marlin"), ("fp8-tensor-static", "flashinfer_cutlass"),
    ("online-fp8-tensor", "triton"), ("online-fp8-block", "marlin"), ("online-int8", "triton"),
    ("nvfp4", "marlin"), ("ct-nvfp4", "marlin"), ("ct-mxfp4", "marlin"), ("mxfp4-each", "marlin"),
]  # fmt: skip
CONTIGUOUS = [
    ("fp8-tensor-static", "marlin"),
    ("ct-fp8-channel", "triton"),
    ("gptq-int8", "marlin"),
    ("online-fp8-channel", "cutlass"),
]


def cases() -> Iterator[Any]:
    for view, quick in (("composite", COMPOSITE), ("contiguous", CONTIGUOUS)):
        for taken in (*TAKEN, *FLASHINFER):
            yield pytest.param(*taken, view, marks=() if taken in quick else pytest.mark.full)


pytestmark = pytest.mark.usefixtures("hopper", "no_build_stays")


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def kept(module: Any) -> list[tuple[torch.Size, torch.dtype, bytes]]:
    """All tensors that the kernel object of a layer has of it."""
    method = module.quant_method
    found = _tensors_in([method.moe_kernel, method.moe_quant_config], set())
    return [(tensor.shape, tensor.dtype, as_bytes(tensor)) for tensor in found]


@pytest.mark.parametrize(("form", "kernels", "view"), list(cases()))
def test_every_byte_is_plain_vllms(
    form: str, kernels: str, view: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_vmm, "PAGE", 3 * 4096)
    folder = checkpoint(**sizes(form))
    plain = list(expert_layers(plain_of(folder, form, kernels).model).values())
    direct = {"direct_tokens": FEW} if view == "composite" else {}
    builds = [loaded.build for loaded in ranks_of(folder, form, kernels, view)]
    assert not any(aliased(layer) for build in builds for layer in tensors_of(build)), "auto would leave composite out"
    _, ranks = share_on_gpus(monkeypatch, view, builds=builds, **direct)
    for rank in ranks:
        rank.sharing.start()
        for number, (module, whole) in enumerate(zip(rank.modules, plain, strict=True)):
            assert module.local_num_experts == module.moe_config.num_local_experts == EXPERTS  # type: ignore[attr-defined]
            expected = dict(whole.named_parameters())
            for tokens in (MANY, FEW, MANY):
                assert module.dwdp_gate is not None
                module.dwdp_gate.acquire(number, tokens)
                rank.device.machine.drain()
                found = dict(module.named_parameters())
                assert list(found) == list(expected)
                for name, parameter in found.items():
                    assert (parameter.shape, parameter.dtype) == (expected[name].shape, expected[name].dtype), name
                    assert name in UNREAD.get(form, ()) or as_bytes(parameter) == as_bytes(expected[name]), name
                # What the kernel is given under the names that it asks for.
                assert as_bytes(module.w13_weight) == as_bytes(whole.w13_weight)
                assert kept(module) == kept(whole)
                module.dwdp_gate.release(number, tokens)
        rank.sharing.close()


@pytest.mark.parametrize("form", ["gptq-int4", "awq-int4", "ct-int4"])
def test_kernels_that_break_the_rule_are_refused_before_weights_load(
    form: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM dequantises at start and leaves one scale in place of a row per expert."""
    monkeypatch.setattr("vllm_dwdp.engine.loader.mark_rows", lambda build: pytest.fail("weights are loaded"))
    message = refusal(lambda: rank_of(checkpoint(**sizes(form)), 0, "emulation"))
    check_message(
        message, ["kernels EMULATION", "scales without a row per expert", "dwdp needs --moe-backend", "marlin"]
    )


@pytest.mark.parametrize(
    ("form", "kernels", "why"),
    [
        ("fp8-block", "triton", None),
        ("fp8-tensor", "triton", None),
        ("online-fp8-tensor", "triton", None),
        ("online-fp8-block", "triton", None),
        ("online-fp8-channel", "triton", "are computed by Fp8PtpcOnlineMoEMethod, for which"),
        ("online-fp8-tensor", "marlin", "are computed by the kernels MARLIN"),
        ("fp8-block", "marlin", "are computed by the kernels MARLIN"),
        (
            "fp8-tensor-static",
            "triton",
            "are computed by Fp8MoEMethod with static scales, for which there is no split-weight kernel",
        ),
        ("ct-fp8-channel", "triton", "are computed by CompressedTensorsW8A8Fp8MoEMethod, for which"),
        ("ct-fp8-channel", "cutlass", "are computed by the kernels VLLM_CUTLASS"),
        ("ct-w8a8", "triton", "are computed by CompressedTensorsW8A8Int8MoEMethod, for which"),
    ],
)
def test_layers_that_have_a_split_view(
    form: str, kernels: str, why: str | None, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(**sizes(form))
    build = rank_of(folder, 0, kernels, form=form).build
    found = split.why_not(tensors_of(build)[0])
    assert choose_view(build, tensors_of(build)) == ("contiguous" if why else "split")
    if why is None:
        assert found is None
        return
    assert str(found).startswith(why)
    # Asked for, it is refused before weights load.
    monkeypatch.setattr("vllm_dwdp.engine.loader.mark_rows", lambda build: pytest.fail("weights are loaded"))
    with pytest.raises(DwdpError, match=f'weight_view "split": experts of model.layers.0.* {why}.*: use weight_view'):
        rank_of(folder, 0, kernels, "split", form)


@pytest.mark.parametrize(
    ("form", "kernels"), [("ct-int4", "marlin"), ("ct-w8a8", "triton"), ("ct-fp8-channel", "cutlass")]
)
def test_a_layer_that_the_warm_up_left_out_has_nothing_to_compute_with(
    form: str, kernels: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integers have no NaN, and kernels that take addresses would read past one line of it."""
    folder = checkpoint(**sizes(form))
    builds = [loaded.build for loaded in ranks_of(folder, form, kernels, "contiguous")]
    plain = list(expert_layers(plain_of(folder, form, kernels).model).values())[1]
    _, ranks = share_on_gpus(monkeypatch, "contiguous", builds=builds)
    for rank in ranks:
        rank.sharing.start()
        used, left_out = rank.modules
        used.dwdp_gate.acquire(0, MANY)  # type: ignore[union-attr]
        used.dwdp_gate.release(0, MANY)  # type: ignore[union-attr]
        rank.sharing.seal_unused()
        assert len(used.w13_weight) == EXPERTS and not left_out.w13_weight.numel() and not left_out.w2_weight.numel()
        left_out.dwdp_gate.acquire(1, MANY)  # type: ignore[union-attr]
        rank.device.machine.drain()
        assert as_bytes(left_out.w13_weight) == as_bytes(plain.w13_weight)
        rank.sharing.close()


@pytest.mark.parametrize(("refuses", "view"), [((), "composite"), ((1,), "contiguous"), ((0, 1), "contiguous")])
def test_auto_asks_every_rank_for_pages(
    refuses: tuple[int, ...], view: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one device refuses such memory, no rank takes the composite view."""
    monkeypatch.setattr(fake_vmm, "PAGE", 3 * 4096)
    builds = [rank_of(checkpoint(**sizes("ct-w8a8")), rank).build for rank in range(RANKS)]
    numbers: list[Any] = []

    def why_not(self: Any) -> str | None:
        if self not in numbers:
            numbers.append(self)
        return "no such memory" if numbers.index(self) in refuses else None

    monkeypatch.setattr(fake_vmm.FakeVmm, "why_not", why_not)
    _, ranks = share_on_gpus(monkeypatch, "auto", builds=builds, direct_tokens=FEW if view == "composite" else 0)
    assert [rank.sharing.view for rank in ranks] == [view] * RANKS
    for rank in ranks:
        rank.sharing.close()


def layer_of(method: str, *scales: float | list[float]) -> Any:
    """A layer that vLLM's class of this name computes, with static scales: single ones, or a row per expert."""
    module = torch.nn.Module()
    module.quant_method = type(method, (), {})()  # type: ignore[assignment]
    for name, scale in zip(("w13_input_scale", "w2_input_scale"), scales, strict=False):
        module.register_parameter(name, torch.nn.Parameter(torch.tensor(scale), requires_grad=False))
    return module


def shared_largest(*ranks: Any) -> list[Any]:
    """What `share_largest` returns, or raises, on each rank that has one such layer."""
    meeting, group = Meeting(), list(range(len(ranks)))

    def share(rank: int) -> Any:
        build: Any = SimpleNamespace(apart=None, layers=[SimpleNamespace(module=ranks[rank])])
        try:
            return share_largest(build, meeting.of(rank), group)
        except DwdpError as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(share, group))


def test_static_scales_that_one_rank_alone_has() -> None:
    """Every rank says so at once, also to those that have some; a rank asks nobody where no method has any."""
    some, none = layer_of("Fp8MoEMethod", 0.5, 0.25), layer_of("Fp8MoEMethod")
    for ranks, counts in (((some, none), "2 and 0"), ((none, some), "0 and 2")):
        assert (
            shared_largest(*ranks)
            == [f"ranks have {counts} static scales of activations: start all ranks with the same checkpoint"] * 2
        )
    assert shared_largest(none, none) == [0, 0]
    assert shared_largest(some, layer_of("Fp8MoEMethod", 0.125, 4.0)) == [2, 2]
    assert [float(scale) for scale in some.parameters()] == [0.5, 4.0]
    build: Any = SimpleNamespace(apart=None, layers=[SimpleNamespace(module=layer_of(methods.UNQUANTISED))])
    assert share_largest(build, None, [0, 1]) == 0  # type: ignore[arg-type]


def test_scales_with_a_row_per_expert_are_no_single_values() -> None:
    """Each expert's stays its own, also where the share is one expert; the other product's single value is shared."""
    one, other = layer_of("Fp8MoEMethod", [0.5], 0.25), layer_of("Fp8MoEMethod", [4.0, 2.0], 8.0)
    assert shared_largest(one, other) == [1, 1]
    assert [scale.tolist() for layer in (one, other) for scale in layer.parameters()] == [[0.5], 8.0, [4.0, 2.0], 8.0]
