"""The front end's view of its ranks: their counter pages, mapped as they come up and readable after they are gone.

vLLM may kill its engines at shutdown without giving them a word, so the line that each rank leaves behind is written here.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
import weakref
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_dwdp.engine.metrics import publish
from vllm_dwdp.errors import DwdpError, PeerLost
from vllm_dwdp.group.launch import DwdpLaunch
from vllm_dwdp.group.rendezvous import Rendezvous
from vllm_dwdp.prefetch.counters import CounterPage, CounterReader, Counters
from vllm_dwdp.transport.base import Handle

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.dwdp")

PERIOD_S = 1.0
#: Looking for pages takes less.
STOP_TIMEOUT_S = 5.0


class RankPages(threading.Thread):
    """Maps the pages of all ranks of `launch`; publishes their growth once a second if told to.

    starting: this process starts the engines, and says so where one does not begin to load within `timeout_s`.
    """

    def __init__(self, launch: DwdpLaunch, publishing: bool, starting: bool = False) -> None:
        super().__init__(name="dwdp-pages", daemon=True)
        self._launch = launch
        self._publishing = publishing
        self._starting = starting
        self._readers: dict[int, CounterReader] = {}
        self._published: dict[int, Counters] = {}
        self._told: set[int] = set()
        self._stopping = threading.Event()

    def run(self) -> None:
        """Until stopped, or until all pages are mapped and nothing is to be published."""
        try:
            rendezvous = Rendezvous(self._launch.folder, -1, self._launch.config.timeout_s)
            deadline = time.monotonic() + rendezvous.timeout_s
            while not self._stopping.wait(PERIOD_S):
                if self._starting and time.monotonic() > deadline:
                    self._starting = False
                    self._tell_silent(rendezvous)
                if len(self._readers) < len(self._launch.ranks_here):
                    self._open_pages(rendezvous)
                elif not self._publishing:
                    return
                if self._publishing:
                    self._publish()
        except DwdpError as error:
            if not self._stopping.is_set():
                logger.warning("dwdp: the counters of the ranks are no longer read: %s", error)

    def _open_pages(self, rendezvous: Rendezvous) -> None:
        for rank in self._launch.ranks_here:
            if rank not in self._readers and (raw := rendezvous.peek(rank, "counters")) is not None:
                try:
                    self._readers[rank] = CounterPage.open(Handle.from_dict(raw))
                except PeerLost:
                    pass  # a rank may end between publishing its page and our opening it
                except DwdpError as error:
                    if rank not in self._told:
                        self._told.add(rank)
                        logger.warning("dwdp: the counters of rank %d are not read: %s", rank, error)

    def _tell_silent(self, rendezvous: Rendezvous) -> None:
        # vLLM waits for the first word of an engine without a limit, and without one of its own.
        silent = [rank for rank in self._launch.ranks_here if rendezvous.peek(rank, "identity") is None]
        # As vLLM calls them. Other children are its API servers, its coordinator, and the program's own. A config of which
        # no engine was started, or none is left, waits for nobody.
        names = {"EngineCore", *(f"EngineCore_DP{rank}" for rank in silent)}
        children = multiprocessing.active_children()
        engines = sorted(f"{child.name} {child.pid}" for child in children if child.name in names)
        if silent and engines:
            logger.warning(
                "dwdp: nothing heard of %s for %g s (dwdp.timeout_s): see where %s stands (py-spy dump --pid), or start "
                "again; raise the limit if this machine is only slow",
                *(", ".join(f"rank {rank}" for rank in silent), rendezvous.timeout_s, ", ".join(engines)),
            )

    def _publish(self) -> None:
        for rank, reader in self._readers.items():
            now = reader.snapshot()
            publish(rank, now, self._published.get(rank))
            self._published[rank] = now

    def stop(self, summarise: bool) -> None:
        """End, and wait for it; `summarise`: leave one line per rank."""
        self._stopping.set()
        # Python ends a daemon thread that comes out of native code at the end of the program by unwinding it, which can
        # abort the program. A config may be collected in any thread, this one too.
        if self.is_alive() and self is not threading.current_thread():
            self.join(STOP_TIMEOUT_S)
        if summarise:
            for rank, reader in sorted(self._readers.items()):
                logger.info("dwdp rank %d stops: %s", rank, summary(reader.snapshot()))


def summary(counters: Counters) -> str:
    """What a rank did, in one line."""
    return (
        f"{counters.forwards} forwards ({counters.direct_forwards} direct, {counters.travel_forwards} travelled), "
        f"{counters.pulled_bytes / 1e6:.1f} MB pulled in {counters.layers} layers, {counters.direct_bytes / 1e6:.1f} MB "
        f"read directly, waited {counters.exposed_wait_ns / 1e6:.1f} ms, {counters.on_demand_fetches} fetched on demand, "
        f"{counters.travel_late} of {counters.travel_requests} requests to owners late, {counters.travel_served} served"
    )


def watch_ranks(vllm_config: VllmConfig, launch: DwdpLaunch, publishing: bool, summarise: bool) -> None:
    """Watch the ranks of `launch` as long as `vllm_config` lives."""
    pages = RankPages(launch, publishing, starting=summarise)
    pages.start()
    weakref.finalize(vllm_config, pages.stop, summarise)
