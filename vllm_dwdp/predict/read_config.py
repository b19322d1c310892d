"""A Hugging Face config.json of a mixture-of-experts model -> MoeModel."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, Final

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.config_defaults import DEFAULTS, SAME_AS
from vllm_dwdp.predict.formats import WeightFormat, weight_format
from vllm_dwdp.predict.input_files import read_json, understood
from vllm_dwdp.predict.model import Attention, LayerGroup, MoeModel
from vllm_dwdp.predict.quantization import read_formats

#: Of a config: any size, and those that the planner goes through one by one.
MOST_SIZE: Final = 2**32
MOST_LAYERS: Final = 10_000
MOST_EXPERTS: Final = 100_000

MODELS: Final = Path(__file__).parent / "models"

# The same size under different names; the first that is present counts.
_EXPERTS: Final = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "n_experts")
_TOP_K: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k",
    "experts_per_token",
)
_EXPERT_WIDTH: Final = ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size")
_SHARED_COUNT: Final = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
_FULL: Final = {"full_attention", "attention"}
_WINDOWED: Final = {"sliding_attention", "chunked_attention"}


class Fields:
    """A config's fields with the defaults of its transformers class; errors name the field and the model."""

    def __init__(self, raw: dict[str, Any], name: str) -> None:
        self.name = name
        outer = raw
        # Multimodal models keep the language model's sizes in a part of their own.
        for part in ("text_config", "language_config", "llm_config"):
            if isinstance(raw.get(part), dict):
                raw = {
                    **raw[part],
                    "quantization_config": raw[part].get("quantization_config", outer.get("quantization_config")),
                }
                break
        self.kind = str(raw.get("model_type") or outer.get("model_type") or "")
        base = SAME_AS.get(self.kind, self.kind)
        # A field that is null says "none", which is not the class's default (DeepSeek-V2-Lite's q_lora_rank).
        self.values = {**DEFAULTS.get(base, {}), **raw}

    def get(self, *names: str) -> Any:
        """The first of `names` that is present, or None."""
        return next((self.values[n] for n in names if self.values.get(n) is not None), None)

    def count(self, *names: str, default: int | None = None, least: int = 1, most: int = MOST_SIZE) -> int:
        """A whole number; raises DwdpError if it is missing without default, or no whole number in least..most."""
        value = self.get(*names)
        if value is None:
            if default is None:
                raise DwdpError(
                    f"the config of {self.name} (model_type {self.kind!r}) has no {' or '.join(names)}: "
                    "add the field, or pass a config.json that has it"
                )
            return default
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise DwdpError(
                    f"{names[0]} of {self.name} differs by layer ({value[:4]}...): not supported by the planner"
                )
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DwdpError(f"{names[0]} of {self.name} is {value!r}: it must be a whole number >= {least}")
        if value > most:
            raise DwdpError(f"{names[0]} of {self.name} is {value}: it must be at most {most}")
        return value

    def numbers(self, name: str) -> list[int] | None:
        """A list of whole numbers, or None; raises DwdpError for anything else."""
        value = self.get(name)
        if value is None or (isinstance(value, list) and all(isinstance(item, int) for item in value)):
            return value
        raise DwdpError(f"{name} of {self.name} is {value!r}: it must be a list of layer numbers")


def load_model(source: str, expert_format: str | None = None, linear_format: str | None = None) -> MoeModel:
    """The model of a config.json, of a folder with one, of a shipped name, or of an id in the local Hugging Face cache.

    expert_format, linear_format: override what the config's quantisation says, for the routed experts and for all other
    products. Raises DwdpError.
    """
    path = find_config(source)
    raw = read_json(path, "give a model's config.json")
    if not isinstance(raw, dict):
        raise DwdpError(f"{path} holds a {type(raw).__name__}: a model's config.json is a mapping")
    by_file = Path(os.path.abspath(path)).parent.name if path.name == "config.json" else path.stem
    named = path.parent == MODELS or not Path(source).expanduser().exists()
    name = source.rstrip("/") if named else str(raw.get("_name_or_path") or by_file)
    return parse_model(raw, name, expert_format, linear_format)


