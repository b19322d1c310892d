"""Expert parameters that two layers have in common: each would be moved, mapped and fetched twice, and they would part."""

from __future__ import annotations

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import ModelBuild


def refuse_tied(build: ModelBuild) -> None:
    """Raise DwdpError, with both names, where two expert parameters are one object or lie in one storage."""
    owners: dict[int, str] = {}
    for layer in build.layers:
        for name, parameter in layer.module.named_parameters(remove_duplicate=False):
            if parameter.is_meta or not parameter.numel():
                continue
            here = f"{layer.name}.{name}"
            other = owners.setdefault(parameter.data.untyped_storage().data_ptr(), here)
            if other != here:
                raise DwdpError(
                    f"{other} and {here} are one tensor: dwdp gives every layer its own slab and cannot share tied "
                    "experts; use a checkpoint without tied layers"
                )
