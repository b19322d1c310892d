"""What is decided by the class that owns the experts, whatever model is around them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from tests.unit.leftovers import TINY, check_message, refusal
from tests.unit.whole_model import as_bytes, edited, expert_layers, load

pytestmark = pytest.mark.usefixtures("groups")

Tensors = dict[str, torch.Tensor]

DBRX = {
    "architectures": ["DbrxForCausalLM"],
    "model_type": "dbrx",
    "d_model": 32,
    "n_heads": 1,
    "n_layers": 1,
    "max_seq_len": 128,
    "ffn_config": {"moe_num_experts": 4, "ffn_hidden_size": 32, "moe_top_k": 2},
    "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
}


def with_a_score(tensors: Tensors) -> Tensors:
    """As a classifier is published: a head for its labels instead of that for the vocabulary."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head")}
    hidden = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")).shape[1]
    return {**kept, "score.weight": torch.ones(2, hidden, dtype=torch.bfloat16)}


@pytest.mark.parametrize("convert", ["none", "embed", "classify"])
def test_gpt_oss_inside_of_another_model(checkpoint: Callable[..., Path], tmp_path: Path, convert: str) -> None:
    """Every row of both shares is that of plain vLLM."""
    model = checkpoint(family="gpt_oss", **{**TINY, "num_layers": 2, "num_experts": 5})
    arguments = {} if convert == "none" else {"runner": "pooling", "convert": convert}
    if convert == "classify":
        model = edited(model, tmp_path / "classifier", with_a_score)
    plain = load(model, 0, 1, **arguments)
    names = {"none": "GptOssForCausalLM", "embed": "GptOssForEmbedding", "classify": "GptOssForSequenceClassification"}
    assert type(plain.model).__name__ == names[convert]
    compared = 0
    for rank in range(2):
        loaded = load(model, rank, 2, **arguments)
        pairs = zip(expert_layers(plain.model).values(), expert_layers(loaded.model).values(), strict=True)
        for whole, mine in pairs:
            for name, parameter in whole.named_parameters():
                rows = as_bytes(mine.get_parameter(name))
                for row, expert in enumerate(mine.dwdp_share):
                    assert torch.equal(rows[row], as_bytes(parameter)[expert]), (rank, name, expert)
                    compared += 1
    assert compared == 2 * 4 * 5


def test_experts_with_a_loader_that_nobody_has_looked_at(tiny_moe: Path, tmp_path: Path) -> None:
    """DBRX's takes the tensors of all experts at once; refused once the layers exist, before weights are read."""
    model = shutil.copytree(tiny_moe, tmp_path / "dbrx")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **DBRX}))
    message = refusal(lambda: load(model, 0, 2))
    check_message(message, ["DbrxForCausalLM", "DbrxExperts.weight_loader", "all experts at once", "use another model"])
