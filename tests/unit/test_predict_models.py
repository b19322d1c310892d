"""Reading configs: parameter counts against the published ones, formats, and one clear line for what cannot be read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.model import Attention
from vllm_dwdp.predict.read_config import MODELS, load_model, parse_model

# Billions. Model cards and reports; GLM-4.5's report counts its MTP layer and leaves out embeddings.
PUBLISHED = {
    "DeepSeek-V3": (671.0, 37.0),
    "DeepSeek-V2": (235.7, 21.0),
    "DeepSeek-V2-Lite": (15.7, 2.4),
    "Qwen3-30B-A3B": (30.5, 3.3),
    "Qwen3-235B-A22B": (235.0, 22.0),
    "Qwen2-57B-A14B": (57.41, 14.0),
    "Mixtral-8x7B-v0.1": (46.7, 12.9),
    "Mixtral-8x22B-v0.1": (140.6, 39.0),
    "gpt-oss-120b": (116.83, 5.13),
    "gpt-oss-20b": (20.91, 3.61),
    "Llama-4-Maverick-17B-128E": (400.0, 17.0),
    "OLMoE-1B-7B-0924": (6.92, 1.3),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    model, (total, active) = load_model(name), PUBLISHED[name]
    assert model.total_params / 1e9 == pytest.approx(total, rel=0.005)
    # Cards round active parameters to whole billions, with or without embeddings.
    low, high = sorted((model.active_params, model.active_params - model.embedding_params))
    assert low / 1e9 * 0.98 <= active <= high / 1e9 * 1.02


def test_parameters_counted_in_other_ways() -> None:
    glm, scout, v3 = load_model("GLM-4.5"), load_model("Llama-4-Scout-17B-16E"), load_model("DeepSeek-V3")
    assert (glm.total_params - glm.embedding_params + glm.mtp_params) / 1e9 == pytest.approx(355, rel=0.005)
    assert scout.total_params / 1e9 + 0.87 == pytest.approx(109, rel=0.005), "0.87 B are the vision encoder"
    assert (v3.total_params + v3.mtp_params + v3.embedding_params) / 1e9 == pytest.approx(684.5, rel=0.005)


def test_defaults_of_config_classes_fill_gaps() -> None:
    full = load_model("DeepSeek-V3")
    bare = parse_model({"model_type": "deepseek_v3"}, "bare")
    assert bare.total_params == full.total_params
    assert parse_model({"model_type": "mixtral"}, "bare").total_params == load_model("Mixtral-8x7B-v0.1").total_params
    assert load_model("DeepSeek-V2-Lite").groups[0].attention.q_rank is None, "null is not the default"


@pytest.mark.parametrize(
    ("quant", "experts", "attention", "mlp"),
    [
        (None, "bf16", "bf16", "bf16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block", "fp8_block", "fp8_block"),
        ({"quant_method": "fp8"}, "fp8", "fp8", "fp8"),
        ({"quant_method": "awq", "bits": 4}, "int4", "int4", "int4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*self_attn*"]}, "nvfp4", "bf16", "nvfp4"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, "mxfp4", "bf16", "mxfp4"),
        (
            {
                "quant_method": "compressed-tensors",
                "ignore": ["re:.*self_attn.*", "re:.*shared_experts.*"],
                "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
            },
            "int4",
            "bf16",
            "bf16",
        ),
    ],
)
def test_formats(quant: dict[str, Any] | None, experts: str, attention: str, mlp: str) -> None:
    model = parse_model({"model_type": "deepseek_v3", "quantization_config": quant}, "m")
    assert (model.expert_format.name, model.attention_format.name, model.mlp_format.name) == (experts, attention, mlp)


@pytest.mark.parametrize(
    ("quant", "scales"),
    [
        ({"quant_method": "awq", "bits": 4}, 2 / 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 2.5 / 128),
        ({"quant_method": "awq", "bits": 4, "q_group_size": 32}, 2.5 / 32),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}, 2.5 / 64),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, 3 / 32),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 0),
        ({"num_bits": 4, "type": "int", "group_size": 32}, 2 / 32),
        ({"num_bits": 4, "type": "int", "group_size": 32, "symmetric": False}, 2.5 / 32),
        *(({"num_bits": bits, "type": "int", "group_size": None, "strategy": "channel"}, 0) for bits in (4, 8)),
        ({"num_bits": 4, "type": "float", "group_size": 16}, 1 / 16),
        # Of several groups the one that names the format.
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "a": {"weights": {"num_bits": 6, "type": "float", "group_size": 16}},
                    "b": {"weights": {"num_bits": 4, "group_size": 32}},
                },
            },
            2 / 32,
        ),
    ],
)
def test_scales_are_those_of_the_groups_of_a_checkpoint(quant: dict[str, Any], scales: float) -> None:
    told = (
        quant
        if "quant_method" in quant
        else {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": quant}}}
    )
    assert parse_model({"model_type": "deepseek_v3", "quantization_config": told}, "m").expert_format.scales == scales


def test_known_bytes() -> None:
    r1 = load_model("DeepSeek-R1-FP4")
    assert r1.expert_bytes == 3 * 7168 * 2048 * 0.5625
    assert r1.kv_bytes(1000, 1.0) == 61 * 576 * 1000
    oss = load_model("gpt-oss-120b")
    assert oss.kv_bytes(10_000, 2.0) == 2 * 1024 * (18 * 128 + 18 * 10_000), "half the layers keep 128 tokens"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "llama", "hidden_size": 64}, "no routed experts"),
        ({"model_type": "newmoe", "num_experts": 8, "num_experts_per_tok": 2}, "no hidden_size"),
        ({"model_type": "deepseek_v3", "hidden_size": -1}, "hidden_size of m is -1"),
        ({"model_type": "deepseek_v3", "num_experts_per_tok": 300}, "300 of 256"),
        ({"model_type": "deepseek_v3", "quantization_config": {"quant_method": "magic"}}, "--expert-format"),
        (
            {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 0}},
            "group_size of m is 0",
        ),
        (
            {
                "model_type": "deepseek_v3",
                "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": True},
            },
            "group_size of m is True",
        ),
        ({"model_type": "qwen3_next", "num_experts": 8, "hidden_size": 8, "num_hidden_layers": 2}, ""),
        ({"model_type": "gpt_oss", "layer_types": ["linear_attention"] * 36}, "linear_attention"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(config: dict[str, Any], says: str) -> None:
    with pytest.raises(DwdpError) as caught:
        parse_model(config, "m")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_configs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "mixtral"}))
    assert load_model(str(tmp_path)).experts == load_model(str(config)).experts == 8
    snapshot = tmp_path / "hub" / "models--some--moe" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert load_model("some/moe").experts == 128
    assert load_model("deepseek-ai/DeepSeek-R1").experts == 256
    with pytest.raises(DwdpError, match="give the path"):
        load_model("some/other")
    config.write_text("{")
    with pytest.raises(DwdpError, match="no readable JSON"):
        load_model(str(config))


def test_a_model_of_the_cache_is_the_newest_and_has_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the cache lies on disk: a snapshot for each revision, of links to files that are named by their hashes."""
    folder = tmp_path / "models--some--moe"
    for revision, experts in (("aaa", 8), ("bbb", 16), ("fff", 32)):
        snapshot, blob = folder / "snapshots" / revision, folder / "blobs" / f"of-{revision}"
        snapshot.mkdir(parents=True)
        blob.parent.mkdir(exist_ok=True)
        blob.write_text(json.dumps({"model_type": "mixtral", "num_local_experts": experts}))
        (snapshot / "config.json").symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert (load_model("some/moe").name, load_model("some/moe").experts) == ("some/moe", 32)
    branch = folder / "refs" / "main"
    branch.parent.mkdir()
    branch.write_text("bbb")
    assert (load_model("some/moe").name, load_model("some/moe").experts) == ("some/moe", 16)
    branch.write_text("of which there is no config")
    assert load_model("some/moe").experts == 32
    assert load_model(str(folder / "snapshots" / "aaa")).name == "aaa", "not that of the folder with what is linked to"


