"""Every way in which vLLM can write or save weights after start, tried inside a real worker (docs/composition.md)."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any


def ways(worker: Any) -> dict[str, Callable[[], object]]:
    """By name; each would change or save weights in plain vLLM, most of them those of the first dense layer first."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.model_loader import ShardedStateLoader, get_model_loader
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
    from vllm.model_executor.model_loader.utils import process_weights_after_loading
    from vllm.model_executor.models.utils import AutoWeightsLoader

    from vllm_dwdp.engine.frozen import OPTIONAL, WORKER

    runner, config = worker.model_runner, worker.vllm_config
    model = runner.get_model()
    experts = next(module for module in model.modules() if isinstance(module, RoutedExperts))
    dense_name, dense = next(iter(model.named_parameters()))
    expert = experts.w13_weight
    wrong = dense.data + 1
    patch = CheckpointWeightPatch(dense_name, tuple(wrong.shape), wrong.dtype, wrong.flatten())
    row = expert.data[0].clone()

    def weights() -> Any:
        return iter([(dense_name, wrong), ("model.layers.0.mlp.experts.0.gate_proj.weight", row)])

    # What 0.31 has not: two methods of workers, and reloading in place.
    found = {name: getattr(worker, name) for name in WORKER if name not in OPTIONAL or hasattr(worker, name)}
    if importlib.util.find_spec("vllm.model_executor.model_loader.reload.inplace"):
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        found["reload in place"] = lambda: reload_weights(config, model, weights(), None, True)
        found["reload in place, in kernel format"] = lambda: reload_weights(config, model, weights(), None, False)
    return {
        **found,
        "load_model": worker.load_model,
        "runner.load_model": runner.load_model,
        "runner.reload_weights": lambda: runner.reload_weights(weights_iterator=weights()),
        "runner.reload_weights from disk": runner.reload_weights,
        "model.load_weights": lambda: model.load_weights(weights()),
        "apply_model": lambda: worker.apply_model(lambda found: found.load_weights(weights())),
        "load_weights of its class": lambda: type(model).load_weights(model, weights()),
        "load_weights of an inner module": lambda: model.model.load_weights(weights()),
        "AutoWeightsLoader": lambda: AutoWeightsLoader(model).load_weights(weights()),
        "load_checkpoint_weight_patches": lambda: load_checkpoint_weight_patches(model, [patch]),
        "load_weights of a layer": lambda: experts.load_weights(weights()),
        "weight_loader of a layer": lambda: experts.weight_loader(expert, row, "w", "w1", 0),
        "weight_loader of an expert tensor": lambda: expert.weight_loader(expert, row, "w", "w1", 0),
        "weight_loader of a dense tensor": lambda: dense.weight_loader(dense, wrong),
        "initialize_layerwise_reload": lambda: initialize_layerwise_reload(model),
        "initialize_layerwise_reload of a layer": lambda: initialize_layerwise_reload(experts),
        "the loader": lambda: get_model_loader(config.load_config).load_weights(model, worker.model_config),
        "DummyModelLoader": lambda: DummyModelLoader.load_weights(None, model, worker.model_config),  # type: ignore[arg-type]
        "process_weights_after_loading": lambda: process_weights_after_loading(
            model, worker.model_config, worker.device
        ),
        "load_state_dict": lambda: model.load_state_dict({dense_name: wrong}, strict=False),
        "load_state_dict of a layer": lambda: experts.load_state_dict({"w13_weight": expert.data}, strict=False),
        "state_dict": model.state_dict,
        "ShardedStateLoader": lambda: ShardedStateLoader.save_model(model, tempfile.gettempdir()),
        "get_expert_weights": experts.get_expert_weights,
    }


def tried(worker: Any) -> dict[str, str]:
    """Name of a way -> type and text of what it raised, "" where it raised nothing."""
    seen: dict[str, str] = {}
    for name, way in ways(worker).items():
        try:
            way()
            seen[name] = ""
        except Exception as error:
            seen[name] = f"{type(error).__name__}: {error}"
    return seen
