"""Experts that vLLM quantises while it reads them (`--quantization fp8_per_tensor` and the like).

Their parameters have no memory at first. vLLM keeps what it reads of a layer until its loaders have copied as many elements
as the layer has, gives the parameters memory, writes them and quantises each expert by itself. Parameters have the rows of
the share, and loaders copy nothing of other experts, so that no layer waits for an expert that never comes. One that lacks a
tensor is processed all the same once the files are read, from what memory held: here rows are marked before the first is
written, and looked at before the layer is processed (written.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_dwdp.layers.build import LayerBuild, ModelBuild
from vllm_dwdp.layers.written import Mark, check_written, mark_layer


def online_layers(build: ModelBuild) -> list[LayerBuild]:
    """Layers that vLLM will quantise while it reads them; to be asked before it does."""
    return [layer for layer in build.layers if any(parameter.is_meta for parameter in layer.module.parameters())]


def before_quantised(layer: LayerBuild, act: Callable[[], None]) -> None:
    """Call `act` right before vLLM quantises the layer: a wrapper in front of `process_weights_after_loading` of its method,
    which goes then."""
    method: Any = layer.module.quant_method
    process = method.process_weights_after_loading

    def act_and_process(module: Any) -> None:
        act()
        vars(method).pop("process_weights_after_loading", None)
        process(module)

    method.process_weights_after_loading = act_and_process


class Arrival:
    """What of one layer is written between its getting memory and its being quantised."""

    def __init__(self, build: ModelBuild, layer: LayerBuild) -> None:
        self._build, self._layer = build, layer
        self._marks: list[Mark] | None = None
        before_quantised(layer, self._check)
        layer.module.dwdp_arrival = self

    def mark(self) -> None:
        """Called before a weight is written into memory that vLLM has given the layer; the first time marks every row."""
        if self._marks is None:
            # Whatever had a value when the layer was built has none in the memory that it got since.
            self._marks = mark_layer(self._layer, defaults=())

    def _check(self) -> None:
        self.mark()
        check_written(self._marks or [], self._build)
        self._layer.module.dwdp_arrival = None


def watch_online(build: ModelBuild) -> None:
    """Watch every layer that vLLM will quantise while it reads; to be called before it does.

    From here on loading a layer of which a tensor is missing raises DwdpError, as `check_written` does.
    """
    for layer in online_layers(build):
        Arrival(build, layer)
