"""Experts placed by popularity: what is refused before anything starts, and what each rank then reads of a checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from tests.unit.leftovers import TINY, build, check_message, refusal
from tests.unit.whole_model import as_bytes, edited, expert_layers, load
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import popularity
from vllm_dwdp.engine.popularity import with_hits_file
from vllm_dwdp.group.launch import launch_of
from vllm_dwdp.hits_file import Hits, read_hits, write_hits
from vllm_dwdp.layers.build import ModelBuild, numbers_in
from vllm_dwdp.layers.read_stats import READ, ReadStats

EXPERTS, LAYERS, SHARE = 8, 3, 6
SIZES: dict[str, Any] = {**TINY, "num_layers": LAYERS, "num_experts": EXPERTS}
EXPERT_BYTES = 3 * 32 * 32 * 2
#: Of the other rank's four experts two are hit, others in each layer.
HOT = {0: (4, 7, 0, 3), 1: (5, 6, 1, 2), 2: (6, 7, 2, 3)}
SETTINGS = {"experts_per_rank": SHARE}


def hits(name: str = "model.layers.{}.mlp.experts", experts: int = EXPERTS, layers: int = LAYERS) -> Hits:
    return Hits(9, {name.format(i): tuple(int(e in HOT[i % 3]) for e in range(experts)) for i in range(layers)})


def share(layer: int, rank: int) -> set[int]:
    base = set(range(4)) if rank == 0 else set(range(4, 8))
    return base | set(HOT[layer])


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    def write(made: Hits) -> str:
        path = str(tmp_path / "hits.json")
        write_hits(path, "dwdp-a", "model", 0, made)
        return path

    return write


@pytest.fixture(scope="module")
def moe(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(family="qwen3_moe", **SIZES)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("made", "settings", "words"),
    [
        (hits(), {}, ["beyond E/N", "there are none", "raise dwdp.experts_per_rank"]),
        (hits(), {"experts_per_rank": 4}, ["experts_per_rank is 4 of 8 on 2 ranks", "raise it"]),
        (hits(), {"weight_view": "inplace", **SETTINGS}, ['"inplace"', "auto or contiguous"]),
        (hits(experts=7), SETTINGS, ["7 experts for model.layers.0.mlp.experts", "has 8", "this model"]),
        (hits(layers=4), SETTINGS, ["4 MoE layers", "has 3 layers", "this model"]),
        (None, SETTINGS, ["gone.json", "cannot be read"]),
    ],
)
def test_refusals(
    moe: Path, written: Callable[..., str], made: Hits | None, settings: dict[str, Any], words: list[str]
) -> None:
    path = "gone.json" if made is None else written(made)
    config = {"dwdp": {"popularity": path, **settings}}
    check_message(refusal(lambda: build(moe, additional_config=config)), ["dwdp.popularity", *words])


@pytest.mark.usefixtures("nothing_left")
def test_a_file_of_hits_that_cannot_be_written(moe: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone" / "hits.json"):
        message = refusal(lambda path=path: build(moe, additional_config={"dwdp": {"hits": str(path)}}))  # type: ignore[misc]
        check_message(message, [f"dwdp.hits is {path}", "folder of yours"])


def test_a_device_or_a_pipe_is_not_replaced_and_a_link_is_followed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "hits.json")
    for path in ("/dev/null", str(tmp_path / "pipe")):
        message = refusal(lambda path=path: with_hits_file(DwdpConfig(hits=path)))  # type: ignore[misc]
        check_message(message, [f"dwdp.hits is {path}", "folder of yours"])
    for name in ("link", "hits.json"):
        assert with_hits_file(DwdpConfig(hits=str(tmp_path / name))).hits == str(tmp_path / "hits.json")


@pytest.mark.usefixtures("nothing_left")
def test_ranks_get_what_the_front_end_read(
    moe: Path, written: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(popularity.logger, "info", lambda text, *words: told.append(text % words))
    path = written(hits())
    monkeypatch.chdir(Path(path).parent)
    made = build(moe, additional_config={"dwdp": {"popularity": "hits.json", "hits": "hits.json", **SETTINGS}})
    launch = launch_of(made)
    assert launch is not None and launch.popularity == hits()
    # Workers may run in another folder.
    assert launch.config.hits == path
    assert "dwdp: popularity scatters experts over pages: weight_view auto is contiguous" in told


def test_numbers_tell_layers_apart() -> None:
    assert numbers_in("model.layers.3.mlp.experts") == numbers_in("language_model.h.3.moe.experts.17.w1.weight") == (3,)
    assert numbers_in("blocks.1.layers.3.mlp.experts.gate_up_proj") == (1, 3)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, groups: None) -> ReadStats:
    monkeypatch.setattr(ModelBuild, "_current", None)
    monkeypatch.setattr(READ, "__dict__", ReadStats().__dict__)
    return READ


def check_rows(loaded: Any, plain: Any, rank: int) -> None:
    """Every expert of every share has plain vLLM's bytes."""
    whole, seen = expert_layers(plain.model), 0
    for index, (name, module) in enumerate(expert_layers(loaded.model).items()):
        assert module.dwdp_share == tuple(sorted(share(index, rank)))
        for tensor, parameter in module.named_parameters():
            expected = as_bytes(getattr(whole[name], tensor))
            assert torch.equal(as_bytes(parameter), expected[list(module.dwdp_share)])
            seen += 1
    assert seen >= 2 * LAYERS


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fused", [False, True])
def test_no_expert_is_read_that_the_layer_does_not_hold(
    rank: int, fused: bool, checkpoint: Callable[..., Path], read: ReadStats
) -> None:
    model = checkpoint(family="qwen3_moe", fused=fused, **SIZES)
    loaded = load(model, rank, 2, SETTINGS, popularity=hits())
    assert read.expert_bytes == LAYERS * SHARE * EXPERT_BYTES
    # Of all layers together the rank holds every expert, which is what names of experts alone would have it read.
    assert loaded.build.local_experts() == set(range(EXPERTS))
    check_rows(loaded, load(model, 0, 1), rank)


