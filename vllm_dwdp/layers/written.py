"""Was every row of the share written by the checkpoint? Asked after loading, before vLLM processes the weights.

Independent of how a model reads its experts: before loading, one element of each part of a row (gate, up, down) gets a bit
pattern that no weight has; who still has it afterwards was not written. Packed integers have no such pattern; eight bytes of
them, of as many outputs as that takes, get one that nobody will meet. Parts are written from their first element on, so that
padding, which lies behind, does not matter.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import LayerBuild, ModelBuild
from vllm_dwdp.layers.methods import method_of
from vllm_dwdp.layers.slabs import NOT_PER_EXPERT

#: By bytes of an element: integers of the same size; all bits set are a NaN that no arithmetic gives.
_BITS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MARK: Final = -1
#: Of packed integers.
_PACKED_MARK: Final = bytes.fromhex("5DA1C3F79E3682B5")
#: Behind w13_ and w2_: what vLLM fills before weights are loaded, or no kernel reads (weight_shape). All else is undefined.
_DEFAULTS: Final = (
    "bias",
    "weight_scale",
    "weight_scale_inv",
    "weight_zero_point",
    "input_scale",
    "input_global_scale",
    "weight_shape",
)
#: Experts named in an error.
_NAMED: Final = 8


class Part(NamedTuple):
    """What checkpoints keep apart: its name, and where it begins in a row, whose outputs are in dimension `along`."""

    name: str
    first: tuple[int, ...]
    along: int


class Mark(NamedTuple):
    """One part of all rows of one parameter.

    Attributes:
        pattern: [marked elements of a row], what is marked with.
        default: [rows, marked elements of a row], bits before; None where vLLM leaves them undefined.
    """

    layer: LayerBuild
    name: str
    part: Part
    pattern: torch.Tensor
    default: torch.Tensor | None

    def elements(self) -> torch.Tensor | None:
        """As `default`, over what is there now; None where the parameter is another one by now."""
        parameter = getattr(self.layer.module, self.name, None)
        return None if parameter is None else _elements(parameter.data, self.part, len(self.pattern))


def _pattern(data: torch.Tensor) -> torch.Tensor:
    """[elements to mark in a row], integers of the size of those of `data`."""
    if data.is_floating_point():
        return torch.tensor([_MARK], dtype=_BITS[data.element_size()], device=data.device)
    return torch.frombuffer(bytearray(_PACKED_MARK), dtype=data.dtype).to(data.device)


def _elements(data: torch.Tensor, part: Part, count: int) -> torch.Tensor:
    """[rows, count], the first of a part along its outputs; fewer than `count` where rows have no more."""
    bits = data.view(_BITS[data.element_size()]) if data.is_floating_point() else data
    if not part.first:
        return bits[:, None]
    places: list[int | slice] = list(part.first)
    places[part.along] = slice(part.first[part.along], part.first[part.along] + count)
    return bits[(slice(None), *places)]


def _parts(module: Any, name: str, parameter: torch.nn.Parameter, count: int) -> list[Part]:
    """What checkpoints keep apart of a parameter of which `count` outputs are marked."""
    moe, shape = module.moe_config, parameter.shape[1:]
    first = (0,) * len(shape)
    # GPTQ and AWQ have inputs before outputs.
    along = len(shape) - 1 if getattr(parameter, "is_transposed", False) else 0
    rows = shape[along] if shape else 0
    if not name.startswith("w13") or not moe.is_act_and_mul or rows < 2 or rows % 2:
        return [Part("", first, along)]
    padded, real = moe.intermediate_size_per_partition, moe.intermediate_size_per_partition_unpadded
    if real is not None and 2 * real < padded + count:
        # A loader that writes both at once may end before the second half begins.
        return [Part("", first, along)]
    return [Part("gate", first, along), Part("up", (*first[:along], rows // 2, *first[along + 1 :]), along)]


def mark_rows(build: ModelBuild) -> list[Mark]:
    """Mark every part of every row of the share; to be called before weights are loaded.

    Raises:
        DwdpError: a part of packed integers has fewer than eight bytes of outputs.
    """
    return [mark for layer in build.layers for mark in mark_layer(layer)]


def mark_layer(layer: LayerBuild, defaults: tuple[str, ...] = _DEFAULTS) -> list[Mark]:
    """As `mark_rows`, of one layer, as far as its parameters have memory.

    defaults: behind w13_ and w2_, what has values now that count where a checkpoint has none.
    """
    marks: list[Mark] = []
    module: Any = layer.module
    known = method_of(module)
    undefined = known.undefined if known is not None else ()
    for name, parameter in module.named_parameters():
        if name in NOT_PER_EXPERT or parameter.ndim == 0 or parameter.is_meta:
            continue
        pattern = _pattern(parameter.data)
        bare = name.removeprefix("w13_").removeprefix("w2_")
        has_default = bare in defaults and bare not in undefined
        for part in _parts(module, name, parameter, len(pattern)):
            elements = _elements(parameter.data, part, len(pattern))
            if elements.shape[1] < len(pattern):
                raise DwdpError(
                    f"{layer.name}.{name} {list(parameter.shape)} has too few numbers to tell whether a checkpoint has "
                    "them: serve this model without dwdp"
                )
            marks.append(Mark(layer, name, part, pattern, elements.clone() if has_default else None))
            elements.copy_(pattern)
    return marks


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
        unwritten = (elements == mark.pattern).all(1).cpu()
        if not unwritten.any():
            continue
        if mark.default is not None and unwritten.all():
            elements.copy_(mark.default)
            continue
        share = mark.layer.placement.shares[build.rank]
        experts = [share[row] for row in unwritten.nonzero().flatten().tolist()]
        what = f"{mark.name} ({mark.part.name})" if mark.part.name else mark.name
        shown = ", ".join(map(str, experts[:_NAMED])) + (", ..." if len(experts) > _NAMED else "")
        missing.append(f"{mark.layer.name}.{what} of {len(experts)} of this rank's {len(share)} experts: {shown}")
    if missing:
        more = f" (and {len(missing) - 1} more such parameters)" if len(missing) > 1 else ""
        raise DwdpError(
            f"no tensor of the checkpoint was loaded into {missing[0]}{more}; dwdp reads experts that are numbered from 0 "
            "in every layer: complete the checkpoint, or serve it without dwdp"
        )
