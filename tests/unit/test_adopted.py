"""A rank that returns: its layers compute from the slabs of its last life, which another rank has open.

vLLM's own layers, loaded and processed by vLLM from a gpt-oss checkpoint (biases are replicated), 5 experts on 2 ranks.
The ranks are threads of this process; what a killed process leaves is in test_positions.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from safetensors.torch import load_file

from tests.unit.helpers import descriptors, dies_of_a_fault, slab_maps
from tests.unit.leftovers import check_message, refusal
from tests.unit.meeting import Meeting
from tests.unit.whole_model import Loaded, as_bytes, edited, expert_layers, load
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.group.checkpoint import fingerprint
from vllm_dwdp.layers import coverage
from vllm_dwdp.layers.build import BuildApart
from vllm_dwdp.layers.read_stats import READ
from vllm_dwdp.layers.sharing import ExpertSharing
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.memfd import MemoryFile, keep_file

pytestmark = pytest.mark.usefixtures("groups")

RANKS, EXPERTS, LAYERS, TOKENS = 2, 5, 3, 7
LAUNCH: Any = SimpleNamespace(group_of=lambda rank: list(range(RANKS)), cores=())
Handles = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(family="gpt_oss", num_experts=EXPERTS, num_layers=LAYERS, hidden=128, intermediate=128)


@pytest.fixture(scope="module")
def plain(model: Path) -> Loaded:
    return load(model, 0, 1)


class Servers:
    """Two ranks, each with what it told the group to hold; `files` of the checkpoint that they were asked to compare."""

    def __init__(self, model: Path, view: str) -> None:
        self.model, self.view, self.meeting = model, view, Meeting()
        self.held: dict[int, Handles] = {}
        self.files: list[list[str]] = []
        self.ranks = [self.load(rank, None) for rank in range(RANKS)]
        with ThreadPoolExecutor(RANKS) as pool:
            self.sharing = list(pool.map(self.share, range(RANKS)))

    def load(self, rank: int, adopted: list[MemoryFile] | None, model: Path | None = None) -> Loaded:
        reads = int(adopted is None)
        apart = BuildApart(
            adopted, 1, reads, lambda held: self.held.update({rank: held}), lambda f: self.files.append(list(f))
        )
        return load(model or self.model, rank, RANKS, {"weight_view": self.view}, apart=apart)

    def adopted(self) -> list[MemoryFile]:
        """What rank 1 has left and rank 0 has open."""
        return [keep_file(Handle.from_dict(handle), "an adopted slab") for handle in self.held[0][1]]

    def share(self, rank: int, position: int | None = None) -> ExpertSharing:
        made = ExpertSharing(self.ranks[rank].build, self.meeting.of(rank if position is None else position), LAUNCH)
        made.start()
        return made


@pytest.fixture(params=["inplace", "contiguous"])
def servers(request: pytest.FixtureRequest, model: Path) -> Iterator[Servers]:
    gc.collect()
    before = descriptors(), slab_maps()
    found = Servers(model, request.param)
    yield found
    for sharing in found.sharing:
        sharing.close()
    assert descriptors() == before[0]


def wrong(plain: Loaded, shared: Loaded) -> list[tuple[str, str, int]]:
    """Experts that are not plain vLLM's."""
    found = []
    layers = zip(expert_layers(plain.model).items(), expert_layers(shared.model).values(), strict=True)
    for i, ((layer, expected), mine) in enumerate(layers):
        mine.dwdp_gate.acquire(i, TOKENS)
        for name, parameter in expected.named_parameters():
            rows = as_bytes(mine.get_parameter(name))
            found += [(layer, name, e) for e in range(EXPERTS) if not torch.equal(rows[e], as_bytes(parameter)[e])]
        mine.dwdp_gate.release(i, TOKENS)
    return found


def test_a_rank_that_returns_computes_from_what_it_left(servers: Servers, plain: Loaded) -> None:
    first, second = servers.sharing
    assert servers.files == [[str(servers.model / "model.safetensors")]] * RANKS
    held = servers.held[0][1]
    assert len(held) == LAYERS and servers.held[1][0] != held
    inodes = [layer.slab.handle.payload["inode"] for layer in second.layers]  # type: ignore[attr-defined]
    assert [handle["payload"]["inode"] for handle in held] == inodes
    # The descriptors are not the owner's: it may go.
    second.close()
    read = READ.expert_bytes
    servers.ranks[1] = servers.load(1, servers.adopted())
    # Of 2 or 3 experts one was read, in each layer.
    assert 0 < READ.expert_bytes - read <= (read / 2) / 2
    servers.sharing[1] = servers.share(1)
    for loaded in servers.ranks:
        assert wrong(plain, loaded) == []
    again = [layer.slab.handle.payload["inode"] for layer in servers.sharing[1].layers]  # type: ignore[attr-defined]
    assert again == inodes
    assert servers.sharing[1].counters.snapshot().peers_alive == 1
    # What the first has open it has from then on, whoever else comes and goes.
    servers.sharing[1].close()
    assert wrong(plain, servers.ranks[0]) == [] and first.layers


