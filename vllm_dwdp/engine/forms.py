"""Front end: settings that experts in some form of a checkpoint cannot have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_dwdp.errors import DwdpError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_dwdp.config import DwdpConfig
    from vllm_dwdp.platform import Platform


def check_form(config: DwdpConfig, model_config: ModelConfig, platform: Platform) -> None:
    """Raise DwdpError for such settings. What a form's name does not tell is refused once layers are there."""
    form = model_config.quantization
    if config.decode == "travel" and form in platform.quantisations and form not in platform.split:
        raise DwdpError(
            f'{model_config.model}: dwdp.decode is "travel" with quantisation {form!r}, for which dwdp has no kernels of '
            "its own: leave decode out, and missing experts are read directly"
        )
    if config.group is not None and form == "modelopt_fp4":
        from vllm_dwdp.layers.block_scales import NOT_APART

        raise DwdpError(f"{model_config.model}: experts {NOT_APART}")
