"""Hits: counted on the device as tokens go through a layer, and kept in one file for all ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import given
from hypothesis import strategies as st
from vllm import forward_context

from tests.unit.leftovers import check_message, refusal
from vllm_dwdp import hits_file
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpTimeout
from vllm_dwdp.hits_file import Hits, add_hits, read_hits, write_hits
from vllm_dwdp.layers import hits as counting
from vllm_dwdp.layers.build import LayerBuild
from vllm_dwdp.layers.gates import register_gate
from vllm_dwdp.layers.hits import HitCounts, count
from vllm_dwdp.layers.routed_experts import DwdpExpertsMixin
from vllm_dwdp.placement import place

EXPERTS, TOP_K = 5, 2
ONE = Hits(3, {"layers.0": (1, 2, 3), "layers.1": (0, 6, 0)})


@pytest.fixture(autouse=True)
def rows_of_a_test() -> Iterator[None]:
    """The product keeps rows as long as its process."""
    yield
    counting._rows.clear()


class Computes:
    """In place of vLLM's class behind the mixin."""

    top_k = TOP_K
    quant_method = SimpleNamespace(is_monolithic=False)

    def forward_modular(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return x + topk_ids.sum()


def nothing(layer: int, tokens: int) -> None:
    """In place of a gate's acquire and release."""


class Layer(DwdpExpertsMixin, Computes):
    """A layer without weights, whose gate waits for nothing."""

    def __init__(self) -> None:
        self.dwdp_layer, self.dwdp_gate = 0, SimpleNamespace(acquire=nothing, release=nothing)
        self._dwdp_number = register_gate(self.dwdp_gate, self.dwdp_layer)


def layers(*experts: int) -> list[LayerBuild]:
    return [LayerBuild(Layer(), f"layers.{i}", place(number, 2), False) for i, number in enumerate(experts)]  # type: ignore[arg-type]


def counted(*experts: int) -> tuple[HitCounts, list[Any]]:
    built = layers(*experts)
    return HitCounts(built, 0, torch.device("cpu")), [layer.module for layer in built]


@given(st.lists(st.lists(st.integers(-1, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K), min_size=1, max_size=20))
def test_every_layer_counts_its_own(ids: list[list[int]]) -> None:
    counts, (first, second) = counted(EXPERTS, EXPERTS + 3)
    x, weights, routed = torch.zeros(1), torch.ones(1), torch.tensor(ids, dtype=torch.int32)
    assert first.forward_modular(x, weights, routed) == first.forward_modular(x, topk_weights=weights, topk_ids=routed)
    second.forward_modular(x=x, topk_weights=weights, topk_ids=routed.long() + (routed >= 0) * 3)
    flat = [expert for row in ids for expert in row]
    once = [flat.count(expert) for expert in range(EXPERTS)]
    found = counts.read()
    assert found.layers == {"layers.0": tuple(2 * n for n in once), "layers.1": (0, 0, 0, *once)}
    assert found.tokens == 2 * sum(once) // TOP_K
    # Rank 0 of two holds experts 0 and 1 of five, and the first four of eight.
    assert counts.summary()["layers.0"] == {"total": 2 * sum(once), "local": 2 * sum(once[:2])}
    assert counts.summary()["layers.1"] == {"total": sum(once), "local": once[0]}
    counts.reset()
    assert counts.read() == Hits(0, {"layers.0": (0,) * EXPERTS, "layers.1": (0,) * (EXPERTS + 3)})


def test_compiled_code_counts_too() -> None:
    """As on vLLM's CPU platform, where the compiler sees through the layer; once compiled, it is not traced again."""
    counts, (layer,) = counted(EXPERTS)

    @torch.compile(fullgraph=True, dynamic=True)
    def forward(x: torch.Tensor, logits: torch.Tensor) -> Any:
        weights, ids = logits.topk(TOP_K)
        return layer.forward_modular(x=x, topk_weights=weights, topk_ids=ids)

    expected = torch.zeros(EXPERTS, dtype=torch.int64)
    for tokens in (4, 7, 4):
        logits = torch.rand(tokens, EXPERTS)
        ids = logits.topk(TOP_K).indices
        assert forward(torch.zeros(1), logits) == ids.sum()
        expected += torch.bincount(ids.flatten(), minlength=EXPERTS)
    assert counts.read().layers["layers.0"] == tuple(expected.tolist())


def test_rows_that_are_no_tokens_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, (layer,) = counted(EXPERTS)
    padding = torch.tensor([False, True, True, True])
    context: Any = SimpleNamespace(is_padding=padding)
    with forward_context.override_forward_context(context):
        count(torch.tensor([[0, 4], [0, 4], [1, 2]]), layer.dwdp_hits)
        context.is_padding = None
        count(torch.tensor([[3, 4]]), layer.dwdp_hits)
    assert counts.read().layers["layers.0"] == (1, 0, 0, 1, 2)


def test_a_kernel_that_routes_by_itself_is_refused() -> None:
    built = layers(EXPERTS)
    built[0].module.quant_method = SimpleNamespace(is_monolithic=True)
    message = refusal(lambda: HitCounts(built, 0, torch.device("cpu")))
    check_message(message, ["dwdp.hits", "layers.0", "routes tokens by itself", "--moe-backend"])


def test_without_the_setting_nothing_is_counted() -> None:
    layer = Layer()
    assert layer.forward_modular(torch.zeros(1), torch.ones(1), torch.tensor([[1, 2]])) == 3
    assert not counting._rows


def test_ranks_share_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "hits.json")
    write_hits(path, "dwdp-a", "model", 0, ONE)
    write_hits(path, "dwdp-a", "model", 1, ONE)
    # A rank replaces what it said before.
    write_hits(path, "dwdp-a", "model", 1, Hits(4, {"layers.0": (1, 0, 0), "layers.1": (0, 0, 9)}))
    assert read_hits(path) == Hits(7, {"layers.0": (2, 2, 3), "layers.1": (0, 6, 9)})
    # Another launch begins anew, also over something else.
    write_hits(path, "dwdp-b", "model", 1, ONE)
    assert read_hits(path) == ONE
    Path(path).write_text("[")
    write_hits(path, "dwdp-b", "model", 1, ONE)
    assert read_hits(path) == ONE and os.listdir(tmp_path) == ["hits.json"]


def _write(path: str, rank: int, barrier: Any) -> None:
    barrier.wait(30)
    write_hits(path, "dwdp-a", "model", rank, Hits(1, {"layers.0": (1, rank)}))


def test_ranks_that_end_at_once_lose_nothing(tmp_path: Path) -> None:
    path, ranks = str(tmp_path / "hits.json"), 8
    spawn = multiprocessing.get_context("fork")
    barrier = spawn.Barrier(ranks)
    processes = [spawn.Process(target=_write, args=(path, rank, barrier)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * ranks
    assert read_hits(path) == Hits(ranks, {"layers.0": (ranks, sum(range(ranks)))})
    assert os.listdir(tmp_path) == ["hits.json"]


def test_a_lock_that_is_held_and_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "hits.json")
    monkeypatch.setattr(hits_file, "LOCK_TIMEOUT_S", 0.05)
    with hits_file._locked(str(tmp_path)):
        check_message(refusal(lambda: write_hits(path, "a", "m", 0, ONE), DwdpTimeout), ["the lock of", str(tmp_path)])
    message = refusal(lambda: write_hits(str(tmp_path / "gone" / "hits.json"), "a", "m", 0, ONE))
    check_message(message, ["cannot write", "No such file", "folder of yours"])


def test_hits_of_a_layer() -> None:
    assert ONE.of("layers.1", 3) == (0, 6, 0)
    check_message(refusal(lambda: ONE.of("layers.2", 3)), ["no layer layers.2", "2 others", "layers.0"])
    check_message(refusal(lambda: ONE.of("layers.1", 4)), ["3 experts for layers.1", "has 4"])
    assert add_hits([ONE, ONE]) == Hits(6, {"layers.0": (2, 4, 6), "layers.1": (0, 12, 0)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, ["is no file of dwdp.hits"]),
        ({"version": 2}, ["version 2", "not 1"]),
        ({"ranks": {}}, ["damaged"]),
        ({"ranks": {"0": {"tokens": 1, "layers": {"a": [1, -1]}}}}, ["damaged"]),
        ({"ranks": {"0": {"tokens": 1, "layers": {"a": [1, "1"]}}}}, ["damaged"]),
        ({"ranks": {"0": {"tokens": 1, "layers": ["a"]}}}, ["damaged"]),
        ({"ranks": {str(r): {"tokens": 1, "layers": {"a": [1] * (r + 1)}} for r in (0, 1)}}, ["damaged"]),
        ({"ranks": {"0": {"tokens": 0, "layers": {"a": [0, 0]}}}}, ["no expert was hit", "while requests are served"]),
        ({"ranks": {"0": {"tokens": 0, "layers": {}}}}, ["no expert was hit"]),
    ],
)  # fmt: skip
def test_files_that_say_nothing(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "hits.json"
    write_hits(str(path), "dwdp-a", "model", 0, ONE)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    check_message(refusal(lambda: read_hits(str(path))), [str(path), *words])


def test_a_file_that_is_too_deep(tmp_path: Path) -> None:
    """Python's parser gives up with a RecursionError; the file is no file of hits, and is written over."""
    path = tmp_path / "hits.json"
    path.write_text("[" * 200_000)
    check_message(refusal(lambda: read_hits(str(path))), [str(path), "is no file of dwdp.hits"])
    write_hits(str(path), "dwdp-a", "model", 0, ONE)
    assert read_hits(str(path)) == ONE


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """Nobody writes to it, so that reading would never end."""
    os.mkfifo(tmp_path / "pipe")
    check_message(refusal(lambda: read_hits(str(tmp_path / "pipe"))), ["is no plain file", "dwdp.hits wrote"])


def test_a_write_that_fails_leaves_the_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hits.json"
    write_hits(str(path), "dwdp-a", "model", 0, ONE)

    def fail(whole: Any, file: Any) -> None:
        file.write("half of ")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_dwdp.hits_file.json.dump", fail)
    check_message(
        refusal(lambda: write_hits(str(path), "dwdp-b", "model", 1, ONE)), [str(path), "No space left on device"]
    )
    assert read_hits(str(path)) == ONE and list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    check_message(refusal(lambda: read_hits(str(tmp_path / "gone"))), ["cannot be read", "No such file", "dwdp.hits"])
    check_message(refusal(lambda: read_hits(str(tmp_path))), ["cannot be read", "directory"])


@pytest.mark.parametrize("key", ["hits", "popularity"])
def test_settings_are_paths(key: str) -> None:
    for value in (3, "", True):
        check_message(
            refusal(lambda value=value: DwdpConfig(**{key: value})), [f"dwdp.{key} is {value!r}", "path of a"]
        )  # type: ignore[misc]
    assert DwdpConfig.parse(DwdpConfig(**{key: "file"}).to_dict()) == DwdpConfig(**{key: "file"})
