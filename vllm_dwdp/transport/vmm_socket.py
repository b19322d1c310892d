"""Descriptors of device memory from an owner to its peers: CUDA's cannot be opened under /proc, so a socket passes them.

    reader -> owner    the token of a slab
    owner  -> reader   some descriptors    reader -> owner   got them      ... until it has all

The socket has an abstract name, so that nothing stays of an owner that is killed. Everybody in the network namespace can
connect to it; both ends ask the kernel who the other is, and go on with their own user only.
"""

import contextlib
import errno
import logging
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Generator, Sequence
from typing import Final

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.cuda_vmm import INSTEAD
from vllm_dwdp.transport.limits import require_descriptors

logger = logging.getLogger(__name__)

#: Descriptors in one message; Linux takes 253.
AT_ONCE: Final = 64
_WORD_BYTES: Final = 64
_GOT: Final = b"got"
#: A reader that has connected and says nothing keeps the others waiting no longer than this.
_CLIENT_S: Final = 10.0
_CLOSE_S: Final = 2 * _CLIENT_S
_PAUSE_S: Final = 0.05


class DescriptorServer:
    """An owner's end: a thread that gives a slab's descriptors to whoever of this user knows its token."""

    def __init__(self) -> None:
        """Raises DwdpError where there can be no socket, or no thread."""
        self.name = f"dwdp-vmm-{secrets.token_hex(8)}"
        self._offers: dict[str, list[int]] = {}
        self._lock = threading.Lock()
        with contextlib.ExitStack() as undo:
            try:
                self._listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                self._listener.bind(f"\0{self.name}")
                self._listener.listen()
                self._wake, self._woken = (undo.enter_context(end) for end in socket.socketpair())
                self._thread = threading.Thread(target=self._run, name="dwdp-descriptors", daemon=True)
                self._thread.start()
            except (OSError, RuntimeError) as error:
                raise DwdpError(
                    f"the socket for descriptors of device memory cannot be served ({error}): raise ulimit -n and -u, "
                    f"or {INSTEAD}"
                ) from error
            self._ends = undo.pop_all()

    def offer(self, descriptors: Sequence[int]) -> str:
        """The token for these descriptors, which are the server's from now on."""
        token = secrets.token_hex(_WORD_BYTES // 2)
        with self._lock:
            self._offers[token] = list(descriptors)
        return token

    def withdraw(self, token: str) -> None:
        """Close an offer's descriptors; idempotent."""
        with self._lock:
            for descriptor in self._offers.pop(token, []):
                os.close(descriptor)

    def close(self) -> None:
        """End the thread and withdraw everything; idempotent."""
        if self._thread.is_alive():
            with contextlib.suppress(OSError):
                self._wake.send(b".")
            self._thread.join(_CLOSE_S)
        self._ends.close()
        for token in list(self._offers):
            self.withdraw(token)

    def _run(self) -> None:
        poll = select.poll()  # unlike select, of descriptors above 1023 too
        for end in (self._listener, self._woken):
            poll.register(end, select.POLLIN)
        while all(descriptor != self._woken.fileno() for descriptor, _ in poll.poll()):
            try:
                client, _ = self._listener.accept()
                with client:
                    self._serve(client)
            except OSError as error:
                # Readers that gave up; or there are no descriptors left for a connection, which is then still waiting.
                logger.warning("giving descriptors of device memory to a peer: %s", error)
                time.sleep(_PAUSE_S)

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(_CLIENT_S)
        if _user(client) != os.geteuid():
            return
        token = client.recv(_WORD_BYTES).decode("ascii", "replace")
        with self._lock:
            descriptors = self._offers.get(token, [])
            for first in range(0, len(descriptors), AT_ONCE):
                some = descriptors[first : first + AT_ONCE]
                socket.send_fds(client, [len(some).to_bytes(2, "big")], some)
                if client.recv(len(_GOT)) != _GOT:
                    return


def fetch(name: str, token: str, count: int, timeout_s: float) -> Generator[int]:
    """The descriptors behind a token, in order, to be used before the next one is asked for: they are closed here.

    Raises DwdpError where limits forbid them or the owner is of another user, TimeoutError after `timeout_s` in all, and
    another OSError where the owner is not there or gives fewer than `count`.
    """
    require_descriptors(min(count, AT_ONCE) + 1, "mapping a peer's slab")
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as owner:
        _connect(owner, name, deadline)
        if _user(owner) != os.geteuid():
            raise DwdpError("the owner of a slab runs as another user: run all ranks as one user")
        owner.send(token.encode("ascii"))
        while count:
            _limit(owner, deadline)
            word, got, _, _ = socket.recv_fds(owner, 2, AT_ONCE)
            with contextlib.ExitStack() as open_ones:
                for descriptor in got:
                    os.set_inheritable(descriptor, False)
                    open_ones.callback(os.close, descriptor)
                if len(got) != int.from_bytes(word, "big") or not 0 < len(got) <= count:
                    raise OSError(errno.ECONNRESET, f"{len(got)} descriptors came, {count} are left")
                owner.send(_GOT)
                yield from got
            count -= len(got)


def _connect(end: socket.socket, name: str, deadline: float) -> None:
    while True:
        _limit(end, deadline)
        try:
            return end.connect(f"\0{name}")
        except BlockingIOError:  # more are waiting than the owner lets queue
            if time.monotonic() > deadline:
                raise TimeoutError(f"no place among those who wait for {name}") from None
            time.sleep(_PAUSE_S)


def _limit(end: socket.socket, deadline: float) -> None:
    """Have the next call on a socket end at `deadline`."""
    end.settimeout(max(1e-3, deadline - time.monotonic()))


def _user(end: socket.socket) -> int:
    """The user id of the process at the other end, as the kernel knows it."""
    layout = struct.Struct("3i")
    return int(layout.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))[1])
