"""Models for loads.py: config and tokenizer only, since servers fill in weights (`--load-format dummy`)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from examples.checkpoints import CheckpointSpec
from examples.checkpoints.families import make_config
from examples.checkpoints.fp8 import FP8_CONFIG
from examples.checkpoints.quantised import FORMS, IGNORED

_QWEN3: Final = CheckpointSpec(
    num_experts=128, num_layers=12, hidden=2048, intermediate=768, top_k=8, num_heads=32, num_kv_heads=4, head_dim=128,
    max_position=40960,
)  # fmt: skip
_GPT_OSS: Final = CheckpointSpec(
    family="gpt_oss", num_experts=128, num_layers=12, hidden=2880, intermediate=2880, top_k=4, num_heads=64,
    num_kv_heads=8, head_dim=64, max_position=40960,
)  # fmt: skip
#: What quantised checkpoints of MoE models leave as it is.
_IGNORED: Final = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
#: Name -> (its sizes, tokens of its vocabulary). The shapes are those of published models, with fewer layers.
MODELS: Final[dict[str, tuple[CheckpointSpec, int]]] = {
    "qwen3": (_QWEN3, 151936),
    "qwen3-fp8": (replace(_QWEN3, fp8=True), 151936),
    "qwen3-int4": (replace(_QWEN3, experts="ct-int4"), 151936),
    "deepseek-v3": (
        CheckpointSpec(
            family="deepseek_v3", num_experts=256, num_layers=4, hidden=7168, intermediate=2048, top_k=8,
            num_heads=128, num_kv_heads=128, head_dim=128, max_position=40960, fp8=True,
        ),
        129280,
    ),
    "gpt-oss": (_GPT_OSS, 201088),
    "gpt-oss-mxfp4": (replace(_GPT_OSS, experts="mxfp4"), 201088),
    "tiny": (CheckpointSpec(), 512),
}  # fmt: skip
_ARCHITECTURES: Final = {
    "qwen3_moe": "Qwen3MoeForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM", "gpt_oss": "GptOssForCausalLM",
}  # fmt: skip
#: Of the tokenizer: <s>, </s> and padding.
_SPECIAL: Final = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def write_model(name: str, layers: int | None, folder: Path) -> Path:
    """Write the model `name` of MODELS into `folder`, anew; layers: None for as many as the entry has."""
    spec, vocab = MODELS[name]
    if layers is not None:
        spec = replace(spec, num_layers=layers)
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(spec, _SPECIAL)
    config.vocab_size = vocab
    config.architectures = [_ARCHITECTURES[spec.family]]
    config.save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    if spec.family == "qwen3_moe":  # under the name that the hub has
        values["num_experts"] = values.pop("num_local_experts", spec.num_experts)
    if spec.fp8:
        values["quantization_config"] = FP8_CONFIG
    if spec.experts:
        found = FORMS[spec.experts].config
        values["quantization_config"] = {**found, **({IGNORED: _IGNORED} if IGNORED in found else {})}
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    _tokenizer(vocab).save_pretrained(folder)
    return folder


def model_in(name: str, layers: int | None, scratch: Path) -> Path:
    """The folder of a model: `name` itself, or where it is one of MODELS, written into `scratch`."""
    return write_model(name, layers, scratch / "model") if name in MODELS else Path(name)


def vocabulary(model: Path) -> int:
    """Tokens of a model's vocabulary."""
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def _tokenizer(vocab: int) -> Any:
    """A word for every token id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(3, vocab))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
