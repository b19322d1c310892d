"""A rank in a process of its own, for the tests of shared memory; imports nothing heavy."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from tests.unit.helpers import LIMIT_S
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.shm import ShmTransport


class Owner(NamedTuple):
    process: Any  # multiprocessing's, of either start method
    pipe: Connection
    handles: list[Handle]

    def ask(self, *request: object) -> object:
        """Let the owner do something; returns its answer."""
        self.pipe.send(request)
        return receive(self.pipe)


def receive(pipe: Connection) -> Any:
    assert pipe.poll(LIMIT_S), "the other process does not answer"
    return pipe.recv()


def serve(pipe: Connection, contents: list[tuple[int, int]]) -> None:
    """Own slabs of (nbytes, byte to fill it with) until told to end."""
    transport = ShmTransport()
    slabs = [transport.allocate_slab(nbytes) for nbytes, _ in contents]
    for slab, (nbytes, byte) in zip(slabs, contents, strict=True):
        ctypes.memset(slab.address, byte, nbytes)
    pipe.send([transport.export_handle(slab) for slab in slabs])
    while pipe.poll(LIMIT_S):
        match pipe.recv():
            case ("set", int(number), int(offset), int(value)):
                ctypes.memset(slabs[number].address + offset, value, 1)
                pipe.send(None)
            case ("get", int(number), int(offset)):
                pipe.send(ctypes.string_at(slabs[number].address + offset, 1)[0])
            case ("free",):
                transport.close()
                pipe.send(None)
            case _:
                break
    transport.close()


@contextmanager
def owner(*contents: tuple[int, int], method: str = "spawn") -> Iterator[Owner]:
    """A child that owns slabs, each (nbytes, byte)."""
    context = get_context(method)
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, list(contents)), daemon=True)  # type: ignore[attr-defined]
    process.start()
    there.close()
    try:
        yield Owner(process, here, receive(here))
    finally:
        here.close()
        process.kill()
        process.join(LIMIT_S)
