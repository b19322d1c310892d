"""Where the ranks of one launch meet: messages in the launch's folder, at start and at the end only.

No rank waits here once it serves. A rank that fails says so, and the others fail at once with its message instead of
waiting for their time limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vllm_dwdp.errors import DwdpError, DwdpTimeout, PeerLost
from vllm_dwdp.group.launch_folder import LaunchFolder

_FIRST_PAUSE_S = 0.001
_LAST_PAUSE_S = 0.05


@dataclass(frozen=True)
class Identity:
    """What has to be equal on all ranks of a group before weights are shared."""

    vllm: str
    vllm_dwdp: str
    model: str
    model_hash: str
    dtype: str
    dwdp: str


class Rendezvous:
    """One rank's view of the launch's folder. What it publishes under a name is the file `RANK-NAME.json`.

    No wait depends on another process: one that is stopped keeps nobody beyond the time limit.

    Raises:
        PeerLost: the front end is gone.
        DwdpError: the folder is not that of a launch of this user.
    """

    def __init__(self, folder: str, rank: int, timeout_s: float) -> None:
        self.rank = rank
        self.timeout_s = timeout_s
        self._folder = LaunchFolder(folder)
        self._check_front_end()

    def put(self, name: str, value: Any) -> None:
        """Publish a JSON-able value of this rank under `name`; raises DwdpError where it cannot be written."""
        self._folder.write(_file(self.rank, name), value)

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank cannot go on; never raises."""
        message = str(error).strip().splitlines()
        with contextlib.suppress(Exception):
            self.put("failed", f"{type(error).__name__}: {message[0] if message else ''}")

    def get(self, rank: int, name: str, timeout_s: float | None = None) -> Any:
        """Wait for `name` of `rank`.

        Raises:
            PeerLost: that rank said that it failed, or the front end is gone.
            DwdpTimeout: it did not publish `name` in time.
        """
        limit = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        pause = _FIRST_PAUSE_S
        while True:
            if (found := self._folder.read(_file(rank, name))) is not None:
                return found
            if (why := self._folder.read(_file(rank, "failed"))) is not None:
                raise PeerLost(f"rank {rank} failed during start: {why}")
            self._check_front_end()
            left = deadline - time.monotonic()
            if left <= 0:
                raise DwdpTimeout(
                    f"rank {self.rank} waited {limit:g} s for rank {rank} ({name}): it never arrived; look at its "
                    'log, or raise additional_config {"dwdp": {"timeout_s": ...}} if it is only slow'
                )
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LAST_PAUSE_S)

    def peek(self, rank: int, name: str) -> Any | None:
        """What `rank` published under `name` so far, or None; raises PeerLost where there is none and never will be."""
        found = self._folder.read(_file(rank, name))
        if found is None:
            self._check_front_end()
        return found

    def offers(self, rank: int, name: str, timeout_s: float | None = None) -> Iterator[Any]:
        """What can be had of `rank` under `name`, the best first; waits and raises as `get`."""
        yield self.get(rank, name, timeout_s)

    def gather(self, name: str, value: Any, ranks: list[int]) -> list[Any]:
        """Publish `value` and return what every rank of `ranks` published, in that order."""
        self.put(name, value)
        return [value if rank == self.rank else self.get(rank, name) for rank in ranks]

    def check_identity(self, identity: Identity, ranks: list[int]) -> None:
        """Compare `identity` over `ranks`; raises DwdpError that names the rank and the fields that differ."""
        self.check_same(
            "identity", asdict(identity), ranks, "start all ranks with the same model, options and versions"
        )

    def check_same(self, name: str, mine: dict[str, str], ranks: list[int], remedy: str) -> None:
        """Compare `mine` over `ranks`; raises DwdpError that names the rank and the fields that differ."""
        self.put(name, mine)
        # One by one: who differs is told before a rank is waited for that may never come.
        for rank in ranks:
            self._compare(rank, mine, mine if rank == self.rank else self.get(rank, name), remedy)

    def _compare(self, rank: int, mine: dict[str, str], theirs: dict[str, str] | None, remedy: str) -> None:
        if difference := _difference(mine, theirs or mine):
            raise DwdpError(f"ranks {self.rank} and {rank} cannot share experts ({difference}): {remedy}")

    def _check_front_end(self) -> None:
        if self._folder.is_abandoned():
            front_end, path = self._folder.front_end.pid, self._folder.path
            raise PeerLost(
                f"rank {self.rank} lost {path}: the front end is gone (process {front_end}); look at its log"
            )


def _difference(mine: dict[str, str], theirs: dict[str, str]) -> str:
    """Fields that differ, as `field: mine, theirs`; empty when equal."""
    return "; ".join(
        f"{key}: {mine[key]} here, {theirs.get(key)} there" for key in mine if mine[key] != theirs.get(key)
    )


def _file(rank: int, name: str) -> str:
    return f"{rank}-{name}.json"


def identity_hash(value: Any) -> str:
    """Short stable hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
