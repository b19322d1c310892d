"""Front end: forms of experts that are not supported, and settings that experts in some form cannot have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from vllm_dwdp.errors import DwdpError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_dwdp.config import DwdpConfig
    from vllm_dwdp.platform import Platform

#: Of checkpoints. Of one that is not quantised vLLM takes them for what it shall quantise to, or for what is not there.
_STORED: Final = ("mxfp4", "gpt_oss_mxfp4", "compressed-tensors")


def check_form(config: DwdpConfig, model_config: ModelConfig, platform: Platform) -> None:
    """Raise DwdpError for such forms and settings. What a form's name does not tell is refused once layers are there."""
    for message in (*_made_while_loading(model_config, platform), *_settings(config, model_config, platform)):
        raise DwdpError(f"{model_config.model}: {message}")


def _made_while_loading(model_config: ModelConfig, platform: Platform) -> Iterator[str]:
    """What vLLM would quantise experts to, or take them for."""
    form, names = model_config.quantization, ", ".join(name for name in platform.online if name != "online")
    if form in _STORED and model_config.model_arch_config.quantization_config is None:
        yield (
            f"--quantization {form} with a checkpoint that is not quantised, which dwdp does not support: use one that is, "
            f"or --quantization {names.replace(', int8', ' or int8')}"
        )
    online: Any = getattr(model_config, "quantization_config", None)
    wanted = getattr(getattr(online, "moe", None), "weight", None)
    if wanted is None:
        return
    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES, QuantizationConfigArgs

    known = {
        name: QuantizationConfigArgs(moe=name).moe.weight for name in ONLINE_QUANT_SHORTHAND_NAMES if name != "online"
    }
    if not any(known.get(name) == wanted for name in platform.online):
        told = next((name for name, weight in known.items() if weight == wanted), str(wanted))
        yield (
            f'--quantization-config with "moe" {told}, to which dwdp does not support quantising while loading: '
            f"use {names.replace(', int8', ' or int8')}"
        )


def _settings(config: DwdpConfig, model_config: ModelConfig, platform: Platform) -> Iterator[str]:
    form = model_config.quantization
    if config.decode == "travel" and form in platform.quantisations and form not in platform.split:
        yield (
            f'dwdp.decode is "travel" with quantisation {form!r}, for which dwdp has no kernels of its own: leave decode '
            "out, and missing experts are read directly"
        )
    if config.group is not None and form == "modelopt_fp4":
        from vllm_dwdp.layers.block_scales import NOT_APART

        yield f"experts {NOT_APART}"