def test_an_extra_rank_computes_from_the_share_of_another_that_lives(servers: Servers, plain: Loaded) -> None:
    first = servers.sharing[0]
    mine = servers.held[0][0]
    files = [keep_file(Handle.from_dict(handle), "an adopted slab") for handle in mine]
    read = READ.expert_bytes
    servers.ranks.append(servers.load(0, files))
    assert 0 < READ.expert_bytes - read <= (read / 2) / 2
    servers.sharing.append(servers.share(2, position=2))
    extra = servers.sharing[2]
    assert [file.handle.payload["inode"] for file in files] == [handle["payload"]["inode"] for handle in mine]
    counted = extra.counters.snapshot()
    assert (counted.rank, counted.peers_alive, first.counters.snapshot().peers_alive) == (2, 2, 1)
    # The owner may go: what the extra one has it passes on.
    first.close()
    assert wrong(plain, servers.ranks[2]) == []
    assert {rank: len(handles) for rank, handles in servers.held[0].items()} == {0: LAYERS, 1: LAYERS}


def test_an_adopted_slab_cannot_be_written(servers: Servers) -> None:
    handle = Handle.from_dict(servers.held[0][1][0])
    code = (
        "slab = ShmTransport().adopt_slab(keep_file(handles[0], 'it'))\n"
        "print('before', flush=True)\nctypes.memset(slab.address, 1, 1)\n"
    )
    assert dies_of_a_fault(code + "print('after')", handle)


def test_another_checkpoint_or_model_is_not_adopted(servers: Servers, tmp_path: Path) -> None:
    servers.sharing[1].close()
    files = servers.adopted()

    def bits_turned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: -tensor if "layers.1" in name and "down_proj" in name else tensor for name, tensor in tensors.items()
        }

    other = edited(servers.model, tmp_path / "other", bits_turned)
    servers.ranks[1] = servers.load(1, files, other)
    told = refusal(lambda: servers.share(1))
    check_message(
        told, ["layers.1", "of the checkpoint is not what the group holds", "start all ranks of the group again"]
    )
    servers.ranks[1] = servers.load(1, files[:-1])
    check_message(refusal(lambda: servers.share(1)), [f"holds {LAYERS - 1} slabs", f"has {LAYERS} MoE layers"])
    short = [replace(file, handle=replace(file.handle, nbytes=4096)) for file in files]
    servers.ranks[1] = servers.load(1, short)
    check_message(refusal(lambda: servers.share(1)), ["MoE layers, one of", "start all ranks of the group again"])
    for file in files[2:]:  # two were adopted before the difference was found, in the second
        file.close()


def test_memory_is_asked_for_by_those_who_have_yet_to_load(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who serve have theirs, which is no longer free. Descriptors are kept for all."""
    asked: list[float] = []
    monkeypatch.setattr(coverage, "require_memory", lambda nbytes, purpose: asked.append(nbytes))
    monkeypatch.setattr(coverage, "require_descriptors", lambda count, purpose: asked.append(count))
    for loading in (2, 1):
        apart = BuildApart(None, loading, loading, lambda held: None, lambda files: None)
        load(model, 0, RANKS, {"weight_view": "inplace"}, apart=apart)
    load(model, 0, RANKS, {"weight_view": "inplace"})
    both, files, one, _, launch, fewer = asked
    assert both == launch == 2 * one and files - fewer == LAYERS * (RANKS - 1) - RANKS


def test_fine_tunes_are_told_apart(model: Path, tmp_path: Path) -> None:
    file = str(model / "model.safetensors")
    found = fingerprint([file])
    assert found == fingerprint([file]) and "1 of" in found["checkpoint files"]
    dense = next(name for name, tensor in load_file(file).items() if ".experts." not in name and tensor.ndim > 1)
    for number, name in enumerate((dense, "experts.down_proj")):

        def tuned(tensors: dict[str, torch.Tensor], name: str = name) -> dict[str, torch.Tensor]:
            return {key: tensor + 1 if key.endswith(name) else tensor for key, tensor in tensors.items()}

        other = fingerprint([str(edited(model, tmp_path / str(number), tuned) / "model.safetensors")])
        assert {key for key in found if found[key] != other[key]} == {"sampled bytes"}
    # Another name of a tensor, or another file.
    renamed = edited(
        model, tmp_path / "renamed", lambda t: {k.replace("down_proj", "down_pr0j"): v for k, v in t.items()}
    )
    assert fingerprint([str(renamed / "model.safetensors")])["safetensors headers"] != found["safetensors headers"]
    pickle = tmp_path / "model.bin"
    pickle.write_bytes(bytes(range(256)) * 256)
    one = fingerprint([str(pickle)])
    pickle.write_bytes(bytes(range(255)) * 256)
    assert fingerprint([str(pickle)]) != one
    assert fingerprint([file, str(pickle)])["checkpoint files"].startswith("2 of")


@pytest.mark.parametrize("header", [b"[]", b'{"a": 5}', b'{"a": {"data_offsets": "no"}}', b"{", b"\xff\xff"])
def test_a_file_that_lost_its_header_is_told(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DwdpError, match=r"model.safetensors cannot be read as a checkpoint .* fetch it again"):
        fingerprint([str(path)])


def test_random_weights_are_compared_too(model: Path) -> None:
    """With none, so that they do not mix with a checkpoint."""
    files: list[list[str]] = []
    apart = BuildApart(None, 1, 1, lambda held: None, lambda found: files.append(list(found)))
    load(model, 0, RANKS, apart=apart, load_format="dummy")
    assert files == [[]] and fingerprint([])["checkpoint files"].startswith("0 of 0 bytes")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "model.safetensors"
    for content in (b"", (1 << 40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[["):
        broken.write_bytes(content)
        with pytest.raises(DwdpError, match=r"model.safetensors cannot be read as a checkpoint .*: fetch it again"):
            fingerprint([str(broken)])
