"""The ring: which slot serves which layer, and which layer a slot is filled with next (pure).

Layer i lives in slot i % n for ever, so that addresses stay fixed per layer, as CUDA graphs need. Slot s owns the
cyclic list of layers s, s + n, s + 2n, ...: after a layer comes the next of its own list, across the forward's end.

The obvious scheme, layer (i + n) % L after layer i, is wrong whenever L > n and L % n != 0: (i + n) % L then lies in
another slot than i, whose layer may still be in use. With the lists two layers that follow
each other at the seam may share a slot; the second pull is then exposed, and never wrong.
"""

from dataclasses import dataclass

from vllm_dwdp.errors import DwdpError


@dataclass(frozen=True)
class Ring:
    """The cyclic lists of layers 0..num_layers-1 over at most num_slots slots; spare slots are not used."""

    num_layers: int
    num_slots: int

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_slots < 2:
            raise DwdpError(
                f"a ring of {self.num_layers} layers and {self.num_slots} slots: it needs >= 1 MoE layer and >= 2 slots"
            )

    @property
    def used_slots(self) -> int:
        """n: the slots that hold a layer, and that need memory."""
        return min(self.num_slots, self.num_layers)

    def slot_of(self, layer: int) -> int:
        """The slot that serves `layer`."""
        return layer % self.used_slots

    def next_layer(self, layer: int) -> int | None:
        """The layer that follows `layer` in its slot; None where the slot serves only that, so never pulls again."""
        following = layer + self.used_slots
        if following >= self.num_layers:
            following = self.slot_of(layer)
        return None if following == layer else following
