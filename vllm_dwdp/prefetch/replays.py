"""What a CUDA graph counts: what its capture would have counted, at each replay."""

from typing import Final, NamedTuple

from vllm_dwdp.prefetch.counters import CounterFields


class ReplayCounts(NamedTuple):
    """What one replay adds to the counters of these names; or what stood in them."""

    forwards: int = 0
    layers: int = 0
    pulls: int = 0
    pulled_bytes: int = 0
    local_bytes: int = 0
    unmeasured: int = 0
    on_demand: int = 0

    @classmethod
    def of(cls, page: CounterFields) -> "ReplayCounts":
        """The counters now."""
        return cls(*(getattr(page, name) for name in cls._fields))

    def since(self, before: "ReplayCounts") -> "ReplayCounts":
        """What was added since `before`."""
        return ReplayCounts(*(now - then for now, then in zip(self, before, strict=True)))

    def add_to(self, page: CounterFields) -> None:
        """Add these to the counters."""
        for name, added in zip(self._fields, self, strict=True):
            if added:
                setattr(page, name, getattr(page, name) + added)


NO_LAYERS: Final = ReplayCounts()
