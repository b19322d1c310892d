"""Weights stay as they were loaded: what of vLLM would replace or read them afterwards raises, before anything is written.

Peers read a rank's experts at any time, and its parameters are views: of slots, which hold one layer after the other, or of
peers' pages. A rank that is asked for an update refuses it whole, dense weights too, so that it never has half of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import torch
from torch import nn
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

from vllm_dwdp.compat.seams import SEAMS
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.routed_experts import DwdpExpertsMixin

WRITES: Final = "would replace weights that peers read: restart with the new checkpoint"
READS: Final = "would read slots and stand-ins, since a dwdp rank holds a share of the experts only: ask plain vLLM"
SLEEPS: Final = "would take memory away that peers read: leave it out (LLM.wake_up() resumes a paused engine)"

#: Methods of vLLM's workers.
WORKER: Final = {
    "reload_weights": WRITES,
    "reset_weights": WRITES,
    "init_weight_transfer_engine": WRITES,
    "start_weight_update": WRITES,
    "start_draft_weight_update": WRITES,
    "update_weights": WRITES,
    "finish_weight_update": WRITES,
    "elastic_ep_execute": WRITES,
    "save_sharded_state": READS,
    "save_tensorized_model": READS,
    "compute_weight_checksums": READS,
    "sleep": SLEEPS,
    "discard": SLEEPS,
}

#: Methods of vLLM's model runners.
RUNNER: Final = {"load_model": WRITES, "reload_weights": WRITES}

#: Methods of modules, where a module has them: those that write, on all modules (vLLM's reloading asks for parameters by
#: `get_parameter`, to copy into them); those that read, where experts are below.
MODULE_WRITES: Final = ("load_weights", "load_state_dict", "weight_loader", "get_parameter")
MODULE_READS: Final = ("state_dict", "get_expert_weights")


#: Of these, what a release of vLLM may lack.
OPTIONAL: Final = WORKER.keys() & {seam.name.rpartition(".")[2] for seam in SEAMS if seam.optional}


def refusal(what: str, why: str) -> Callable[..., NoReturn]:
    """A stand-in for a function called `what` that raises DwdpError."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise DwdpError(f"{what} {why}")

    return refuse


def refuse_methods(cls: type) -> None:
    """Give `cls`, which extends a worker of vLLM, a refusal for every method of `WORKER` that it has.

    Raises DwdpError for a name that vLLM no longer has and always had: another may then write what it wrote.
    """
    for name, why in WORKER.items():
        if not hasattr(cls, name):
            if name in OPTIONAL:
                continue
            raise DwdpError(
                f"vLLM's workers have no {name} any more: this release of dwdp does not know what writes weights"
            )
        setattr(cls, name, refusal(name, why))


@dataclass
class _Refusing(LayerReloadingInfo):
    """What vLLM's layerwise reloading, and its dummy loader, ask about a module before they touch it."""

    def can_load(self) -> bool:
        raise DwdpError(f"reloading layer by layer {WRITES}")


def freeze(runner: Any) -> None:
    """Have everything that would write or save the weights of `runner`'s model raise DwdpError from here on.

    Not reached: code that writes into parameters itself.
    """
    for name, why in RUNNER.items():
        if not hasattr(runner, name):
            raise DwdpError(
                f"vLLM's model runner has no {name} any more: this release of dwdp does not know what writes"
            )
        setattr(runner, name, refusal(f"model_runner.{name}", why))
    freeze_model(runner.get_model())


def freeze_model(model: nn.Module) -> None:
    """See `freeze`: the model, its modules, their quantisation methods and their parameters."""
    process = refusal("process_weights_after_loading", WRITES)
    layerwise_info = _Refusing(({}, {}), torch.device("cpu"))
    for path, module in list(model.named_modules()):
        name = ".".join(filter(None, ("model", path)))
        _refuse(module, name, MODULE_WRITES, WRITES)
        if any(isinstance(inner, DwdpExpertsMixin) for inner in module.modules()):
            _refuse(module, name, MODULE_READS, READS)
        method = getattr(module, "quant_method", None)
        if method is not None and hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading = process
        layerwise.LAYERWISE_INFO[module] = layerwise_info
    for name, parameter in model.named_parameters():
        # Through the property that vLLM's own parameters have.
        setattr(parameter, "weight_loader", refusal(f"weight_loader of {name}", WRITES))  # noqa: B010


def _refuse(module: nn.Module, path: str, methods: Iterable[str], why: str) -> None:
    for name in methods:
        if callable(getattr(module, name, None)):
            object.__setattr__(module, name, refusal(f"{path}.{name}", why))
