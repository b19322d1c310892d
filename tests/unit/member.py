"""A rank of a group of servers in a process of its own, without vLLM: its position, its slab, and those that it maps."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tests.unit.helpers import LIMIT_S, PAGE, LaunchOwner
from tests.unit.owner import receive
from vllm_dwdp.group.apart import SLABS, ApartRendezvous
from vllm_dwdp.group.launch import Apart
from vllm_dwdp.group.launch_folder import make_folder
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.memfd import MemoryFile
from vllm_dwdp.transport.shm import ShmPeerSlab, ShmTransport

NBYTES = 3 * PAGE


def contents(rank: int) -> bytes:
    """Of the slab of a rank, whichever of its lives filled it."""
    return bytes((rank * 101 + 7 * i) % 256 for i in range(NBYTES))


def _start(
    rendezvous: ApartRendezvous, transport: ShmTransport, adopted: list[MemoryFile] | None
) -> tuple[bool, dict[int, ShmPeerSlab]]:
    """What a worker does: (whether the slab was adopted, the slabs of all)."""
    rank = rendezvous.share
    rendezvous.gather("memory", True, rendezvous.ranks)
    if adopted is not None:
        slab = transport.adopt_slab(adopted[0])
    else:
        slab = transport.allocate_slab(NBYTES)
        ctypes.memmove(slab.address, contents(rank), NBYTES)
    rendezvous.put(SLABS, [transport.export_handle(slab).to_dict()])
    rendezvous.hold({rank: [transport.export_handle(slab).to_dict()]})
    peers: dict[int, ShmPeerSlab] = {rank: slab}  # type: ignore[dict-item]
    for other in rendezvous.ranks:
        if other != rank:
            peers[other] = transport.map_peer(Handle.from_dict(rendezvous.get(other, SLABS)[0]))
            rendezvous.hold({mapped: [peer.handle.to_dict()] for mapped, peer in peers.items()})
    rendezvous.gather("mapped", True, rendezvous.ranks)
    return adopted is not None, peers


def run_member(pipe: Connection, path: str, rank: int, ranks: int, timeout_s: float) -> None:
    """Join, then answer requests until 'end'; what is raised is an answer too."""
    owner = LaunchOwner()
    rendezvous: ApartRendezvous | None = None
    transport = ShmTransport(LIMIT_S, keep_files=True)
    peers: dict[int, ShmPeerSlab] = {}
    files: list[MemoryFile] | None = None
    while (request := receive(pipe)) != "end":
        try:
            if request == "join":
                apart = Apart("group", rank, path)
                rendezvous = ApartRendezvous(make_folder(owner), apart, list(range(ranks)), timeout_s)
                files = rendezvous.adopt()
                answer: Any = rendezvous.life
            elif request == "start":
                assert rendezvous is not None
                adopted, peers = _start(rendezvous, transport, files)
                answer = adopted
            elif request == "bytes":
                answer = {other: ctypes.string_at(slab.address, NBYTES) for other, slab in peers.items()}
            elif request == "inodes":
                answer = {other: slab.handle.payload["inode"] for other, slab in peers.items()}
            elif request == "leave":
                assert rendezvous is not None
                transport.close()
                rendezvous.leave()
                answer = None
            else:
                assert rendezvous is not None
                name, *more = (request,) if isinstance(request, str) else request
                answer = getattr(rendezvous, name)(*more)
        except Exception as error:
            answer = error
        pipe.send(answer)


@dataclass
class Member:
    """The other end of `run_member`."""

    rank: int
    process: BaseProcess
    pipe: Connection

    def send(self, *request: Any) -> None:
        """Ask, for an answer that may take its time."""
        self.pipe.send(request[0] if len(request) == 1 else request)

    def ask(self, *request: Any) -> Any:
        """The answer; raises what the member raised."""
        self.send(*request)
        return self.answer()

    def answer(self) -> Any:
        """The answer to what was sent; raises what the member raised."""
        found = receive(self.pipe)
        if isinstance(found, Exception):
            raise found
        return found

    def kill(self) -> None:
        """As the system does it when memory runs out."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(LIMIT_S)


@dataclass
class Members:
    """Members of one group; more can be started at any time."""

    path: str
    ranks: int
    alive: list[Member]

    def start(self, rank: int, timeout_s: float = LIMIT_S) -> Member:
        """Start the process of a member; it has not joined yet."""
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        arguments = (theirs, self.path, rank, self.ranks, timeout_s)
        process = context.Process(target=run_member, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self.alive.append(Member(rank, process, mine))
        return self.alive[-1]

    def start_all(self) -> list[Member]:
        """All ranks, joined and started, the last one first."""
        members = [self.start(rank) for rank in range(self.ranks)]
        assert [member.ask("join") for member in members] == [1] * self.ranks
        for member in reversed(members):
            member.send("start")
        assert [member.answer() for member in members] == [False] * self.ranks
        return members


@contextlib.contextmanager
def members(path: str, ranks: int) -> Iterator[Members]:
    """A group that meets in `path`; its processes are gone afterwards."""
    group = Members(path, ranks, [])
    try:
        yield group
    finally:
        for member in group.alive:
            member.process.kill()
            member.process.join(LIMIT_S)
            member.process.close()
            member.pipe.close()