def find_config(source: str) -> Path:
    """Where the config of `source` lies; raises DwdpError that says where it was looked for."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return path
    shipped = {p.stem.lower(): p for p in MODELS.glob("*.json")}
    if found := shipped.get(source.rsplit("/", 1)[-1].lower()):
        return found
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    folder = cache / f"models--{source.replace('/', '--')}"
    snapshots = sorted(folder.glob("snapshots/*/config.json"))
    if snapshots:
        # Their names are hashes: which is the newest, the branch says.
        branch = folder / "refs" / "main"
        newest = folder / "snapshots" / (branch.read_text().strip() if branch.is_file() else "") / "config.json"
        return newest if newest in snapshots else snapshots[-1]
    known = ", ".join(sorted(p.stem for p in MODELS.glob("*.json")))
    raise DwdpError(
        f"no config of {source!r}: it is no file or folder, not in the Hugging Face cache ({cache}), and not shipped "
        f"({known}); give the path of its config.json"
    )


def parse_model(
    raw: dict[str, Any], name: str, expert_format: str | None = None, linear_format: str | None = None
) -> MoeModel:
    """See `load_model`; `raw` is the content of a config.json."""
    with understood(f"the config of {name}"):
        return _model(raw, name, expert_format, linear_format)


def _model(raw: dict[str, Any], name: str, expert_format: str | None, linear_format: str | None) -> MoeModel:
    f = Fields(raw, name)
    if f.get(*_EXPERTS) in (None, 0):
        raise DwdpError(f"{name} (model_type {f.kind!r}) has no routed experts: DWDP is for mixture-of-experts models")
    hidden, layers = f.count("hidden_size"), f.count("num_hidden_layers", "num_layers", most=MOST_LAYERS)
    experts, top_k = f.count(*_EXPERTS, most=MOST_EXPERTS), f.count(*_TOP_K)
    if top_k > experts:
        raise DwdpError(
            f"{name} routes a token to {top_k} of {experts} experts: {_TOP_K[0]} must not exceed the experts"
        )
    width = f.count(*_EXPERT_WIDTH, "intermediate_size")
    biased_experts = f.kind == "gpt_oss"
    moe = _moe_layers(f, layers)
    if not any(moe):
        raise DwdpError(
            f"no layer of {name} has routed experts, by its own fields: check first_k_dense_replace and others"
        )
    attention, spans = _attention(f, hidden), _windows(f, layers)
    counted = Counter(zip(spans, moe, strict=True))
    groups = tuple(
        LayerGroup(_with_window(attention, window), is_moe, count) for (window, is_moe), count in counted.items()
    )
    formats = read_formats(f.values, name)
    experts_in = weight_format(expert_format) if expert_format else formats.experts
    shared = _shared_params(f, hidden, width)
    return MoeModel(
        name=name,
        hidden=hidden,
        vocab=f.count("vocab_size"),
        tied=bool(f.get("tie_word_embeddings")),
        groups=groups,
        experts=experts,
        top_k=top_k,
        expert_params=3 * hidden * width + ((2 * width + hidden) if biased_experts else 0),
        expert_width=width,
        shared_params=shared,
        dense_params=3 * hidden * f.count("intermediate_size_mlp", "intermediate_size", default=width),
        router_params=hidden * experts + (experts if biased_experts or f.kind in ("deepseek_v3", "glm4_moe") else 0),
        expert_format=experts_in,
        attention_format=_linear(formats.attention, linear_format),
        mlp_format=_linear(formats.mlp, linear_format),
        context_limit=f.count("max_position_embeddings", default=0) or None,
    )


def _linear(read: WeightFormat, override: str | None) -> WeightFormat:
    return weight_format(override) if override else read


def _with_window(a: Attention, window: int | None) -> Attention:
    return Attention(a.heads, a.kv_heads, a.head_dim, a.v_head_dim, window, a.kv_rank, a.q_rank, a.rope_dim, a.biases)


def _moe_layers(f: Fields, layers: int) -> list[bool]:
    """Which layers have routed experts."""
    listed = f.numbers("moe_layers")
    if listed is not None:
        routed = set(listed)
        return [i in routed for i in range(layers)]
    if step := f.count("interleave_moe_layer_step", default=0, least=0):
        return [(i + 1) % step == 0 for i in range(layers)]
    first = f.count("first_k_dense_replace", "moe_layer_start_index", default=0, least=0)
    every = f.count("moe_layer_freq", "decoder_sparse_step", "moe_layer_interval", default=1)
    dense = set(f.numbers("mlp_only_layers") or [])
    sparse_step = f.get("decoder_sparse_step") is not None
    return [
        i >= first and i not in dense and ((i + 1) % every == 0 if sparse_step else i % every == 0)
        for i in range(layers)
    ]


def _windows(f: Fields, layers: int) -> list[int | None]:
    """Per layer, how far attention looks back; None: everything."""
    types = f.get("layer_types")
    # Where a class has `use_sliding_window` false, transformers writes a span of 0.
    field = "attention_chunk_size" if f.kind.startswith("llama4") else "sliding_window"
    span = f.count(field, default=0, least=0) or None
    if types is None and f.kind == "gpt_oss":
        types = ["sliding_attention" if (i + 1) % 2 else "full_attention" for i in range(layers)]
    if types is None and f.kind.startswith("llama4"):
        full = f.get("no_rope_layers") or [(i + 1) % (f.get("no_rope_layer_interval") or 4) for i in range(layers)]
        types = ["chunked_attention" if rope else "full_attention" for rope in full]
    if isinstance(types, list):
        for kind in types:
            if not isinstance(kind, str) or kind not in _FULL | _WINDOWED:
                raise DwdpError(
                    f"{f.name} has layers of type {kind!r}: the planner knows {', '.join(sorted(_FULL | _WINDOWED))} only"
                )
        if any(kind in _WINDOWED for kind in types) and not span:
            raise DwdpError(f"{f.name} has sliding layers but no sliding_window: add the field")
        if len(types) < layers:
            raise DwdpError(f"{f.name} lists {len(types)} layer_types for {layers} layers: correct the config")
        return [span if kind in _WINDOWED else None for kind in types[:layers]]
    used = f.get("use_sliding_window")
    return [span if span and used is not False else None] * layers


def _attention(f: Fields, hidden: int) -> Attention:
    if f.kind in ("qwen3_next", "jamba", "bamba", "granitemoehybrid", "nemotron_h", "kimi_linear", "deepseek_v32"):
        raise DwdpError(
            f"{f.name} ({f.kind}) has state-space, linear or sparse attention layers: not in the planner yet"
        )
    heads = f.count("num_attention_heads")
    if f.get("kv_lora_rank"):
        rope, nope = f.count("qk_rope_head_dim"), f.count("qk_nope_head_dim")
        rank, q_rank = f.count("kv_lora_rank"), f.count("q_lora_rank", default=0, least=0) or None
        return Attention(
            heads, heads, nope + rope, f.count("v_head_dim"), None, rank, q_rank, rope, rank + (q_rank or 0)
        )
    kv = f.count("num_key_value_heads", default=heads)
    dim = f.count("head_dim", default=max(1, hidden // heads))
    biases = (heads + 2 * kv) * dim if f.get("attention_bias") or f.get("qkv_bias") else 0
    if f.kind == "gpt_oss":
        biases += hidden + heads
    if f.kind in ("qwen3_moe", "olmoe") or f.get("use_qk_norm"):
        biases += 2 * dim
    return Attention(heads, kv, dim, dim, None, biases=biases)


def _shared_params(f: Fields, hidden: int, width: int) -> int:
    """Parameters of a layer's shared experts."""
    if size := f.count("shared_expert_intermediate_size", "shared_intermediate_size", default=0, least=0):
        gate = hidden if f.kind == "qwen2_moe" else 0
        return 3 * hidden * size + gate
    if f.kind.startswith("llama4"):
        return 3 * hidden * width
    return 3 * hidden * width * f.count(*_SHARED_COUNT, default=0, least=0)
