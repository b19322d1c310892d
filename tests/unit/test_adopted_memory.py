"""Memory of a rank that returns: it allocates one expert of each layer beside what it adopts, and asks for no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.unit.leftovers import check_message, refusal
from tests.unit.test_adopted import EXPERTS, LAYERS, RANKS, Servers, wrong
from tests.unit.whole_model import Loaded, edited, expert_layers, load
from vllm_dwdp.engine import peers
from vllm_dwdp.engine.peers import found_apart
from vllm_dwdp.group.apart import ApartRendezvous, Loading
from vllm_dwdp.hits_file import Hits
from vllm_dwdp.layers import coverage
from vllm_dwdp.layers.build import BuildApart
from vllm_dwdp.transport.memfd import MemoryFile

pytestmark = pytest.mark.usefixtures("groups")

#: Experts of rank 1.
SHARE = 3


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(family="gpt_oss", num_experts=EXPERTS, num_layers=LAYERS, hidden=128, intermediate=128)


class Peak(TorchDispatchMode):
    """The most bytes that tensors allocated inside of it had at once; slabs are none of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {at: (weak, nbytes) for at, (weak, nbytes) in self._alive.items() if not weak.expired()}
        self.nbytes = max(self.nbytes, sum(nbytes for _, nbytes in self._alive.values()))
        return made


def expert_bytes(loaded: Loaded) -> int:
    return sum(parameter.nbytes for layer in expert_layers(loaded.model).values() for parameter in layer.parameters())


@pytest.mark.parametrize("view", ["inplace", "contiguous"])
def test_a_rank_that_returns_never_has_its_share_twice(model: Path, view: str) -> None:
    servers = Servers(model, view)
    with Peak() as first:
        share = expert_bytes(servers.load(1, None))
    servers.sharing[1].close()
    adopted = servers.adopted()
    with Peak() as again:
        servers.ranks[1] = servers.load(1, adopted)
        built = expert_bytes(servers.ranks[1])
        servers.sharing[1] = servers.share(1)
    assert built * SHARE == share <= servers.sharing[1].slab_bytes
    assert first.nbytes > share and first.nbytes - again.nbytes >= share - built
    plain = load(model, 0, 1)
    assert wrong(plain, servers.ranks[1]) == []
    for sharing in servers.sharing:
        sharing.close()


