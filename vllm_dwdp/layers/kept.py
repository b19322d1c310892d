"""What vLLM's kernel objects keep of a layer: the parameters themselves, or tensors that go their own way.

A view that re-points parameters from forward to forward is seen through a parameter only. A kernel object that keeps an
alias of its data, or a copy, would go on computing with what was there when it was made.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from vllm_dwdp.errors import DwdpError

if TYPE_CHECKING:
    from vllm_dwdp.layers.slabs import LayerSlab, LayerTensors

#: In the contiguous view an alias is right; the split view is for those who asked for another one.
_OTHERWISE: Final = {"composite": "contiguous", "contiguous": "split"}


def kept_apart(
    method: Any,
    parameters: Sequence[torch.nn.Parameter],
    aliases: bool = True,
    replicated: Sequence[torch.nn.Parameter] = (),
) -> int | None:
    """The number of the first of `parameters` of whose data vLLM's `method` keeps an alias, or something as large.

    None where it keeps nothing of them, or the parameters. aliases: False where data that it keeps stays where it is.
    replicated: the layer's other parameters, which are copies of none, however large.
    """
    known = {id(parameter) for parameter in (*parameters, *replicated)}
    for kept in _tensors_in([method.moe_kernel, getattr(method, "moe_quant_config", None)], set()):
        for number, parameter in enumerate(parameters):
            if id(kept) in known:
                continue
            alias = _storage(kept) == _storage(parameter)
            # A copy in another type has as many elements; of packed ones, which may be fewer or more, as many bytes.
            as_large = kept.numel() == parameter.numel() or kept.nbytes == parameter.nbytes
            if aliases if alias else as_large:
                return number
    return None


def aliased(layer: LayerTensors) -> str | None:
    """The first fetched tensor of a loaded layer of whose data vLLM's kernel object, made for the share, keeps an alias: so
    will the one that is made for all experts. None where it keeps none."""
    method = getattr(layer.build.module, "quant_method", None)
    known = {id(each.parameter) for each in (*layer.fetched, *layer.replicated)}
    there = [getattr(method, name, None) for name in ("moe_kernel", "moe_quant_config")]
    kept = {_storage(each) for each in _tensors_in(there, set()) if id(each) not in known}
    return next((each.name for each in layer.fetched if _storage(each.parameter) in kept), None)


def check_kernels(layers: Sequence[LayerSlab], view: str) -> None:
    """Raise DwdpError where vLLM's kernel objects, made for all experts by now, would not see what a view shows them.

    In the composite view a parameter's data is now here, now there; elsewhere it stays, so that an alias of it is right.
    """
    for layer in layers:
        method = layer.build.module.quant_method
        fetched, replicated = ([each.parameter for each in kind] for kind in (layer.fetched, layer.replicated))
        found = kept_apart(method, fetched, aliases=view == "composite", replicated=replicated)
        if found is not None:
            raise DwdpError(
                f'weight_view "{view}": {type(method).__name__} keeps {layer.build.name}.{layer.fetched[found].name} in '
                "a tensor of its own, which would not follow what is pulled: choose another --moe-backend, or use "
                f"weight_view {_OTHERWISE[view]}"
            )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors_in(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for item in thing.values() if isinstance(thing, dict) else thing:
            yield from _tensors_in(item, seen)
    elif hasattr(thing, "__dict__") and not _is_other(thing):
        yield from _tensors_in(vars(thing), seen)


def _is_other(thing: Any) -> bool:
    """Classes, functions, and layers, whose parameters are those that have a view."""
    return isinstance(thing, type | torch.nn.Module) or inspect.ismodule(thing) or inspect.isroutine(thing)
