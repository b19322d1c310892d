"""In the worker of a rank that is a server of its own: what it finds in its group, and who of it comes and goes.

Nothing on the way of a step asks for peers: their slabs stay mapped whatever becomes of them.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from vllm.logger import init_logger

from vllm_dwdp.group.apart import ApartRendezvous
from vllm_dwdp.group.checkpoint import fingerprint
from vllm_dwdp.group.reach import check_reach
from vllm_dwdp.layers.build import BuildApart
from vllm_dwdp.transport.process import ProcessId, is_gone, process_with

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_dwdp.group.meeting import Holder
    from vllm_dwdp.group.rendezvous import Rendezvous
    from vllm_dwdp.prefetch.counters import CounterPage
    from vllm_dwdp.transport.cuda_device import DeviceInfo

logger = init_logger("vllm.dwdp")

PERIOD_S: Final = 1.0
_STOP_S: Final = 5.0


def found_apart(rendezvous: Rendezvous, on_cpu: bool) -> BuildApart | None:
    """What the group has for this rank; None where one launch has all ranks.

    The memory of a share is on its owner's GPU: an extra rank there reads a copy of its own. Raises DwdpError where ranks on
    GPUs cannot have each other's memory.
    """
    if not isinstance(rendezvous, ApartRendezvous):
        return None
    if not on_cpu:
        check_reach(rendezvous, *_gpus())

    def same_files(files: Sequence[str]) -> None:
        remedy = "start all ranks of the group with the same checkpoint"
        rendezvous.check_same("checkpoint", fingerprint(files), rendezvous.ranks, remedy)

    copies = not on_cpu and rendezvous.rank not in rendezvous.ranks
    adopted = None if copies else rendezvous.adopt()
    return BuildApart(adopted, *rendezvous.loading(adopted is not None), rendezvous.hold, same_files, copies)


def _gpus() -> tuple[str, Sequence[DeviceInfo]]:
    """The UUID of the GPU that this worker computes on, and all that it sees."""
    import torch

    from vllm_dwdp.transport.cuda_cupy import CupyDevice

    device = CupyDevice(torch.cuda.current_device())
    visible = device.devices()
    return visible[device.index].uuid, visible


class PeerWatch(threading.Thread):
    """Tells once a second who of the group is there: one line for each that comes or goes, and `peers_alive` of the page.

    Where that cannot be asked, those who were there count as long as their processes live.
    """

    def __init__(self, rendezvous: ApartRendezvous, page: CounterPage) -> None:
        super().__init__(name="dwdp-peers", daemon=True)
        self._rendezvous, self._page = rendezvous, page
        self._known: dict[int, Holder | None] = {}
        self._processes: dict[int, ProcessId] = {}
        self._failure = ""
        self._stopping = threading.Event()

    def run(self) -> None:
        """Until stopped."""
        while True:
            self.look()
            if self._stopping.wait(PERIOD_S):
                return

    def look(self) -> None:
        """See who is there; what prevents that is told once, until it is something else. Never raises."""
        failure = ""
        try:
            self._ask()
        except Exception as error:
            # Serving needs nothing of this.
            failure = str(error)
            if failure != self._failure:
                logger.warning("dwdp rank %d: the group cannot be watched: %s", self._rendezvous.rank, failure)
        self._failure = failure
        if self._known:
            self._page.fields.peers_alive = sum(self._is_there(rank, bool(failure)) for rank in self._known)

    def _ask(self) -> None:
        self._rendezvous.meeting.check_there()
        first = not self._known
        for rank in (*self._rendezvous.ranks, *self._rendezvous.extras()):
            if rank == self._rendezvous.rank:
                continue
            now, before = self._serving(rank), self._known.get(rank)
            if now != before or rank not in self._known:
                if now is not None:
                    self._processes[rank] = process_with(now.pid)
                if not first or now is None:
                    self._tell(rank, now, before)
                self._known[rank] = now

    def _is_there(self, rank: int, by_process: bool) -> bool:
        return self._known[rank] is not None and not (by_process and is_gone(self._processes[rank]))

    def _serving(self, rank: int) -> Holder | None:
        """Who holds the position, once it has mapped everything; who was there already is not asked again."""
        holder = self._rendezvous.meeting.holder(rank)
        if holder is None or holder == self._known.get(rank) or self._rendezvous.meeting.said(rank, "mapped"):
            return holder
        return None

    def _tell(self, rank: int, now: Holder | None, before: Holder | None) -> None:
        me, extra = self._rendezvous.rank, rank not in self._rendezvous.ranks
        if now is not None:
            again = "there, an extra one" if extra else "there again"
            logger.info("dwdp rank %d: rank %d is %s (life %d, process %d)", me, rank, again, now.life, now.pid)
        elif before or not extra:
            gone = f"rank {rank} (life {before.life}, process {before.pid})" if before else f"rank {rank}"
            kept = "" if extra else "its experts stay mapped here, and "
            logger.warning("dwdp rank %d: %s is gone; %sserving goes on", me, gone, kept)

    def stop(self) -> None:
        """End, and wait for it; from then on nobody is told to ask this rank for slabs."""
        self._stopping.set()
        self.join(_STOP_S)
        self._rendezvous.withdraw()

    def leave(self) -> None:
        """Let go of the position, last of all."""
        self._rendezvous.leave()


def watch_peers(rendezvous: ApartRendezvous, page: CounterPage) -> PeerWatch:
    """Watch the group from now on."""
    watch = PeerWatch(rendezvous, page)
    watch.start()
    return watch