def test_memory_is_asked_for_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of who adopts, what it builds, and slots; of others that load as well, what they need."""
    asked: list[tuple[float, str]] = []
    monkeypatch.setattr(coverage, "require_memory", lambda nbytes, purpose: asked.append((nbytes, purpose)))
    sizes = []
    for view in ("inplace", "contiguous"):
        for adopted, loading, reading in ((None, 1, 1), ([], 1, 0), ([], 2, 0), ([], 2, 1), (None, 2, 1)):
            apart = BuildApart(adopted, loading, reading, lambda held: None, lambda files: None)  # type: ignore[arg-type]
            sizes.append(expert_bytes(load(model, 1, RANKS, {"weight_view": view, "num_slots": 2}, apart=apart)))
    share, one = sizes[0], sizes[1]
    slots = 2 * one // LAYERS * EXPERTS
    assert one * SHARE == share
    needed = [share, one, 2 * one, share + one, share + one]
    assert [nbytes for nbytes, _ in asked] == needed + [
        nbytes + ranks * slots for nbytes, ranks in zip(needed, (1, 1, 2, 2, 2), strict=True)
    ]
    assert [purpose.partition(" with")[0] for _, purpose in asked[:2]] == [
        "dwdp: 1 ranks",
        "dwdp: 1 ranks that adopt theirs",
    ]


def test_files_of_all_peers_stay_open_where_ranks_come_and_go(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(coverage, "require_descriptors", lambda count, purpose: asked.append(count))
    for apart in (None, BuildApart(None, 1, 1, lambda held: None, lambda files: None)):
        load(model, 1, RANKS, {"weight_view": "inplace"}, apart=apart)
    assert asked[1] - asked[0] == LAYERS * RANKS - (LAYERS + RANKS) > 0


def test_slots_have_room_for_the_largest_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(coverage, "require_memory", lambda nbytes, purpose: asked.append(nbytes))

    def layer(nbytes: int) -> Any:
        module = SimpleNamespace(parameters=lambda: [SimpleNamespace(nbytes=nbytes)])
        return SimpleNamespace(module=module, placement=SimpleNamespace(num_experts=4, shares=[[0, 1], [2, 3]]))

    build = SimpleNamespace(layers=[layer(16), layer(48)], config=SimpleNamespace(num_slots=2), rank=0, group_size=2)
    vars(build).update(loading=2, reading=2, apart=None, expects_pages=False, built=lambda layer: (0, 1))
    coverage.check_memory(build)  # type: ignore[arg-type]
    assert asked == [2 * (16 + 48) + 2 * 2 * (4 * 24)]


@pytest.mark.parametrize("adopted", [None, []])
def test_who_adopts_is_counted_as_one_that_does(adopted: list[Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ApartRendezvous, "adopt", lambda self: adopted)
    monkeypatch.setattr(ApartRendezvous, "loading", lambda self, adopts: Loading(3, 1 + (not adopts)))
    found = found_apart(object.__new__(ApartRendezvous), on_cpu=True)
    assert found is not None and (found.adopted, found.loading, found.copies) == (adopted, 3, False)
    assert found.reading == (2 if adopted is None else 1)


@pytest.mark.parametrize(("rank", "on_cpu", "copies"), [(2, False, True), (2, True, False), (1, False, False)])
def test_an_extra_rank_on_a_gpu_has_a_copy(
    rank: int, on_cpu: bool, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    looked: list[Any] = []
    monkeypatch.setattr(peers, "_gpus", lambda: ("GPU-a", ()))
    monkeypatch.setattr(peers, "check_reach", lambda *given: looked.append(given[1:]) or asked == [] or pytest.fail())
    monkeypatch.setattr(ApartRendezvous, "adopt", lambda self: asked.append(self.rank))
    monkeypatch.setattr(ApartRendezvous, "loading", lambda self, adopts: Loading(1, 1))
    rendezvous = object.__new__(ApartRendezvous)
    rendezvous.rank, rendezvous.ranks = rank, [0, 1]
    found = found_apart(rendezvous, on_cpu)
    assert found is not None and found.copies is copies and asked == ([] if copies else [rank])
    # Before memory is asked for.
    assert looked == ([] if on_cpu else [("GPU-a", ())])


def test_shares_that_differ_by_layer(model: Path) -> None:
    """Chosen by hits, and scattered: of each layer another expert is built."""

    class Hot(Servers):
        def load(self, rank: int, adopted: list[MemoryFile] | None, model: Path | None = None) -> Loaded:
            reads = int(adopted is None)
            apart = BuildApart(adopted, 1, reads, lambda held: self.held.update({rank: held}), lambda files: None)
            counts = {
                f"model.layers.{i}.mlp.experts": tuple(9 * (e == i) for e in range(EXPERTS)) for i in range(LAYERS)
            }
            settings = {"weight_view": self.view, "experts_per_rank": 4}
            return load(self.model, rank, RANKS, settings, popularity=Hits(9, counts), apart=apart)

    servers = Hot(model, "contiguous")
    servers.sharing[1].close()
    servers.ranks[1] = servers.load(1, servers.adopted())
    built = [layer.dwdp_share for layer in expert_layers(servers.ranks[1].model).values()]
    assert built == [(0,), (1,), (0,)]
    servers.sharing[1] = servers.share(1)
    plain = load(model, 0, 1)
    for loaded in servers.ranks:
        assert wrong(plain, loaded) == []
    for sharing in servers.sharing:
        sharing.close()


def test_what_its_checkpoint_lacks_is_told(model: Path, tmp_path: Path) -> None:
    """Rows that nothing was loaded into, before anything is compared."""
    servers = Servers(model, "inplace")
    servers.sharing[1].close()
    adopted = servers.adopted()

    def fewer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if not ("layers.2" in name and "down_proj" in name)}

    told = refusal(lambda: servers.load(1, adopted, edited(model, tmp_path / "fewer", fewer)))
    check_message(told, ["no tensor of the checkpoint was loaded into model.layers.2", "w2_weight of 1", ": 2"])
    for file in adopted:
        file.close()
    servers.sharing[0].close()


def test_random_weights_are_found_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn as on a GPU, where all numbers change with how many there are."""

    def draw(tensor: torch.Tensor) -> None:
        if tensor.is_floating_point():
            tensor.data.uniform_(-1e-3, 1e-3, generator=torch.Generator().manual_seed(tensor.numel()))

    for module in ("vllm.model_executor.model_loader.dummy_loader", "vllm_dwdp.engine.dummy"):
        monkeypatch.setattr(f"{module}.initialize_single_dummy_weight", draw)

    class Drawn(Servers):
        def load(self, rank: int, adopted: list[MemoryFile] | None, model: Path | None = None) -> Loaded:
            apart = BuildApart(adopted, 1, 0, lambda held: self.held.update({rank: held}), lambda files: None)
            return load(self.model, rank, RANKS, {"weight_view": self.view}, apart=apart, load_format="dummy")

    servers = Drawn(model, "inplace")
    before = [bytes(layer.slab.tensor().numpy().tobytes()) for layer in servers.sharing[1].layers]
    servers.sharing[1].close()
    servers.ranks[1] = servers.load(1, servers.adopted())
    servers.sharing[1] = servers.share(1)
    assert [bytes(layer.slab.tensor().numpy().tobytes()) for layer in servers.sharing[1].layers] == before
    for sharing in servers.sharing:
        sharing.close()
