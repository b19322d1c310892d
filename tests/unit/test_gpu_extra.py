"""An extra rank on a GPU of its own, over simulated CUDA with real pages and sockets: it has a copy of another's share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.cuda_pair import LIMIT_S
from tests.unit.fake_cuda import Machine
from tests.unit.fake_vmm import open_descriptors
from tests.unit.gpu_layers import LAYERS, SHAPES
from tests.unit.gpu_sharing import Group, Meeting, share_on_gpus
from vllm_dwdp.layers.build import BuildApart, ModelBuild
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.kept import keep_slab

RANKS, EXTRA = 2, 2


@pytest.mark.parametrize("view", ["split", "contiguous"])
def test_an_extra_rank_computes_from_a_copy_and_keeps_the_shares_of_others(
    view: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelBuild, "_current", None)
    monkeypatch.setattr("vllm_dwdp.transport.vmm_kept._ENDING_S", 0.0)
    before, said = open_descriptors(), [list[dict[int, list[dict[str, Any]]]]() for _ in range(RANKS + 1)]

    def apart(rank: int) -> BuildApart:
        return BuildApart(
            None, 1, 1, lambda found: said[rank].append(dict(found)), lambda files: None, copies=rank == EXTRA
        )

    group = Group(Machine(num_devices=2), Meeting(RANKS), [])
    share_on_gpus(monkeypatch, view, RANKS, group=group, apart=apart, extras=1, num_slots=2)
    for rank in group.ranks:
        rank.sharing.start()
        rank.forward()
        group.machine.drain()
        assert (rank.compared, rank.wrong) == (LAYERS * len(SHAPES), 0)
    first, second, extra = group.ranks
    assert extra.sharing.slab_bytes == first.sharing.slab_bytes and not extra.build.adopts
    # Its copy is for itself: who returns finds the memory of its own GPU.
    held = said[EXTRA][-1]
    assert [sorted(found[-1]) for found in said] == [[0, 1], [0, 1], [0, 1]]
    mine = [extra.sharing.transport.export_handle(layer.slab).to_dict() for layer in extra.sharing.layers]
    assert not any(handle in found.get(0, []) for found in said[EXTRA] for handle in mine)
    for dead in (first, second):
        group.ranks.remove(dead)
        group.machine.drain()
        dead.sharing.close()
    extra.wrong = extra.compared = 0
    extra.forward()
    group.machine.drain()
    assert (extra.compared, extra.wrong) == (LAYERS * len(SHAPES), 0)
    for rank in range(RANKS):
        kept = [keep_slab(Handle.from_dict(handle), "an adopted slab", LIMIT_S) for handle in held[rank]]
        assert len(kept) == LAYERS
        for slab in kept:
            slab.close()
    extra.sharing.close()
    assert open_descriptors() - before == len(group.machine.allocations)
