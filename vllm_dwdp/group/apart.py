"""The rendezvous of a rank that is a server of its own: its peers come and go, and what they say is said in one life."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from vllm_dwdp.errors import DwdpTimeout, PeerLost
from vllm_dwdp.group.launch import Apart
from vllm_dwdp.group.meeting import Meeting, join
from vllm_dwdp.group.rendezvous import Rendezvous
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.kept import KeptSlab, keep_slab, memory_of
from vllm_dwdp.transport.memfd import this_host
from vllm_dwdp.transport.vmm_kept import ANSWER_S

logger = logging.getLogger("vllm.dwdp")

SLABS: Final = "slabs"
_HOLDS: Final = "holds"
_PAUSE_S: Final = 0.05


class Loading(NamedTuple):
    """How many ranks have yet to take memory, the one that asks among them, and how many of these that of their share, which
    nobody has."""

    ranks: int
    reading: int


class ApartRendezvous(Rendezvous):
    """One rank's view of its group; it holds the rank's position from here on.

    Waits are for who holds a position now. Where nobody does, and a rank that lives has the slabs of that position open,
    nobody is waited for: the rank is dead, and its experts can be had.

    A rank that is none of `ranks` is an extra one, with the share of one of them. It waits for `ranks`; nobody waits for it.
    What it has open is as good as what they have.

    Raises as Rendezvous, and DwdpError where another process holds the position.
    """

    def __init__(self, folder: str, apart: Apart, ranks: list[int], timeout_s: float) -> None:
        """folder: of this launch, for its front end."""
        super().__init__(folder, apart.rank, timeout_s)
        self.ranks = ranks
        self.share = ranks[apart.rank % len(ranks)]
        self.meeting, self.life = join(apart.folder, apart.rank, timeout_s)
        self._failures: dict[int, str] = {}

    def put(self, name: str, value: Any) -> None:
        """See Rendezvous; in this life."""
        super().put(name, value)
        self.meeting.say(self.rank, name, value)

    def hold(self, handles: dict[int, list[Any]]) -> None:
        """Tell the group of which ranks this one has the slabs open, by the handles for them, layer by layer."""
        self.put(_HOLDS, {str(rank): of_rank for rank, of_rank in handles.items()})

    def extras(self) -> list[int]:
        """Positions of extra ranks, be it that nobody holds them now."""
        return [rank for rank in self.meeting.positions() if rank not in self.ranks]

    def held(self, rank: int) -> list[Any] | None:
        """Handles of the slabs of `rank` from one that lives and has them open, this one too; None where none has."""
        return next(self._keepers(rank), None)

    def _keepers(self, rank: int) -> Iterator[list[Any]]:
        return _held(self.meeting, rank, (*self.ranks, *self.extras()))

    def adopt(self) -> list[KeptSlab] | None:
        """The slabs of this rank's share that another rank has, layer by layer, opened here, so that they stay whoever dies;
        None where nobody has them. An extra rank waits for them. To be asked once.

        Raises:
            PeerLost: somebody says to have them for `timeout_s` and has them no longer.
            DwdpTimeout: nobody who has them gives them in that time; or as `get`, of an extra rank.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            keepers = list(self._keepers(self.share))
            if not keepers and self.rank in self.ranks:
                return None
            failure: PeerLost | DwdpTimeout | None = None
            for handles in keepers or [self.get(self.share, SLABS)]:
                try:
                    return self._keep(handles)
                except (PeerLost, DwdpTimeout) as error:
                    # Who had them is dying, or stopped: another one may have them too.
                    failure = error
            if failure is not None and time.monotonic() > deadline:
                raise failure
            time.sleep(_PAUSE_S)

    def _keep(self, handles: list[Any]) -> list[KeptSlab]:
        with contextlib.ExitStack() as undo:
            kept: list[KeptSlab] = []
            for handle in handles:
                limit_s = min(ANSWER_S, self.timeout_s)
                kept.append(keep_slab(Handle.from_dict(handle), "an adopted slab", limit_s))
                undo.callback(kept[-1].close)
            undo.pop_all()
            return kept

    def check_same(self, name: str, mine: dict[str, str], ranks: list[int], remedy: str) -> None:
        """See Rendezvous; also with extra ranks that serve, since all of `ranks` may be dead and live on in these."""
        super().check_same(name, mine, ranks, remedy)
        for rank in self.extras():
            # One that does not belong holds nothing, and ends by itself.
            if self.meeting.said(rank, _HOLDS) is not None:
                self._compare(rank, mine, self.meeting.said(rank, name), remedy)

    def loading(self, adopts: bool) -> Loading:
        """Of extra ranks this one only. adopts: whether its share is in memory.

        Those that are dead, and whose share is in memory, ask for themselves when they return.
        """
        others = [rank for rank in self.ranks if rank != self.rank and not self._has_loaded(rank)]
        return Loading(1 + len(others), (not adopts) + sum(self.held(rank) is None for rank in others))

    def _has_loaded(self, rank: int) -> bool:
        if self.meeting.holder(rank) is None:
            return self.held(rank) is not None
        return self.meeting.said(rank, SLABS) is not None

    def get(self, rank: int, name: str, timeout_s: float | None = None) -> Any:
        """Wait for what the holder of `rank` says under `name`, however often it is replaced meanwhile.

        For a rank that is dead and whose slabs can be had: these, where `name` is "slabs", else None. Of an extra rank that
        is not there, None.

        Raises:
            DwdpTimeout: nobody held the position, or its holder did not say `name`, in time.
            PeerLost: the front end of this launch is gone.
        """
        limit = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        while True:
            if (holder := self.meeting.holder(rank)) is None:
                if rank not in self.ranks:
                    return None
                if (slabs := self.held(rank)) is not None:
                    return slabs if name == SLABS else None
            elif (found := self.meeting.said(rank, name)) is not None:
                return found
            else:
                self._tell_failure(rank)
            self._check_front_end()
            if time.monotonic() > deadline:
                where = f"rank {self.rank} waited {limit:g} s for rank {rank} of the group in {self.meeting.path}"
                if holder is not None:
                    raise DwdpTimeout(f"{where} ({name}): process {holder.pid} is not that far; look at its log")
                last = f", which failed: {self._failures[rank]}" if rank in self._failures else ""
                there = self.meeting.last_host(rank)
                if there is not None and not there.is_machine_of(this_host()):
                    last += f", which ran on {there.machine}, this one runs on {this_host().machine}"
                raise DwdpTimeout(
                    f"{where}{last}: nobody holds it, nor its experts in memory; start it, or raise dwdp.timeout_s if it "
                    "is only slow"
                )
            time.sleep(_PAUSE_S)

    def offers(self, rank: int, name: str, timeout_s: float | None = None) -> Iterator[Any]:
        """See Rendezvous; of slabs also what others have open, since their owner may be dying, or stopped."""
        first = self.get(rank, name, timeout_s)
        yield first
        if name == SLABS:
            yield from (handles for handles in self._keepers(rank) if handles != first)

    def withdraw(self) -> None:
        """Take back what others could ask for, before it is let go of."""
        self.meeting.unsay(self.rank, SLABS)
        self.meeting.unsay(self.rank, _HOLDS)

    def leave(self) -> None:
        """Let go of the position; never raises. What others have open of this rank stays theirs."""
        self.meeting.leave()

    def _tell_failure(self, rank: int) -> None:
        """Others' failures end no start here, since a rank may come again: they are logged."""
        why = self.meeting.said(rank, "failed")
        if why is not None and self._failures.get(rank) != why:
            self._failures[rank] = why
            logger.warning("dwdp rank %d: rank %d failed during its start, and is waited for: %s", self.rank, rank, why)


def left_in_memory(apart: Apart, ranks: Iterable[int]) -> int:
    """Bytes of the slabs that the last life of this rank has left, which it will adopt; 0 where nobody has them. To be asked
    before the position is held.
    """
    if not os.path.lexists(apart.folder):
        return 0
    held = next(_held(Meeting(apart.folder), apart.rank, ranks), [])
    return sum(memory_of(Handle.from_dict(handle)) for handle in held)


def _held(meeting: Meeting, rank: int, ranks: Iterable[int]) -> Iterator[list[Any]]:
    """From each that lives and has them open."""
    for other in ranks:
        if found := (meeting.said(other, _HOLDS) or {}).get(str(rank)):
            yield list(found)
