"""Where ranks that are threads of one process meet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from tests.unit.helpers import LIMIT_S


class Meeting:
    """In place of the rendezvous of a launch."""

    def __init__(self) -> None:
        self.said: dict[tuple[int, str], Any] = {}
        self._changed = threading.Condition()

    def of(self, rank: int) -> Any:
        """What ExpertSharing takes for its rendezvous."""
        return SimpleNamespace(
            rank=rank,
            timeout_s=LIMIT_S,
            put=lambda name, value: self._put(rank, name, value),
            get=self._get,
            offers=self._offers,
            gather=lambda name, value, ranks: self._gather(rank, name, value, ranks),
        )

    def _put(self, rank: int, name: str, value: Any) -> None:
        with self._changed:
            self.said[rank, name] = value
            self._changed.notify_all()

    def _get(self, rank: int, name: str) -> Any:
        with self._changed:
            assert self._changed.wait_for(lambda: (rank, name) in self.said, LIMIT_S), name
            return self.said[rank, name]

    def _offers(self, rank: int, name: str, timeout_s: float) -> Iterator[Any]:
        yield self._get(rank, name)

    def _gather(self, rank: int, name: str, value: Any, ranks: list[int]) -> list[Any]:
        self._put(rank, name, value)
        return [self._get(other, name) for other in ranks]
