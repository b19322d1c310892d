"""What a layer that never acquires its weights would compute with: not another layer's, but NaN.

In all views but in place a slot holds one layer after the other, so that a layer which vLLM computed past
acquire would give wrong tokens, silently. So a layer's gate is a `FirstUse` until its first acquire. Layers that vLLM's
warm-up left out are sealed: until that acquire their weights are NaN, or there are none and their kernel raises. In place
the pages of a layer are always its own, and there is nothing to seal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_dwdp.layers.methods import kernels_of
from vllm_dwdp.transport.inplace import PageRun, map_runs
from vllm_dwdp.transport.memfd import create_file

if TYPE_CHECKING:
    from vllm_dwdp.layers.gates import LayerGate
    from vllm_dwdp.layers.slabs import ExpertTensor, LayerSlab

#: As bytes of a floating-point number of any width, FP8 included, this is NaN.
_NAN_BYTE = 0xFF

#: Bytes of memory behind NaN of any size.
_NAN_BYTES = 2 << 20


class FirstUse:
    """In front of a layer's gate until the first acquire, which takes it away."""

    def __init__(self, module: Any, gate: LayerGate) -> None:
        self._module, self._gate = module, gate
        self._views: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def acquire(self, layer: int, tokens: int) -> None:
        """As the gate's; then the layer computes from its view, and calls the gate itself."""
        self._gate.acquire(layer, tokens)
        if self._views:
            for parameter, view in self._views:
                parameter.data = view
            self._module.dwdp_attach_tables()
        self._module.dwdp_used(self._gate)

    def release(self, layer: int, tokens: int) -> None:
        """As the gate's."""
        self._gate.release(layer, tokens)

    def seal(self, tensors: Sequence[tuple[ExpertTensor, torch.Tensor]]) -> None:
        """Have the layer read these tensors, in place of its view, until the first acquire."""
        for tensor, stand_in in tensors:
            self._views.append((tensor.parameter, tensor.parameter.data))
            tensor.parameter.data = stand_in
        self._module.dwdp_detach_tables()


def unused(layers: Sequence[LayerSlab]) -> list[LayerSlab]:
    """Those of `layers` that were never acquired."""
    return [layer for layer in layers if isinstance(layer.build.module.dwdp_gate, FirstUse)]


def seal(layers: Sequence[LayerSlab], on_cpu: bool) -> None:
    """Seal layers that were never acquired, in any view but in place."""
    tensors = [tensor for layer in layers for tensor in layer.fetched]
    if not tensors:
        return
    if on_cpu:
        # vLLM's CPU kernels take any tensor for a dense one.
        nan = nan_pages(max(tensor.parameter.nbytes for tensor in tensors))
    else:
        widest = max(tensor.row_shape[-1] * tensor.dtype.itemsize for tensor in tensors)
        nan = torch.full((widest,), _NAN_BYTE, dtype=torch.uint8, device=tensors[0].parameter.device)
    for layer in layers:
        first = layer.build.module.dwdp_gate
        assert isinstance(first, FirstUse)
        by_strides = kernels_of(getattr(layer.build.module, "quant_method", None)) in (None, "TRITON")
        first.seal([(tensor, _stand_in(tensor, nan, on_cpu, by_strides)) for tensor in layer.fetched])


def _stand_in(tensor: ExpertTensor, nan: torch.Tensor, dense: bool, by_strides: bool = True) -> torch.Tensor:
    """NaN of the shape and dtype of `tensor`'s view: dense, or one line that repeats (Triton kernels go by strides).

    Other kernels would read past that line, and integers have no NaN: they get a tensor without elements.
    """
    shape = tensor.parameter.data.shape
    if not dense and not (by_strides and tensor.dtype.is_floating_point):
        return nan[:0].view(tensor.dtype)
    if dense:
        return nan[: tensor.parameter.nbytes].view(tensor.dtype).view(shape)
    return nan[: shape[-1] * tensor.dtype.itemsize].view(tensor.dtype).expand(shape)


def nan_pages(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes], read-only: the same few pages of NaN over and over; they go with the last tensor over them."""
    file = create_file(min(nbytes, _NAN_BYTES), "weights of layers that were not used yet")
    try:
        file.mapping.tensor().fill_(_NAN_BYTE)
        starts = range(0, nbytes, _NAN_BYTES)
        whole = map_runs([PageRun(file.fd, 0, start, min(_NAN_BYTES, nbytes - start)) for start in starts])
    finally:
        file.close()
    return whole.tensor()
