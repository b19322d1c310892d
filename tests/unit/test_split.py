"""The split view's addresses: after a pull every expert is where the table says, in the own slab or in the slot."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm_dwdp.copy_plan import LayerLayout, TensorSpec, build_plan
from vllm_dwdp.layers.build import LayerBuild
from vllm_dwdp.layers.slabs import ExpertTensor, LayerSlab
from vllm_dwdp.layers.views.split import addresses, direct_addresses, slot_bytes, why_not
from vllm_dwdp.placement import place


class Host:
    """Memory of this process, in place of a device's."""

    def __init__(self, nbytes: int) -> None:
        self._buffer = torch.zeros(nbytes, dtype=torch.uint8)
        self.address, self.nbytes = self._buffer.data_ptr(), nbytes

    def tensor(self) -> torch.Tensor:
        return self._buffer


def expert_tensor(name: str, experts: int, row: int) -> ExpertTensor:
    values = torch.arange(experts * row, dtype=torch.int32).view(experts, row) + 1
    parameter = torch.nn.Parameter(values.to(torch.float32), requires_grad=False)
    return ExpertTensor(name, parameter, (row,), row * 4, torch.float32)


@given(
    ranks=st.integers(2, 5),
    more=st.integers(0, 9),
    held=st.none() | st.integers(1, 4),
    rows=st.tuples(*[st.integers(1, 50)] * 2),
)
@settings(deadline=None)
def test_every_expert_is_where_the_table_says(ranks: int, more: int, held: int | None, rows: tuple[int, int]) -> None:
    experts = ranks + 1 + more
    share = None if held is None else min(experts - 1, -(-experts // ranks) + held)
    placement = place(experts, ranks, share)
    tensors = tuple(
        expert_tensor(name, experts, row) for name, row in zip(("w13_weight", "w2_weight"), rows, strict=True)
    )
    slabs: list[Any] = []
    layout = LayerLayout(placement, tuple(TensorSpec(tensor.name, tensor.row_bytes) for tensor in tensors))
    for own in layout.slabs:
        slab = Host(own.nbytes)
        for tensor in tensors:
            rows_of = tensor.view(slab.tensor(), own.begin(tensor.name), len(own.experts))
            rows_of.copy_(tensor.parameter.data[list(own.experts)])
        slabs.append(slab)
    build = LayerBuild(SimpleNamespace(), "layer", placement, False)  # type: ignore[arg-type]
    for rank in range(ranks):
        peers = {peer: slab for peer, slab in enumerate(slabs) if peer != rank}
        layer = LayerSlab(build, tensors, (), layout, slabs[rank], peers)
        slot: Any = Host(slot_bytes([layer], rank))
        plan = build_plan(layout, rank, 64, split=True)
        for item in plan.pulls:
            ctypes.memmove(slot.address + item.dst_offset, slabs[item.source].address + item.src_offset, item.nbytes)
        for tensor in tensors:
            offset = plan.slot.begin(tensor.name)
            found = addresses(layer, rank, tensor.name, slot, plan.slot)
            for expert, address in enumerate(found):
                row = (ctypes.c_float * tensor.row_shape[0]).from_address(address)
                assert list(row) == tensor.parameter.data[expert].tolist()
            outside = [a for a in found if not slot.address <= a < slot.address + slot.nbytes]
            assert len(outside) == len(placement.shares[rank])
            where = direct_addresses(layer, rank, tensor.name)
            loads = [0] * ranks
            for expert, address in enumerate(where):
                row = (ctypes.c_float * tensor.row_shape[0]).from_address(address)
                assert list(row) == tensor.parameter.data[expert].tolist()
                (owner,) = [o for o, slab in enumerate(slabs) if slab.address <= address < slab.address + slab.nbytes]
                assert owner == placement.owners[rank][expert]
                loads[owner] += owner != rank
            # An expert that several hold is read from the one that pulls take it from: owners are as busy either way.
            assert tuple(loads) == placement.loads(rank)
            pulled = [0] * ranks
            for item in plan.pulls:
                if offset <= item.dst_offset < offset + len(placement.missing(rank)) * tensor.row_bytes:
                    pulled[item.source] += item.nbytes
            assert pulled == [count * tensor.row_bytes for count in loads]
            # The resident ones are where the other table has them.
            assert all(where[expert] == found[expert] for expert in placement.shares[rank])


def test_what_has_no_kernel() -> None:
    tensors = (expert_tensor("w13_weight", 4, 8), expert_tensor("w2_weight", 4, 8))
    layer: Any = SimpleNamespace(fetched=tensors, build=SimpleNamespace(module=None))
    assert why_not(layer) is None
    layer.fetched = (*tensors, expert_tensor("w13_bias", 4, 8))
    assert "w13_bias" in str(why_not(layer))
    layer.fetched = tuple(tensor._replace(dtype=torch.int8) for tensor in tensors)
    assert "int8" in str(why_not(layer))
