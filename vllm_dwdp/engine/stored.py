"""A model's config as one would read whose weights are stored as they are held in memory: what sizes are computed from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vllm.config import ModelConfig

#: vLLM's name for what it quantises experts to while it reads them -> the quantization_config of such a checkpoint.
_ONLINE: Final[dict[str, dict[str, Any]]] = {
    "fp8_per_tensor_static": {"quant_method": "fp8"},
    "fp8_per_channel_static": {"quant_method": "fp8"},
    "fp8_per_block_static": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "int8_per_channel_static": {"quant_method": "gptq", "bits": 8},
}
#: Where linear layers stay as they are.
_LINEAR: Final = ["re:.*self_attn.*", "re:.*shared_expert.*", "re:.*mlp.up_proj"]
#: What `--quantization fp8` of a BF16 checkpoint means to vLLM.
_FP8: Final = "fp8_per_tensor_static"


def stored_config(model_config: ModelConfig) -> dict[str, Any]:
    """config.json of the model, with a quantization_config where vLLM quantises experts of one that has none.

    What vLLM quantises to otherwise, or by layer, is left out: sizes are then those of the checkpoint, which are more.
    """
    config: dict[str, Any] = model_config.hf_config.to_dict()
    if model_config.quantization is None or config.get("quantization_config"):
        return config
    online: Any = model_config.quantization_config
    name = str(online.moe) if online is not None else _FP8 if model_config.quantization == "fp8" else ""
    if (told := _ONLINE.get(name)) is None:
        return config
    linear = online is None or online.linear is not None
    return {**config, "quantization_config": {**told, "ignore": [] if linear else _LINEAR}}
