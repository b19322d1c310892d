"""Made checkpoints look like those of the hub, byte for byte the same each time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from safetensors import safe_open

from examples.checkpoints import FAMILIES, CheckpointSpec, expert_tensors, hot_experts, write_checkpoint
from vllm_dwdp.errors import DwdpError

ROOT = Path(__file__).resolve().parents[2]
Checkpoint = Callable[..., Path]
MOE = [name for name in FAMILIES if name != "qwen3"]


def names(path: Path) -> set[str]:
    found: set[str] = set()
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            found |= set(f.keys())
    return found


def load(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize(
    ("family", "first"),
    [
        ("qwen3_moe", "model.layers.0.mlp.experts.0.gate_proj.weight"),
        ("qwen2_moe", "model.layers.0.mlp.experts.0.gate_proj.weight"),
        ("olmoe", "model.layers.0.mlp.experts.0.gate_proj.weight"),
        ("deepseek_v3", "model.layers.1.mlp.experts.0.gate_proj.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
    ],
)
def test_experts_lie_on_disk_one_by_one(checkpoint: Checkpoint, family: str, first: str) -> None:
    spec = CheckpointSpec(family=family)
    found = names(checkpoint(family=family))
    assert first in found
    # The pattern by which vLLM's reader knows experts that it may skip.
    single = [name for name in found if re.search(r"\.experts\.(\d+)\.", name)]
    assert len(single) == spec.num_moe_layers * spec.num_experts * 3
    assert not any("gate_up_proj" in name for name in found)


@pytest.mark.parametrize(
    ("family", "fused", "gate_up", "shape"),
    [
        ("qwen3_moe", True, "model.layers.0.mlp.experts.gate_up_proj", (8, 256, 128)),
        ("mixtral", True, "model.layers.0.block_sparse_moe.experts.w13", (8, 256, 128)),
        ("granitemoe", False, "model.layers.0.block_sparse_moe.input_linear.weight", (8, 256, 128)),
        ("gpt_oss", False, "model.layers.0.mlp.experts.gate_up_proj", (8, 128, 256)),
    ],
)
def test_fused_experts_lie_in_one_tensor(
    checkpoint: Checkpoint, family: str, fused: bool, gate_up: str, shape: tuple[int, ...]
) -> None:
    tensors = load(checkpoint(family=family, fused=fused))
    assert tuple(tensors[gate_up].shape) == shape
    assert not any(re.search(r"\.experts\.\d", name) for name in tensors)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_both_layouts_hold_the_same_experts(checkpoint: Checkpoint, family: str) -> None:
    single = list(expert_tensors(checkpoint(family=family)))
    fused = list(expert_tensors(checkpoint(family=family, fused=True)))
    assert len(single) == len(fused) > 0
    for a, b in zip(single, fused, strict=True):
        assert a[:2] == b[:2]
        assert torch.equal(a.w13, b.w13)
        assert torch.equal(a.w2, b.w2)


@pytest.mark.parametrize("family", MOE)
def test_experts_fill_whole_pages_and_differ(checkpoint: Checkpoint, family: str) -> None:
    spec = CheckpointSpec(family=family)
    experts = list(expert_tensors(checkpoint(family=family)))
    assert [(e.layer, e.expert) for e in experts] == [
        (layer, expert) for layer in range(spec.first_moe_layer, spec.num_layers) for expert in range(spec.num_experts)
    ]
    seen = set()
    for e in experts:
        assert tuple(e.w13.shape) == (2 * spec.intermediate, spec.hidden)
        assert tuple(e.w2.shape) == (spec.hidden, spec.intermediate)
        assert (e.w13.nbytes, e.w2.nbytes) == spec.expert_bytes
        assert e.w13.nbytes % 4096 == 0 and e.w2.nbytes % 4096 == 0
        seen.add(e.w13.float().sum().item())
    assert len(seen) == len(experts)


def test_gpt_oss_has_visible_biases_and_sinks(checkpoint: Checkpoint) -> None:
    path = checkpoint(family="gpt_oss")
    expert = next(expert_tensors(path))
    assert expert.w13_bias is not None and expert.w2_bias is not None
    assert expert.w13_bias.float().std() > 0.05 and expert.w2_bias.float().std() > 0.05
    assert expert.w13_bias.nbytes + expert.w2_bias.nbytes < 0.01 * (expert.w13.nbytes + expert.w2.nbytes)
    assert load(path)["model.layers.0.self_attn.sinks"].float().std() > 0.1


@pytest.mark.parametrize(("experts", "groups"), [(8, 2), (7, 1), (2, 1)])
def test_deepseek_routes_in_groups_with_a_correction(checkpoint: Checkpoint, experts: int, groups: int) -> None:
    path = checkpoint(family="deepseek_v3", num_experts=experts, num_layers=3)
    config = json.loads((path / "config.json").read_text())
    assert (config["topk_method"], config["scoring_func"]) == ("noaux_tc", "sigmoid")
    assert (config["n_group"], config["topk_group"], config["first_k_dense_replace"]) == (groups, 1, 1)
    # vLLM's CPU kernel for plain positions reads MLA's parts of heads wrongly; real checkpoints have YaRN, too.
    assert config["rope_parameters"]["rope_type"] == "yarn"
    bias = load(path)["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert bias.abs().min() > 0


def test_dense_family_has_no_experts(checkpoint: Checkpoint) -> None:
    path = checkpoint(family="qwen3")
    assert not any("expert" in name for name in names(path))
    assert list(expert_tensors(path)) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_that_of_every_weight(checkpoint: Checkpoint, dtype: str) -> None:
    path = checkpoint(dtype=dtype, num_layers=1)
    assert {t.dtype for t in load(path).values()} == {getattr(torch, dtype)}
    assert json.loads((path / "config.json").read_text())["dtype"] == dtype


def test_same_spec_gives_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    a, b = (write_checkpoint(CheckpointSpec(num_layers=1), tmp_path / name) for name in "ab")
    other = write_checkpoint(CheckpointSpec(num_layers=1, seed=1), tmp_path / "c")
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name
    assert (a / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert (a / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_layers_are_the_same_whatever_their_number(checkpoint: Checkpoint) -> None:
    small, large = load(checkpoint(num_layers=1)), load(checkpoint())
    assert all(torch.equal(tensor, large[name]) for name, tensor in small.items())


def test_writing_again_keeps_what_is_there_and_another_spec_replaces_it(tmp_path: Path) -> None:
    path = write_checkpoint(CheckpointSpec(num_layers=1), tmp_path / "model")
    before = (path / "model.safetensors").stat().st_mtime_ns
    write_checkpoint(CheckpointSpec(num_layers=1), path)
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    write_checkpoint(CheckpointSpec(num_layers=1, num_experts=4), path)
    assert json.loads((path / "config.json").read_text())["num_experts"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(DwdpError, match="choose another folder"):
        write_checkpoint(CheckpointSpec(num_layers=1), tmp_path)
    assert (tmp_path / "precious.txt").exists()


def test_shards_come_with_an_index(checkpoint: Checkpoint) -> None:
    path = checkpoint(shard_mib=0.5)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert set(index["weight_map"]) == names(path)
    whole = load(checkpoint())
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load(path).items())


def test_tokenizer_reads_back_any_text(checkpoint: Checkpoint) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    assert len(tokenizer) == 512
    for text in ["The capital of France is Paris.", '{"a": [1, 2.5, null]}\n', "naïve 日本 🙂"]:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert max(ids) < 512
    assert len(tokenizer("The capital of France is Paris.").input_ids) < 15
    assert None not in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_tokenizer_has_a_chat_template(checkpoint: Checkpoint) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    plain = [{"role": "user", "content": "Hello"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    shown = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in (plain, parts)]
    assert shown[0] == shown[1] == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in tokenizer(shown[0]).input_ids


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"family": "llama"}, "unknown family 'llama'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"hidden": 100}, "hidden is 100"),
        ({"intermediate": 48}, "intermediate is 48"),
        ({"top_k": 9}, "top_k is 9, but there are 8 experts"),
        ({"num_heads": 4, "num_kv_heads": 3}, "4 heads"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0: choose 1 or more"),
        ({"num_layers": -1}, "num_layers is -1: choose 1 or more"),
        ({"head_dim": 0}, "head_dim is 0: choose 1 or more"),
        ({"shard_mib": float("nan")}, "shard_mib is nan: choose a size above 0"),
        ({"shard_mib": 0.0}, "shard_mib is 0.0: choose a size above 0"),
        ({"experts": "nvfp4", "hidden": 96}, "hidden 96, .*one by one, no fp8, and sizes that are multiples of 64"),
        ({"experts": "ct-mxfp4", "fp8": True}, "fp8 True: needs experts one by one, no fp8"),
        ({"experts": "mxfp4"}, "experts as mxfp4 in family qwen3_moe .*: needs family gpt_oss"),
        ({"experts": "nvfp4", "family": "qwen3"}, "experts as nvfp4 in family qwen3, which has none"),
        ({"router_skew": -1}, "router_skew is -1"),
        ({"family": "deepseek_v3", "dense_layers": 4}, "leave 1 to 3"),
        ({"family": "deepseek_v3", "fused": True}, "no fused experts of family deepseek_v3"),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(DwdpError, match=complaint) as caught:
        CheckpointSpec(**fields)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.checkpoints", str(tmp_path / "m"), "--experts", "4", "--layers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "qwen3_moe" in done.stdout
    refused = subprocess.run([*command, "--hidden", "33"], capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: hidden is 33")


@pytest.mark.parametrize("family", MOE)
def test_a_skewed_router_sends_most_tokens_to_known_experts(checkpoint: Checkpoint, family: str) -> None:
    sizes = {"family": family, "num_experts": 16, "num_layers": 2, "hidden": 64, "intermediate": 32}
    plain, skewed = load(checkpoint(**sizes)), load(checkpoint(**sizes, router_skew=3.0))
    spec = CheckpointSpec(**sizes, router_skew=3.0)  # type: ignore[arg-type]
    changed = sorted(name for name in plain if not torch.equal(plain[name], skewed[name]))
    assert len(changed) == spec.num_moe_layers
    states = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    for layer, name in enumerate(changed, spec.first_moe_layer):
        hot = hot_experts(spec, layer)
        assert len(hot) == 4 and f".layers.{layer}." in name
        shares = []
        for weights in (plain[name], skewed[name]):
            hits = torch.bincount((states @ weights.float().T).topk(2).indices.flatten(), minlength=16)
            shares.append(float(hits[list(hot)].sum() / hits.sum()))
        assert shares[0] < 0.4 and shares[1] > 0.6
    assert len({hot_experts(spec, layer) for layer in range(4)}) == 4


def test_fp8_blocks_come_out_close_to_what_went_in() -> None:
    from examples.checkpoints.fp8 import as_fp8

    weights = {
        "a.q_proj.weight": torch.randn(200, 300),
        "mlp.gate.weight": torch.randn(4, 300),
        "norm.weight": torch.ones(9),
    }
    stored = as_fp8(weights)
    assert set(stored) == {*weights, "a.q_proj.weight_scale_inv"}
    scale = stored["a.q_proj.weight_scale_inv"]
    assert scale.shape == (2, 3) and scale.dtype == torch.float32
    whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300]
    error = (stored["a.q_proj.weight"].float() * whole - weights["a.q_proj.weight"]).abs()
    assert error.max() < 0.07 * weights["a.q_proj.weight"].abs().max()
