"""For contention.py: who pulls from whom, and by which copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

MIB: Final = 1 << 20
#: Of one copy by a kernel: what a program has under way at a time.
PIECE: Final = 64 << 10


class Pattern(NamedTuple):
    """sources(rank, ranks): whom this rank pulls from, nobody where it is empty. in_step: from one after the other, all
    ranks beginning with each at the same time."""

    name: str
    sources: Callable[[int, int], tuple[int, ...]]
    in_step: bool = False

    def phases(self, rank: int, ranks: int) -> tuple[tuple[int, ...], ...]:
        """The sources of each part of a pull that ranks begin together."""
        sources = self.sources(rank, ranks)
        if self.in_step:
            return tuple((source,) for source in sources)
        return (sources,) if sources else ()

    def readers(self, ranks: int) -> tuple[int, ...]:
        """The ranks that pull."""
        return tuple(rank for rank in range(ranks) if self.sources(rank, ranks))


def _others(rank: int, ranks: int) -> tuple[int, ...]:
    return tuple((rank + step) % ranks for step in range(1, ranks))


def _next(rank: int, ranks: int) -> tuple[int, ...]:
    return ((rank + 1) % ranks,)


def _partner(rank: int, ranks: int) -> tuple[int, ...]:
    return (rank ^ 1,) if rank ^ 1 < ranks else ()


ALL: Final = Pattern("all", _others)
RING: Final = Pattern("ring", _next)
PAIRS: Final = Pattern("pairs", _partner)
ONE_WAY: Final = Pattern("one way", lambda rank, ranks: () if rank % 2 else _partner(rank, ranks))
ONE_SOURCE: Final = Pattern("one source", lambda rank, ranks: (0,) if rank else ())
ONE_READER: Final = Pattern("one reader", lambda rank, ranks: () if rank else _others(rank, ranks))
#: The k-th source of a rank is the k-th one behind it: in every phase each rank is read by one.
IN_STEP: Final = Pattern("in step", _others, in_step=True)


class Way(NamedTuple):
    """slice_bytes: None for whole ranges. programs: of a kernel that copies by loads and stores, 0 for one on each
    multiprocessor; None for copy engines."""

    slice_bytes: int | None
    order: Literal["rotated", "in order", "together"] = "rotated"
    pattern: Pattern = ALL
    programs: int | None = None

    @property
    def copies(self) -> str:
        if self.programs is not None:
            return f"{self.programs} programs" if self.programs else "all multiprocessors"
        size = f"{self.slice_bytes // MIB} MiB" if self.slice_bytes else "whole ranges"
        return f"{size}, {self.order}"

    @property
    def name(self) -> str:
        plain = self.pattern is ALL and self.programs is None
        return self.copies if plain else f"{self.pattern.name}: {self.copies}"


#: 27 MiB: this layer in 32 slices, as engines once cut it.
WAYS: Final = (
    Way(27 * MIB), Way(None), Way(16 * MIB), Way(4 * MIB), Way(MIB), Way(None, "in order"), Way(4 * MIB, "in order"),
    Way(None, "together"), Way(16 * MIB, "together"),
    *(Way(None, "rotated", pattern) for pattern in (RING, PAIRS, ONE_WAY, ONE_SOURCE, IN_STEP)),
    Way(None, "together", ONE_READER),
    *(Way(PIECE, "rotated", pattern, programs) for pattern in (ALL, RING) for programs in (8, 16, 32, 0)),
)  # fmt: skip


def chosen(only: str, gpus: bool) -> tuple[Way, ...]:
    """The ways with one of the words of `only`, split at commas, in their names; without GPUs those of copy engines."""
    words = [word.strip() for word in only.split(",")]
    return tuple(way for way in WAYS if any(word in way.name for word in words) and (gpus or way.programs is None))
