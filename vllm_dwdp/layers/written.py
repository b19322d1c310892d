"""Was every row of the share written by the checkpoint? Asked after loading, before vLLM processes the weights.

Independent of how a model reads its experts: before loading, one element of each part of a row (gate, up, down) gets a bit
pattern that no weight has; who still has it afterwards was not written. Packed integers have no such pattern; eight bytes of
them get one that nobody will meet. Parts are written from their first element on, so that padding, which lies behind, does
not matter.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import LayerBuild, ModelBuild
from vllm_dwdp.layers.slabs import NOT_PER_EXPERT

#: By bytes of an element: integers of the same size; all bits set are a NaN that no arithmetic gives.
_BITS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MARK: Final = -1
#: Of eight bytes of packed integers.
_PACKED_MARK: Final = 0x5DA1_C3F7_9E36_82B5
#: Experts named in an error.
_NAMED: Final = 8


class Mark(NamedTuple):
    """One part of all rows of one parameter.

    Attributes:
        first: where the part begins in a row.
        default: [rows], bits of the marked elements before; None where vLLM leaves them undefined.
    """

    layer: LayerBuild
    name: str
    part: str
    first: tuple[int, ...]
    default: torch.Tensor | None

    def elements(self) -> torch.Tensor | None:
        """[rows], integers over the marked elements; None where the parameter is another one by now."""
        parameter = getattr(self.layer.module, self.name, None)
        return None if parameter is None else _elements(parameter.data, self.first)

    @property
    def pattern(self) -> int:
        """What is marked with."""
        return _MARK if getattr(self.layer.module, self.name).is_floating_point() else _PACKED_MARK


def _bits(data: torch.Tensor) -> torch.Tensor:
    """Integers over floating-point numbers of the same size; int64 over as many packed ones."""
    return data.view(_BITS[data.element_size()] if data.is_floating_point() else torch.int64)


def _elements(data: torch.Tensor, first: tuple[int, ...]) -> torch.Tensor:
    bits = _bits(data)
    for place in first:
        bits = bits[:, place]
    return bits


def _parts(module: Any, name: str, parameter: torch.nn.Parameter) -> list[tuple[str, tuple[int, ...]]]:
    """(name, place of the first element in a row) of what checkpoints keep apart."""
    moe, shape = module.moe_config, _bits(parameter.data).shape[1:]
    first = (0,) * len(shape)
    # GPTQ and AWQ have inputs before outputs.
    along = len(shape) - 1 if getattr(parameter, "is_transposed", False) else 0
    rows = shape[along] if shape else 0
    if not name.startswith("w13") or not moe.is_act_and_mul or rows < 2 or rows % 2:
        return [("", first)]
    padded, real = moe.intermediate_size_per_partition, moe.intermediate_size_per_partition_unpadded
    if real is not None and 2 * real <= padded:
        # A loader that writes both at once may end before the second half begins.
        return [("", first)]
    return [("gate", first), ("up", (*first[:along], rows // 2, *first[along + 1 :]))]


def mark_rows(build: ModelBuild) -> list[Mark]:
    """Mark every part of every row of the share; to be called before weights are loaded."""
    marks: list[Mark] = []
    for layer in build.layers:
        module: Any = layer.module
        for name, parameter in module.named_parameters():
            if name in NOT_PER_EXPERT or parameter.ndim == 0 or parameter.is_meta or not _can_be_marked(parameter):
                continue
            # Weights are allocated as they come; scales (1), biases and zero points (0) have values that may stay.
            undefined = parameter.ndim > 2 and "scale" not in name and "zero" not in name
            for part, first in _parts(module, name, parameter):
                elements = _elements(parameter.data, first)
                marks.append(Mark(layer, name, part, first, None if undefined else elements.clone()))
                elements.fill_(marks[-1].pattern)
    return marks


def _can_be_marked(parameter: torch.nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.shape[-1] * parameter.element_size() % 8 == 0


def check_written(marks: list[Mark], build: ModelBuild) -> None:
    """Refuse a row of the share that nothing was written to; to be called once weights are loaded.

    Of a parameter with default values either all rows are written, or none; then they get their defaults back.

    Raises:
        DwdpError: layer, parameter and experts that no tensor was read for.
    """
    missing: list[str] = []
    for mark in marks:
        elements = mark.elements()
        if elements is None:
            continue
        unwritten = (elements == mark.pattern).cpu()
        if not unwritten.any():
            continue
        if mark.default is not None and unwritten.all():
            elements.copy_(mark.default)
            continue
        share = mark.layer.placement.shares[build.rank]
        experts = [share[row] for row in unwritten.nonzero().flatten().tolist()]
        what = f"{mark.name} ({mark.part})" if mark.part else mark.name
        shown = ", ".join(map(str, experts[:_NAMED])) + (", ..." if len(experts) > _NAMED else "")
        missing.append(f"{mark.layer.name}.{what} of {len(experts)} of this rank's {len(share)} experts: {shown}")
    if missing:
        more = f" (and {len(missing) - 1} more such parameters)" if len(missing) > 1 else ""
        raise DwdpError(
            f"no tensor of the checkpoint was loaded into {missing[0]}{more}; dwdp reads experts that are numbered from 0 "
            "in every layer: complete the checkpoint, or serve it without dwdp"
        )
