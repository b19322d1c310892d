"""What would write or save weights after start is refused (engine/frozen.py); with real engines: test_offline.py."""

from __future__ import annotations

import importlib.util
import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from tests.unit.leftovers import check_message, refusal
from vllm_dwdp.engine.cpu_worker import DwdpCPUWorker
from vllm_dwdp.engine.frozen import OPTIONAL, RUNNER, WORKER, freeze, refuse_methods
from vllm_dwdp.engine.gpu_worker import DwdpGPUWorker
from vllm_dwdp.layers.routed_experts import DwdpExpertsMixin

#: Of vLLM's worker, and about weights by their names, but harmless: questions, loading at start (refused afterwards in
#: worker.py), and waking up, which CPU ignores, and which on GPUs finds nothing asleep.
HARMLESS = {
    "load_model",
    "wake_up",
    "supports_draft_weight_updates",
    "shutdown_weight_transfer_engine",
    "sleep_mode_backend",
}


@pytest.mark.parametrize("cls", [DwdpCPUWorker, DwdpGPUWorker])
@pytest.mark.parametrize("name", [name for name in WORKER if name not in OPTIONAL or hasattr(Worker, name)])
def test_workers_refuse(cls: Any, name: str) -> None:
    check_message(refusal(lambda: getattr(cls, name)(None, {"update_info": {}})), [f"{name} would", ":"])


def test_nothing_about_weights_is_forgotten() -> None:
    """A method that another vLLM adds shows here."""
    about = re.compile("weight|save|load|sleep|discard|elastic|wake|update_param|checksum")
    names = {name for name in dir(Worker) if about.search(name) and not name.startswith("_")}
    assert names - HARMLESS | OPTIONAL == set(WORKER)
    assert {name for name, _ in inspect.getmembers(GPUModelRunner, inspect.isfunction) if "load" in name} >= set(RUNNER)


def test_a_name_that_vllm_no_longer_has() -> None:
    bare = type("Bare", (), {"reload_weights": None})
    check_message(refusal(lambda: refuse_methods(bare)), ["no init_weight_transfer_engine any more", "does not know"])
    check_message(refusal(lambda: freeze(SimpleNamespace(load_model=None))), ["no reload_weights any more"])


def test_a_name_that_not_every_vllm_has() -> None:
    """0.31 has no reset_weights: nothing is put there, and everything else is refused."""
    old: Any = type("Old", (), dict.fromkeys(set(WORKER) - OPTIONAL))
    refuse_methods(old)
    assert not any(hasattr(old, name) for name in OPTIONAL)
    assert set(WORKER) - OPTIONAL == {name for name in WORKER if callable(getattr(old, name, None))}


class Method(QuantizeMethodBase):
    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        pass

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.ones(1)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.data.zero_()


class Experts(DwdpExpertsMixin, nn.Module):  # type: ignore[misc]
    """A layer of ours, without vLLM behind it."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.w13_weight = nn.Parameter(torch.ones(4, 2, 2), requires_grad=False)

    def load_weights(self, weights: Any) -> set[str]:
        self.w13_weight.data.zero_()
        return {"w13_weight"}

    def weight_loader(self, parameter: nn.Parameter, values: torch.Tensor) -> None:
        parameter.data.copy_(values)


class Model(nn.Module):
    """A dense layer, which comes first, and one with experts; it loads as vLLM's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(2, 2, bias=False)
        self.dense.quant_method = Method()  # type: ignore[assignment]
        self.dense.weight.requires_grad_(False).fill_(1)
        self.experts = Experts()

    def load_weights(self, weights: Any) -> set[str]:
        return set(AutoWeightsLoader(self).load_weights(weights))


ZEROS = torch.zeros(2, 2)
WAYS: dict[str, Any] = {
    "model.load_weights": lambda m: m.load_weights(iter([("dense.weight", ZEROS)])),
    "of its class": lambda m: Model.load_weights(m, iter([("dense.weight", ZEROS)])),
    "of a layer": lambda m: m.experts.load_weights(iter([])),
    "dense loader": lambda m: m.dense.weight.weight_loader(m.dense.weight, ZEROS),
    "expert loader": lambda m: m.experts.w13_weight.weight_loader(m.experts.w13_weight, torch.zeros(4, 2, 2)),
    "layer's loader": lambda m: m.experts.weight_loader(m.experts.w13_weight, torch.zeros(4, 2, 2)),
    "layerwise": initialize_layerwise_reload,
    "layerwise of a layer": lambda m: initialize_layerwise_reload(m.experts),
    "dummy": lambda m: DummyModelLoader.load_weights(None, m, None),  # type: ignore[arg-type]
    "processing": lambda m: process_weights_after_loading(
        m,
        SimpleNamespace(word_embeddings_untied_by_checkpoint=False),  # type: ignore[arg-type]
        torch.device("cpu"),
    ),
    "load_state_dict": lambda m: m.load_state_dict({"dense.weight": ZEROS}, strict=False),
    "load_state_dict of a layer": lambda m: m.experts.load_state_dict({"w13_weight": torch.zeros(4, 2, 2)}),
    "state_dict": lambda m: m.state_dict(),
}

if importlib.util.find_spec("vllm.model_executor.model_loader.reload.inplace"):  # not in vLLM 0.31
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    WAYS["kernel format"] = lambda m: reload_weights(
        SimpleNamespace(model_config=None, load_config=None, lora_config=None),  # type: ignore[arg-type]
        m,
        iter([("dense.weight", ZEROS)]),
        None,
        False,
    )


@pytest.mark.parametrize("way", WAYS)
def test_ways_past_the_worker(way: str) -> None:
    model = Model()
    runner = SimpleNamespace(get_model=lambda: model, load_model=None, reload_weights=None)
    freeze(runner)
    check_message(refusal(lambda: WAYS[way](model)), [" would ", ":"])
    assert all(bool((parameter == 1).all()) and not parameter.is_meta for parameter in model.parameters())


def test_the_runner_refuses_and_dense_modules_may_be_read() -> None:
    model = Model()
    runner = SimpleNamespace(get_model=lambda: model, load_model=None, reload_weights=None)
    freeze(runner)
    for name in RUNNER:
        check_message(refusal(lambda name=name: getattr(runner, name)()), [f"model_runner.{name} would replace"])  # type: ignore[misc]
    assert list(model.dense.state_dict()) == ["weight"]
