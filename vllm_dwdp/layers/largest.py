"""Static scales of activations: one value for a layer, the largest over all its experts.

vLLM takes the largest of the experts that it has loaded, which here are a share. Shares cover all experts, so the largest of
the group's values is the one that plain vLLM has. Kernel objects that keep something of it are made once more behind this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.methods import Method, method_of

if TYPE_CHECKING:
    import torch

    from vllm_dwdp.group.rendezvous import Rendezvous


def refuse_apart(build: ModelBuild) -> None:
    """Raise DwdpError where ranks come and go and a layer has such values; to be called before weights are loaded."""
    if build.apart is not None and (own := _largest(build)):
        raise DwdpError(
            f"{len(own)} static scales of activations with dwdp.group, where a rank that returns reads too few to know "
            "the largest: use a checkpoint with dynamic ones, or one launch for all ranks"
        )


def share_largest(build: ModelBuild, rendezvous: Rendezvous, group: Sequence[int]) -> int:
    """Give every single value that is the largest over a share that of the group; returns how many there are.

    Raises DwdpError where ranks have different numbers of them, or come and go.
    """
    refuse_apart(build)
    own = [parameter for parameter in _largest(build) if parameter.ndim == 0]
    # Ranks have the same methods, if not the same parameters: a rank with none tells the others.
    if build.apart is not None or not any(known.largest for known in _methods(build)):
        return 0
    said = rendezvous.gather("largest", [float(parameter) for parameter in own], list(group))
    if len(set(map(len, said))) > 1:
        counts = " and ".join(str(len(values)) for values in said)
        raise DwdpError(f"ranks have {counts} static scales of activations: start all ranks with the same checkpoint")
    for parameter, values in zip(own, zip(*said, strict=True), strict=True):
        parameter.data.fill_(max(values))
    return len(own)


def _methods(build: ModelBuild) -> list[Method]:
    return [known for layer in build.layers if (known := method_of(layer.module)) is not None]


def _largest(build: ModelBuild) -> list[torch.nn.Parameter]:
    """A value per expert before weights are processed, single values behind that."""
    return [
        parameter
        for layer in build.layers
        if (known := method_of(layer.module)) is not None
        for name, parameter in layer.module.named_parameters()
        if known.is_largest(name)
    ]