def test_configs_are_read_as_transformers_writes_them() -> None:
    """A launch has what the config's class made of the file: Qwen2MoeConfig makes a span that is not used 0."""
    transformers = pytest.importorskip("transformers")
    for path in sorted(MODELS.glob("Qwen*.json")):
        raw = json.loads(path.read_text())
        written = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw).to_dict()
        assert parse_model(written, path.stem) == parse_model(raw, path.stem), path.stem
    assert parse_model({"model_type": "qwen2_moe", "sliding_window": 0}, "m").groups[0].attention.window is None
    with pytest.raises(DwdpError, match="no sliding_window"):
        parse_model({"model_type": "gpt_oss", "sliding_window": 0}, "m")


@given(st.integers(1, 200), st.integers(0, 200), st.none() | st.integers(1, 150))
def test_pairs_are_what_counting_gives(new: int, context: int, window: int | None) -> None:
    attention = Attention(1, 1, 1, 1, window)
    # A token sees itself and those before it; the model counts half of itself, so it may be off by half a token each.
    counted = sum(min(context + i + 1, window or 10**9) for i in range(new))
    assert float(attention.pairs(new, context)) == pytest.approx(counted, abs=new * 1.0)


def test_parts_of_a_prompt_have_the_pairs_of_the_whole() -> None:
    for window in (None, 128):
        attention = Attention(4, 4, 8, 8, window)
        parts = attention.pairs(np.array([1000, 500, 500]), np.array([0, 1000, 1500])).sum()
        assert parts == pytest.approx(float(attention.pairs(2000, 0)))
