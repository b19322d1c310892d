"""The transformers config of each family, at the sizes of a spec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_dwdp.errors import DwdpError

from .spec import VOCAB_SIZE, CheckpointSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The only multi-head latent attention sizes that vLLM's CPU kernel has.
MLA_SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


def make_config(spec: CheckpointSpec, special_ids: dict[str, int]) -> PretrainedConfig:
    """`special_ids`: bos_token_id, eos_token_id and pad_token_id of the tokenizer that goes with it."""
    from transformers import CONFIG_MAPPING

    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": spec.max_position,
        "tie_word_embeddings": False,
        "dtype": spec.dtype,
        **special_ids,
    }
    return CONFIG_MAPPING[spec.family](**{**common, **_of_family(spec)})


def _of_family(spec: CheckpointSpec) -> dict[str, Any]:
    dense = {"intermediate_size": 2 * spec.intermediate}
    routed = {"num_experts_per_tok": spec.top_k}
    if spec.family == "qwen3_moe":
        sizes = {"moe_intermediate_size": spec.intermediate, "head_dim": spec.head_dim}
        return {**dense, **routed, **sizes, "num_experts": spec.num_experts, "norm_topk_prob": True}
    if spec.family == "qwen2_moe":
        sizes = {"moe_intermediate_size": spec.intermediate, "shared_expert_intermediate_size": spec.intermediate}
        return {**dense, **routed, **sizes, "num_experts": spec.num_experts}
    if spec.family == "deepseek_v3":
        return {**dense, **routed, **_deepseek(spec)}
    if spec.family == "qwen3":
        return {**dense, "head_dim": spec.head_dim}
    # The rest call an expert's size intermediate_size, having no other feed-forward layers.
    own = {"intermediate_size": spec.intermediate}
    if spec.family == "olmoe":
        return {**routed, **own, "num_experts": spec.num_experts}
    if spec.family in ("mixtral", "granitemoe"):
        return {**routed, **own, "num_local_experts": spec.num_experts}
    if spec.family == "gpt_oss":
        rope = {**_yarn(spec, rope_theta=150000.0, truncate=False), "sliding_window": 128}
        return {**routed, **own, **rope, "num_local_experts": spec.num_experts, "head_dim": spec.head_dim}
    raise DwdpError(f"family {spec.family!r} has no config here")


def _deepseek(spec: CheckpointSpec) -> dict[str, Any]:
    groups = _expert_groups(spec)
    return {
        "moe_intermediate_size": spec.intermediate,
        "n_routed_experts": spec.num_experts,
        "n_shared_experts": 1,
        "first_k_dense_replace": spec.dense_layers,
        "n_group": groups,
        "topk_group": max(1, groups // 2),
        # Both are real checkpoints' values that transformers' class no longer knows. Without them vLLM does not load
        # the correction bias, and says nothing.
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_key_value_heads": spec.num_heads,
        "q_lora_rank": 128,  # a whole FP8 block: vLLM joins it with the others
        "qk_nope_head_dim": spec.head_dim,
        "v_head_dim": spec.head_dim,
        "num_nextn_predict_layers": 0,
        **MLA_SIZES,
        # As real checkpoints have it. Plain positions would take vLLM's CPU kernel for them, which expects the heads of
        # a token side by side: MLA passes parts of heads, and what comes out depends on the rest of the batch.
        **_yarn(spec, rope_theta=10000.0, mscale=1.0, mscale_all_dim=1.0),
    }


def _expert_groups(spec: CheckpointSpec) -> int:
    """Two groups of which one is searched, where each can hold a token's experts; scoring a group takes two of them."""
    size, odd = divmod(spec.num_experts, 2)
    return 2 if not odd and size >= max(2, spec.top_k) else 1


def _yarn(spec: CheckpointSpec, **more: float | bool) -> dict[str, Any]:
    """YaRN that doubles the context, so that factor and max_position_embeddings agree."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0}
    return {"rope_parameters": {**yarn, "original_max_position_embeddings": spec.max_position // 2, **more}}
