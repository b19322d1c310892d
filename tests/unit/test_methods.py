"""Quantised experts as vLLM's own methods load and process them, shared on the simulated device: every byte of every
parameter, and of whatever kernel objects keep, as plain vLLM has it. Kernels do not run here."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from tests.unit import fake_vmm
from tests.unit.gpu_sharing import MANY, share_on_gpus
from tests.unit.hopper import on_hopper
from tests.unit.leftovers import check_message, refusal
from tests.unit.whole_model import Loaded, expert_layers, load, vllm_groups
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers import gates, methods
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.kept import _tensors_in
from vllm_dwdp.layers.slabs import expert_tensors
from vllm_dwdp.layers.views import split
from vllm_dwdp.platform import CUDA

EXPERTS, RANKS, FEW = 5, 2, 16
SIZES = {"num_experts": EXPERTS, "num_layers": 2, "hidden": 256, "intermediate": 128}

#: (form of the experts on disk, --moe-backend): all that are admitted and that vLLM's own choice takes on such a GPU.
TAKEN = [
    *((form, kernels) for form in ("fp8-block", "fp8-tensor", "fp8-tensor-static") for kernels in ("triton", "marlin")),
    *((f"ct-fp8-{form}", "cutlass") for form in ("channel", "tensor-static")),
    *((f"ct-fp8-{form}", "triton") for form in ("channel", "block", "tensor-static")),
    *((f"ct-fp8-{form}", "marlin") for form in ("channel", "block", "tensor-static")),
    *((form, "marlin") for form in ("gptq-int4", "gptq-int8", "awq-int4", "ct-int4", "ct-int4-zeros", "ct-int8")),
    *((form, "triton") for form in ("ct-int4", "ct-int4-zeros", "ct-int8", "ct-w8a8")),
]


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with vllm_groups(), on_hopper():
        yield


@pytest.fixture(autouse=True)
def no_build_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ModelBuild, "_current", None)
    yield
    gates._gates.clear()
    gc.collect()


def rank_of(folder: Path, rank: int, kernels: str = "triton", view: str = "auto") -> Loaded:
    return load(folder, rank, RANKS, {"weight_view": view}, platform=CUDA, moe_backend=kernels)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def kept(module: Any) -> list[tuple[torch.Size, torch.dtype, bytes]]:
    """All tensors that the kernel object of a layer has of it."""
    method = module.quant_method
    found = _tensors_in([method.moe_kernel, method.moe_quant_config], set())
    return [(tensor.shape, tensor.dtype, as_bytes(tensor)) for tensor in found]


@pytest.mark.parametrize("view", ["composite", "contiguous"])
@pytest.mark.parametrize(("form", "kernels"), TAKEN)
def test_every_byte_is_plain_vllms(
    form: str, kernels: str, view: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_vmm, "PAGE", 3 * 4096)
    folder = checkpoint(**SIZES, experts=form)
    plain = list(expert_layers(load(folder, 0, 1, moe_backend=kernels).model).values())
    direct = {"direct_tokens": FEW} if view == "composite" else {}
    builds = [rank_of(folder, rank, kernels, view).build for rank in range(RANKS)]
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
                    assert as_bytes(parameter) == as_bytes(expected[name]), name
                # What the kernel is given under the names that it asks for.
                assert as_bytes(module.w13_weight) == as_bytes(whole.w13_weight)
                assert kept(module) == kept(whole)
                module.dwdp_gate.release(number, tokens)
        rank.sharing.close()
