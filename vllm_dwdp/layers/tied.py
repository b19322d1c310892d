"""Expert parameters that two layers have in common: each would be moved, mapped and fetched twice, and they would part.

One parameter under two names of its layer is neither: vLLM's packed weights have the name that kernels ask for, too.
"""

from __future__ import annotations

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import ModelBuild


def refuse_tied(build: ModelBuild) -> None:
    """Raise DwdpError, with both names, where two expert parameters are one object or lie in one storage."""
    owners: dict[int, str] = {}
    for layer in build.layers:
        known = {id(parameter): name for name, parameter in layer.module.named_parameters()}
        for name, parameter in layer.module.named_parameters(remove_duplicate=False):
            if parameter.is_meta or not parameter.numel() or is_alias(name, known[id(parameter)]):
                continue
            here = f"{layer.name}.{name}"
            other = owners.setdefault(parameter.data.untyped_storage().data_ptr(), here)
            if other != here:
                raise DwdpError(
                    f"{other} and {here} are one tensor: dwdp gives every layer its own slab and cannot share tied "
                    "experts; use a checkpoint without tied layers"
                )


def is_alias(name: str, first: str) -> bool:
    """Whether one parameter may have these two names: w13_qweight and w13_weight, not w13_weight and w2_weight."""
    return name != first and name in ("w13_weight", "w2_weight") and name.partition("_")[0] == first.partition("_")[0]
