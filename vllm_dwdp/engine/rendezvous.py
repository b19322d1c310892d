"""Where the ranks of one launch meet: a TCPStore in the front end, used at start and at the end only.

No rank waits here once it serves. A rank that fails says so, and the others fail at once with its message instead of
waiting for their time limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import socket
import time
import weakref
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from vllm_dwdp.config import Rendezvous as Address
from vllm_dwdp.errors import DwdpError, DwdpTimeout, PeerLost

_POLL_S = 0.05
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Identity:
    """What has to be equal on all ranks of a group before weights are shared."""

    vllm: str
    vllm_dwdp: str
    model: str
    model_hash: str
    dtype: str
    dwdp: str

    def difference(self, other: Identity) -> str:
        """Fields that differ, as `field: mine, theirs`; empty when equal."""
        mine, theirs = asdict(self), asdict(other)
        return "; ".join(f"{key}: {mine[key]} here, {theirs[key]} there" for key in mine if mine[key] != theirs[key])


def host_rendezvous(owner: object) -> Address:
    """Start the store of one launch in this process; it lives as long as `owner` (the front end's config) does.

    Bound to the loopback address: all ranks of this release run on one machine.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK, 0))
    listener.listen(128)
    port: int = listener.getsockname()[1]
    # A list, so that the finalizer drops the only reference; the store stops listening with it.
    store = [
        TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=30),
            master_listen_fd=listener.detach(),
        )
    ]
    weakref.finalize(owner, store.clear)
    return Address(LOOPBACK, port, secrets.token_hex(6))


class Rendezvous:
    """One rank's view of the store. Keys are `launch-id/rank/name`.

    Raises:
        DwdpTimeout: the store, or a peer, did not answer within `timeout_s`.
    """

    def __init__(self, address: Address, rank: int, timeout_s: float) -> None:
        self.rank = rank
        self.timeout_s = timeout_s
        self._prefix = address.group_id
        host, port = address.host, address.port
        try:
            self._store = TCPStore(
                host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=min(timeout_s, 30.0))
            )
        except Exception as error:
            raise DwdpTimeout(
                f"rank {rank} cannot reach the rendezvous store at {host}:{port} ({type(error).__name__}): is the "
                "front end still alive?"
            ) from error

    def _key(self, rank: int, name: str) -> str:
        return f"{self._prefix}/{rank}/{name}"

    def put(self, name: str, value: Any) -> None:
        """Publish a JSON-able value of this rank under `name`."""
        self._store.set(self._key(self.rank, name), json.dumps(value))

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank cannot go on; never raises."""
        message = str(error).strip().splitlines()
        with contextlib.suppress(Exception):
            self.put("failed", f"{type(error).__name__}: {message[0] if message else ''}")

    def get(self, rank: int, name: str, timeout_s: float | None = None) -> Any:
        """Wait for `name` of `rank`.

        Raises:
            PeerLost: that rank said that it failed.
            DwdpTimeout: it did not publish `name` in time.
        """
        limit = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        wanted, failed = self._key(rank, name), self._key(rank, "failed")
        while True:
            try:
                if self._store.check([wanted]):
                    return json.loads(self._store.get(wanted))
                if self._store.check([failed]):
                    raise PeerLost(f"rank {rank} failed during start: {json.loads(self._store.get(failed))}")
            except DwdpError:
                raise
            except Exception as error:
                raise PeerLost(f"rank {self.rank} lost the rendezvous store: the front end is gone") from error
            if time.monotonic() > deadline:
                raise DwdpTimeout(
                    f"rank {self.rank} waited {limit:.0f} s for rank {rank} ({name}): it never arrived; look at its "
                    'log, or raise additional_config {"dwdp": {"timeout_s": ...}} if it is only slow'
                )
            time.sleep(_POLL_S)

    def peek(self, rank: int, name: str) -> Any | None:
        """What `rank` published under `name` so far, or None; raises PeerLost where the store is gone."""
        key = self._key(rank, name)
        try:
            return json.loads(self._store.get(key)) if self._store.check([key]) else None
        except Exception as error:
            raise PeerLost("the rendezvous store is gone: the front end has ended") from error

    def gather(self, name: str, value: Any, ranks: list[int]) -> list[Any]:
        """Publish `value` and return what every rank of `ranks` published, in that order."""
        self.put(name, value)
        return [value if rank == self.rank else self.get(rank, name) for rank in ranks]

    def check_identity(self, identity: Identity, ranks: list[int]) -> None:
        """Compare `identity` over `ranks`; raises DwdpError that names the rank and the fields that differ."""
        for rank, other in zip(ranks, self.gather("identity", asdict(identity), ranks), strict=True):
            if difference := identity.difference(Identity(**other)):
                raise DwdpError(
                    f"ranks {self.rank} and {rank} cannot share experts ({difference}): start all ranks with the same "
                    "model, options and versions"
                )


def identity_hash(value: Any) -> str:
    """Short stable hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
