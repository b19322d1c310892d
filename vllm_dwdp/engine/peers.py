"""In the worker of a rank that is a server of its own: what it finds in its group, and who of it comes and goes.

Nothing on the way of a step asks for peers: their slabs stay mapped whatever becomes of them.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from vllm.logger import init_logger

from vllm_dwdp.group.apart import ApartRendezvous
from vllm_dwdp.group.checkpoint import fingerprint
from vllm_dwdp.layers.build import BuildApart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_dwdp.group.meeting import Holder
    from vllm_dwdp.group.rendezvous import Rendezvous
    from vllm_dwdp.prefetch.counters import CounterPage

logger = init_logger("vllm.dwdp")

PERIOD_S: Final = 1.0
_STOP_S: Final = 5.0


def found_apart(rendezvous: Rendezvous) -> BuildApart | None:
    """What the group has for this rank; None where one launch has all ranks."""
    if not isinstance(rendezvous, ApartRendezvous):
        return None

    def same_files(files: Sequence[str]) -> None:
        remedy = "start all ranks of the group with the same checkpoint"
        rendezvous.check_same("checkpoint", fingerprint(files), rendezvous.ranks, remedy)

    return BuildApart(rendezvous.adopt(), rendezvous.loading(), rendezvous.hold, same_files)


class PeerWatch(threading.Thread):
    """Tells once a second who of the group is there: one line for each that comes or goes, and `peers_alive` of the page."""

    def __init__(self, rendezvous: ApartRendezvous, page: CounterPage) -> None:
        super().__init__(name="dwdp-peers", daemon=True)
        self._rendezvous, self._page = rendezvous, page
        self._others = [rank for rank in rendezvous.ranks if rank != rendezvous.rank]
        self._known: dict[int, Holder | None] = {}
        self._stopping = threading.Event()

    def run(self) -> None:
        """Until stopped."""
        while True:
            try:
                self.look()
            except Exception as error:
                # Serving needs nothing of this.
                logger.warning("dwdp rank %d: the group is no longer watched: %s", self._rendezvous.rank, error)
                return
            if self._stopping.wait(PERIOD_S):
                return

    def look(self) -> None:
        """See who is there; raises PeerLost where the group's folder was removed."""
        self._rendezvous.meeting.check_there()
        for rank in self._others:
            now, before = self._serving(rank), self._known.get(rank)
            if now != before or rank not in self._known:
                self._tell(rank, now, before)
                self._known[rank] = now
        self._page.fields.peers_alive = sum(holder is not None for holder in self._known.values())

    def _serving(self, rank: int) -> Holder | None:
        """Who holds the position, once it has mapped everything; who was there already is not asked again."""
        holder = self._rendezvous.meeting.holder(rank)
        if holder is None or holder == self._known.get(rank) or self._rendezvous.meeting.said(rank, "mapped"):
            return holder
        return None

    def _tell(self, rank: int, now: Holder | None, before: Holder | None) -> None:
        me = self._rendezvous.rank
        if now is None:
            gone = f"rank {rank} (life {before.life}, process {before.pid})" if before else f"rank {rank}"
            logger.warning("dwdp rank %d: %s is gone; its experts stay mapped here, and serving goes on", me, gone)
        elif rank in self._known:
            logger.info("dwdp rank %d: rank %d is there again (life %d, process %d)", me, rank, now.life, now.pid)

    def stop(self) -> None:
        """End, and wait for it."""
        self._stopping.set()
        self.join(_STOP_S)

    def leave(self) -> None:
        """Let go of the position, last of all."""
        self._rendezvous.leave()


def watch_peers(rendezvous: ApartRendezvous, page: CounterPage) -> PeerWatch:
    """Watch the group from now on."""
    watch = PeerWatch(rendezvous, page)
    watch.start()
    return watch
