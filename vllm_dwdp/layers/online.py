"""Experts that vLLM quantises while it reads them (`--quantization fp8_per_tensor` and the like).

Their parameters have no memory at first. vLLM keeps what it reads of a layer until its loaders have copied as many elements
as the layer has, gives the parameters memory, writes them and quantises each expert by itself. Parameters have the rows of
the share, and loaders copy nothing of other experts, so that no layer waits for an expert that never comes. One that lacks a
tensor is processed all the same once the files are read, from what memory held: here rows are marked before the first is
written, and looked at before the layer is processed (written.py).
"""

from __future__ import annotations

from typing import Any

from vllm_dwdp.layers.build import LayerBuild, ModelBuild
from vllm_dwdp.layers.written import Mark, check_written, mark_layer


class Arrival:
    """What of one layer is written between its getting memory and its being quantised.

    A wrapper in front of `process_weights_after_loading` of the layer's method, which goes once that was called.
    """

    def __init__(self, build: ModelBuild, layer: LayerBuild) -> None:
        self._build, self._layer = build, layer
        self._marks: list[Mark] | None = None
        method: Any = layer.module.quant_method
        self._process = method.process_weights_after_loading
        method.process_weights_after_loading = self._check_and_process
        layer.module.dwdp_arrival = self

    def mark(self) -> None:
        """Called before a weight is written into memory that vLLM has given the layer; the first time marks every row."""
        if self._marks is None:
            # Whatever had a value when the layer was built has none in the memory that it got since.
            self._marks = mark_layer(self._layer, defaults=())

    def _check_and_process(self, module: Any) -> None:
        self.mark()
        check_written(self._marks or [], self._build)
        module.dwdp_arrival = None
        del vars(module.quant_method)["process_weights_after_loading"]
        self._process(module)


def watch_online(build: ModelBuild) -> None:
    """Watch every layer that vLLM will quantise while it reads; to be called before it does.

    From here on loading a layer of which a tensor is missing raises DwdpError, as `check_written` does.
    """
    for layer in build.layers:
        if any(parameter.is_meta for parameter in layer.module.parameters()):
            Arrival(build, layer)
