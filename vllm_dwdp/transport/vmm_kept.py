"""Device memory of another process that this one holds by descriptors: it outlives its owner, and others can have it from
here."""

import contextlib
import errno
import os
import time
from dataclasses import dataclass
from typing import Final

from vllm_dwdp.errors import DwdpError, DwdpTimeout, PeerLost
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.limits import require_descriptors
from vllm_dwdp.transport.process import ProcessId, is_gone
from vllm_dwdp.transport.vmm_socket import fetch

#: For one slab: whoever has it gives it at once, unless it is stopped, and others may have it too.
ANSWER_S: Final = 10.0
#: How long a process whose socket has closed may take to be seen as gone.
_ENDING_S: Final = 1.0
_POLL_S: Final = 0.01


@dataclass
class KeptPieces:
    """A slab of another process: the descriptors of its pieces, in order, and the handle by which they came."""

    handle: Handle
    descriptors: list[int]

    def close(self) -> None:
        """Close what was not passed on; idempotent."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def keep_pieces(handle: Handle, timeout_s: float) -> KeptPieces:
    """Get all descriptors of a slab from whoever the handle names, and keep them.

    Raises PeerLost where that process is gone or has them no longer, DwdpTimeout where it does not answer, DwdpError where
    limits forbid so many.
    """
    words = handle.words(process=dict, socket=str, token=str, pieces=list)
    count, process = len(words["pieces"]), ProcessId(**words["process"])
    require_descriptors(count, "keeping a slab")
    kept = KeptPieces(handle, [])
    with contextlib.ExitStack() as undo:
        undo.callback(kept.close)
        try:
            for descriptor in fetch(words["socket"], words["token"], count, timeout_s):
                kept.descriptors.append(os.dup(descriptor))
        except TimeoutError as error:
            raise no_answer(process, timeout_s) from error
        except OSError as error:
            said = error.strerror or str(error)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise DwdpError(f"keeping a slab of {count} pieces failed ({said}): raise ulimit -n") from error
            if has_ended(process):
                raise PeerLost(
                    f"process {process.pid}, which had a slab open, is gone ({said}): look at its log"
                ) from error
            raise PeerLost(
                f"process {process.pid} gives no slab ({said}): it is ending, or containers lack --network=host"
            ) from error
        undo.pop_all()
    return kept


def sizes_in(handle: Handle, page: int) -> list[int]:
    """Bytes of the pieces of a slab, in order; raises DwdpError where they cannot be whole pages of it."""
    sizes: list[int] = handle.words(pieces=list)["pieces"]
    fits = all(type(size) is int and size > 0 and size % page == 0 for size in sizes)
    if not fits or not 0 < handle.nbytes <= sum(sizes):
        raise DwdpError(
            f"a slab of {handle.nbytes} bytes in pieces {sizes!r:.80} does not fit pages of {page} bytes: use GPUs of one "
            "kind, and run one vllm-dwdp on all ranks"
        )
    return sizes


def no_answer(process: ProcessId, limit_s: float) -> DwdpTimeout:
    """What to raise where no descriptors came in time."""
    return DwdpTimeout(
        f"process {process.pid} gave no descriptors of its slab within {limit_s} s: look for a stalled rank, or raise "
        "dwdp.timeout_s"
    )


def has_ended(process: ProcessId) -> bool:
    """Whether a process is gone, or goes just now: its sockets close a little before."""
    deadline = time.monotonic() + _ENDING_S
    while not (gone := is_gone(process)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return gone
