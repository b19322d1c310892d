"""The ring's cyclic lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.prefetch.ring import Ring

rings = st.builds(Ring, st.integers(1, 70), st.integers(2, 6))


@given(rings)
def test_every_list_cycles_through_exactly_the_layers_of_its_slot(ring: Ring) -> None:
    for slot in range(ring.used_slots):
        mine = [layer for layer in range(ring.num_layers) if ring.slot_of(layer) == slot]
        assert mine[0] == slot
        if len(mine) == 1:
            assert ring.next_layer(slot) is None
            continue
        layer, seen = slot, []
        for _ in mine:
            seen.append(layer)
            following = ring.next_layer(layer)
            assert following is not None
            layer = following
        assert seen == mine and layer == slot


@given(rings)
def test_a_layer_is_followed_by_one_of_its_own_slot(ring: Ring) -> None:
    for layer in range(ring.num_layers):
        following = ring.next_layer(layer)
        assert following is None or (following != layer and ring.slot_of(following) == ring.slot_of(layer))


def test_examples() -> None:
    ring = Ring(3, 2)
    assert [ring.slot_of(layer) for layer in range(3)] == [0, 1, 0]
    assert [ring.next_layer(layer) for layer in range(3)] == [2, None, 0]
    assert Ring(58, 3).next_layer(57) == 0 and Ring(58, 3).next_layer(56) == 2
    assert Ring(1, 4).used_slots == 1 and Ring(1, 4).next_layer(0) is None


def test_refusals() -> None:
    for layers, slots in [(0, 2), (4, 1)]:
        with pytest.raises(DwdpError, match=f"ring of {layers} layers and {slots} slots"):
            Ring(layers, slots)