def test_a_loader_that_is_shown_single_experts(checkpoint: Callable[..., Path], read: ReadStats) -> None:
    model = checkpoint(family="gpt_oss", **SIZES)
    loaded = load(model, 1, 2, SETTINGS, popularity=hits())
    biases = (2 * 32 + 32) * 2
    assert read.expert_bytes == LAYERS * SHARE * (EXPERT_BYTES + biases)
    check_rows(loaded, load(model, 0, 1), 1)


def test_layers_under_other_numbers_are_read_for_any_layer(
    moe: Path, tmp_path: Path, read: ReadStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapper of the model may renumber what it reads: then names do not tell which layer's experts are wanted."""
    from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

    copy = edited(moe, tmp_path / "copy", lambda tensors: {_renumbered(name, 1): t for name, t in tensors.items()})
    load_weights = Qwen3MoeForCausalLM.load_weights
    monkeypatch.setattr(
        Qwen3MoeForCausalLM,
        "load_weights",
        lambda self, weights: load_weights(self, ((_renumbered(name, -1), tensor) for name, tensor in weights)),
    )
    loaded = load(copy, 0, 2, SETTINGS, popularity=hits())
    assert read.expert_bytes == LAYERS * EXPERTS * EXPERT_BYTES
    monkeypatch.undo()
    check_rows(loaded, load(moe, 0, 1), 0)


def _renumbered(name: str, by: int) -> str:
    return re.sub(r"(?<=\.layers\.)\d+", lambda number: str(int(number[0]) + by), name)


def test_a_model_that_was_not_counted(moe: Path, read: ReadStats) -> None:
    other = hits("model.layers.{}.moe.experts")
    message = refusal(lambda: load(moe, 0, 2, SETTINGS, popularity=other))
    check_message(message, ["no layer model.layers.0.mlp.experts", "model.layers.0.moe.experts", "this model"])
    assert read.expert_bytes == 0


def test_what_a_launch_writes_is_what_the_next_one_reads(written: Callable[..., str]) -> None:
    assert read_hits(written(hits())) == hits()
