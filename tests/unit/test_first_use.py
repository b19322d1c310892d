"""Layers whose weights were never acquired: named, and NaN until they are; on two ranks in this process."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from tests.unit.helpers import LIMIT_S, slab_maps
from tests.unit.meeting import Meeting
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.group.launch import DwdpLaunch
from vllm_dwdp.layers import gates
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.first_use import FirstUse, _stand_in, nan_pages
from vllm_dwdp.layers.routed_experts import DwdpExpertsMixin
from vllm_dwdp.layers.sharing import ExpertSharing
from vllm_dwdp.layers.slabs import ExpertTensor
from vllm_dwdp.layers.views.contiguous import RingGate
from vllm_dwdp.layers.views.direct import DirectGate
from vllm_dwdp.layers.views.split import SplitTables
from vllm_dwdp.platform import CPU

EXPERTS, INNER, HIDDEN, LAYERS = 5, 32, 64, 3


def rows(layer: int, experts: tuple[int, ...]) -> torch.Tensor:
    """[experts, HIDDEN, INNER]: the weights everybody agrees on."""
    values = torch.tensor([1.0 + 10 * layer + expert for expert in experts])
    return values[:, None, None].expand(-1, HIDDEN, INNER).contiguous()


class Plain(nn.Module):
    """What of vLLM's RoutedExperts matters here; experts are summed."""

    def __init__(self, layer_name: str, dtype: torch.dtype, moe_config: Any, *_: Any, **__: Any) -> None:
        super().__init__()
        self.moe_config, self.top_k, self.quant_method = moe_config, 1, SimpleNamespace()
        held = moe_config.num_local_experts
        self.w13_weight = nn.Parameter(torch.zeros(held, HIDDEN, INNER, dtype=dtype), requires_grad=False)
        self.w2_weight = nn.Parameter(torch.zeros(held, HIDDEN, INNER, dtype=dtype), requires_grad=False)

    def update_expert_map_info(self) -> None:
        """Nothing is kept of it here."""

    def forward_modular(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0 + self.w13_weight.sum(0)[:, 0] + self.w2_weight.sum(0)[:, 0]


class Experts(DwdpExpertsMixin, Plain):
    """As vllm_dwdp.layers.routed_experts makes them."""


@pytest.fixture(autouse=True)
def nothing_mapped() -> Iterator[None]:
    """Lets go of what a process keeps of its model for ever; the test fails if something stays mapped."""
    before, registered = slab_maps(), len(gates._gates)
    yield
    del gates._gates[registered:]
    ModelBuild._current = None
    torch._dynamo.reset()
    gc.collect()
    assert slab_maps() == before


@contextmanager
def shared(view: str) -> Iterator[list[ExpertSharing]]:
    """Two ranks of three layers on two slots, loaded and started."""
    launch = DwdpLaunch(DwdpConfig(weight_view=view, timeout_s=LIMIT_S), 2, "/made/up", ())
    builds = []
    for rank in range(2):
        builds.append(ModelBuild(launch.config, rank, 2, platform=CPU).open())
        for layer in range(LAYERS):
            moe = SimpleNamespace(
                num_experts=EXPERTS, intermediate_size_per_partition=INNER, hidden_dim=HIDDEN, is_act_and_mul=False
            )
            every = SimpleNamespace(num_fused_shared_experts=0, global_num_experts=EXPERTS)
            module = Experts(f"layers.{layer}", torch.float32, moe, None, every)  # type: ignore[arg-type]
            for parameter in module.parameters():
                parameter.data.copy_(rows(layer, module.dwdp_share))
    made: dict[int, ExpertSharing] = {}
    meeting = Meeting()

    def start(build: ModelBuild) -> None:
        made[build.rank] = ExpertSharing(build, meeting.of(build.rank), launch)
        made[build.rank].start()

    threads = [threading.Thread(target=start, args=(build,)) for build in builds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    try:
        assert len(made) == 2
        yield [made[rank] for rank in range(2)]
    finally:
        for sharing in made.values():
            sharing.close()


def modules(sharing: ExpertSharing) -> list[Any]:
    return [layer.build.module for layer in sharing.layers]


X = torch.zeros(2, HIDDEN)


def right(layer: int) -> torch.Tensor:
    return X + 2 * rows(layer, tuple(range(EXPERTS))).sum(0)[:, 0]


@pytest.mark.parametrize("inference", [False, True])
def test_a_layer_that_was_left_out_is_nan_until_it_is_used(inference: bool) -> None:
    with shared("contiguous") as ranks, torch.inference_mode(inference):
        for sharing in ranks:
            layers = modules(sharing)
            for layer in (1, 2):
                assert torch.equal(layers[layer].forward_modular(X), right(layer))
            layers[2].dwdp_gate.acquire(2, len(X))  # into the slot that it shares with layer 0
            assert torch.equal(Plain.forward_modular(layers[0], X), right(2))  # the fault
            layers[2].dwdp_gate.release(2, len(X))
            assert sharing.unused() == ["layers.0"]
            before = slab_maps()
            sharing.seal_unused()
            assert slab_maps() > before
            assert Plain.forward_modular(layers[0], X).isnan().all()
            for layer in (1, 2, 0, 1, 2, 0, 2, 1):
                assert torch.equal(layers[layer].forward_modular(X), right(layer))
            assert sharing.unused() == [] and all(isinstance(module.dwdp_gate, RingGate) for module in layers)
            assert all(gates._gates[module._dwdp_number][0] is module.dwdp_gate for module in layers)
            assert slab_maps() == before


def test_in_place_a_layer_that_was_left_out_is_seen_and_right() -> None:
    with shared("inplace") as ranks:
        for sharing in ranks:
            layers = modules(sharing)
            assert torch.equal(layers[1].forward_modular(X), right(1))
            assert sharing.unused() == ["layers.0", "layers.2"]
            sharing.seal_unused()
            assert torch.equal(Plain.forward_modular(layers[2], X), right(2))


def test_acquire_in_compiled_code_is_seen() -> None:
    with shared("contiguous") as ranks:
        for sharing in ranks:
            layer = modules(sharing)[0]
            compiled = torch.compile(layer.forward_modular, backend="aot_eager", fullgraph=True)
            assert torch.equal(compiled(X.clone()), right(0))
            assert sharing.unused() == ["layers.1", "layers.2"]


def test_a_failed_first_acquire_leaves_the_layer_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    with shared("contiguous") as ranks:
        sharing = ranks[0]
        layer = modules(sharing)[0]
        sharing.seal_unused()

        def fails(number: int) -> None:
            raise DwdpError("made to fail")

        with monkeypatch.context() as patched:
            patched.setattr(sharing.prefetcher, "acquire", fails)
            with pytest.raises(DwdpError, match="made to fail"):
                layer.forward_modular(X)
        assert Plain.forward_modular(layer, X).isnan().all() and isinstance(layer.dwdp_gate, FirstUse)
        assert torch.equal(layer.forward_modular(X), right(0))


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_every_dtype_and_any_size(dtype: torch.dtype) -> None:
    whole = nan_pages((5 << 20) + 96)
    assert whole.nbytes == (5 << 20) + 96 and whole.view(dtype).to(torch.float32).isnan().all()
    parameter = nn.Parameter(torch.zeros(6, 4, 16).to(dtype), requires_grad=False)
    tensor = ExpertTensor("w13_weight", parameter, (4, 16), 64 * dtype.itemsize, dtype)
    for dense in (True, False):
        found = _stand_in(tensor, whole, dense)
        assert found.shape == (6, 4, 16) and found.dtype == dtype and found.to(torch.float32).isnan().all()
        assert found.is_contiguous() is dense and found.stride(-1) == 1


@pytest.mark.parametrize("tokens", [4, 5], ids=["direct", "pulled"])
def test_a_split_layer_that_was_left_out_raises_until_it_is_used(tokens: int) -> None:
    """Whichever way its first forward goes, and those after it."""
    from vllm_dwdp.kernels.experts import SplitExperts

    kernel = SplitExperts.__new__(SplitExperts)
    tables: Any = SplitTables(("w13", "w2"), ("w13 at owners", "w2 at owners"))  # type: ignore[arg-type]
    kernel._tables, kernel._direct, kernel.direct = tables.pulled, tables.direct, False

    def attach_tables(pulled: Any, direct: Any) -> None:  # without its checks, which need real tables
        kernel._tables, kernel._direct = pulled, direct

    kernel.attach_tables = attach_tables  # type: ignore[method-assign]
    module = Experts.__new__(Experts)
    nn.Module.__init__(module)
    module.quant_method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=kernel))
    module.dwdp_tables = tables
    parameter = nn.Parameter(torch.zeros(1, 2), requires_grad=False)
    view = parameter.data
    pulls: list[int] = []
    ring: Any = SimpleNamespace(acquire=pulls.append, release=lambda layer: None)
    gate = DirectGate(ring, module, 4)
    module._dwdp_number = gates.register_gate(gate, 0)
    module.dwdp_gate = first = FirstUse(module, gate)
    first.seal([(ExpertTensor("w", parameter, (2,), 8, torch.float32), torch.full((1, 2), torch.nan))])
    for kernel.direct in (False, True):
        with pytest.raises(DwdpError, match="no weights"):
            _ = kernel.tables
    first.acquire(0, tokens)
    assert kernel.tables == (tables.direct if tokens == 4 else tables.pulled)
    assert parameter.data.data_ptr() == view.data_ptr() and pulls == ([] if tokens == 4 else [0])
    first.release(0, tokens)
    for other in (5, 4, 5):
        module.dwdp_gate.acquire(0, other)
        assert kernel.tables == (tables.direct if other == 4 else tables.pulled)
    assert module.dwdp_gate is gate and gates._gates[module._dwdp_number][0] is gate
