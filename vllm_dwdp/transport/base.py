"""What a transport is: memory that peers can map, and an engine that copies from it while compute goes on.

    owner                                reader
    allocate_slab -> Slab                allocate_slot -> Slot
    export_handle -> Handle   ------->   map_peer -> PeerSlab
                                         copy_engine -> CopyEngine
                                            bind(copies)           -> Program, once per layer at start
                                            submit(program, after) -> Event,   per layer and forward
                                            record() -> Event; wait(event)     on the compute side
                                            take_exposed() -> Exposed          whoever counts waits
    close, last of all        <-------   unmap_peer

Written for CUDA IPC as much as for shared memory: events may stand for points in a stream, and waiting for one may mean
that a stream waits while the host goes on. Everything here raises DwdpError, in one line.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vllm_dwdp.errors import DwdpError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Handle:
    """What a peer needs to map a slab; picklable, and JSON-able through `to_dict`.

    transport: name of the transport, as in the config. host: id of the host, as the transport understands it.
    device: 'cpu' or 'cuda:<uuid>', never an index. nbytes: size of the slab. payload: the transport's own words.
    """

    transport: str
    host: str
    device: str
    nbytes: int
    payload: dict[str, Any]

    def check_transport(self, transport: str) -> None:
        """Raise DwdpError unless this is a handle of `transport`."""
        if self.transport != transport:
            raise DwdpError(
                f"a handle of transport {self.transport!r} reached {transport}: set one dwdp.transport for all ranks"
            )

    def words(self, **kinds: type) -> dict[str, Any]:
        """The payload; raises DwdpError unless it has these words, of these types."""
        if any(type(self.payload.get(name)) is not kind for name, kind in kinds.items()):
            raise _unreadable(self.payload)
        return self.payload

    def to_dict(self) -> dict[str, Any]:
        """Plain strings, ints and dicts, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Handle":
        """The inverse of `to_dict`; raises DwdpError for what is no handle."""
        kinds = {"transport": str, "host": str, "device": str, "nbytes": int, "payload": dict}
        if not isinstance(raw, dict) or {key: type(value) for key, value in raw.items()} != kinds:
            raise _unreadable(raw)
        return cls(**raw)


def _unreadable(raw: object) -> DwdpError:
    return DwdpError(f"a peer's handle cannot be read ({raw!r:.80}): run one vllm-dwdp on all ranks")


class Memory(ABC):
    """A fixed range of memory in this process.

    It is unmapped once its transport has let go of it *and* no tensor made by `tensor` is alive: a view that somebody
    still holds is never pulled from under them.
    """

    @property
    @abstractmethod
    def address(self) -> int:
        """First byte, as an address in this process (for CUDA: a device pointer)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Size in bytes."""

    @abstractmethod
    def tensor(self) -> "torch.Tensor":
        """uint8 [nbytes] over this memory, without a copy; it keeps the memory mapped."""


class Slab(Memory):
    """The memory in which a rank keeps its share of one layer; peers can map it."""


class Slot(Memory):
    """A prefetch buffer, private to this rank."""


class PeerSlab(Memory):
    """A peer's slab, mapped read-only: writing to it is an error, and faults where the hardware can tell."""

    def forget(self) -> None:
        """Let go of what the transport keeps of it for others, which outlives the mapping; idempotent."""


class Copy(NamedTuple):
    """A slice in absolute addresses of this process."""

    dst: int
    src: int
    nbytes: int


@dataclass(frozen=True)
class Program:
    """The copies of one layer into one slot, ready to submit any number of times; engines subclass it.

    The memory behind its addresses must stay mapped for as long as it can be submitted.
    """

    pulled_bytes: int  # from peers
    merged_bytes: int  # the merge copy, from the own slab
    copies: int  # bound copies, both kinds, before the engine joins or splits any


class Span(NamedTuple):
    """When a copy ran, in nanoseconds of time.monotonic_ns."""

    begin_ns: int
    end_ns: int


class Exposed(NamedTuple):
    """Waits of compute for copies: how many, and their seconds in all."""

    waits: int
    seconds: float


NOTHING_EXPOSED: Final = Exposed(0, 0.0)


class Event(ABC):
    """A point on the compute side, or the end of a submitted program."""

    @abstractmethod
    def span(self) -> Span | None:
        """For a program that has ended: when it ran. None before, for other events, and where no times are kept."""


class InCapture(DwdpError):
    """Compute is captured into a CUDA graph, where the engine can do nothing."""


class CopyEngine(ABC):
    """Copies in the background, one program after the other in the order of submission.

    exposed_every: of so many waits one is worth a look at `take_exposed`, which may cost calls of the device.
    """

    exposed_every: int = 1

    @abstractmethod
    def bind(self, pulls: Sequence[Copy], local: Sequence[Copy] = ()) -> Program:
        """Prepare `pulls` (from peers), then `local` (from the own slab), to run in this order."""

    @abstractmethod
    def submit(self, program: Program, after: Event | None = None) -> Event:
        """Enqueue the program behind all submitted before and behind `after`, which releases the slot; no blocking."""

    @abstractmethod
    def record(self) -> Event:
        """An event that is complete when all compute issued so far by the calling thread is done."""

    @abstractmethod
    def wait(self, event: Event, timeout_s: float) -> None:
        """Let compute wait for `event`; where compute is a stream the host goes on.

        Raises DwdpTimeout after `timeout_s`, InCapture, and another DwdpError if the copy failed.
        """

    @abstractmethod
    def take_exposed(self) -> Exposed:
        """How often and how long compute stood still in `wait`, since this was asked last and as far as it is known."""

    @abstractmethod
    def finish(self, event: Event, timeout_s: float) -> None:
        """Return when `event` is complete, the host waiting too; raises as `wait`. For set-up and close: not counted."""

    def capturing(self) -> bool:
        """Whether compute is captured into a CUDA graph, where nothing may be submitted."""
        return False

    @abstractmethod
    def ready(self, event: Event) -> bool:
        """Whether `event` is complete (a failed copy is), without waiting."""

    @abstractmethod
    def close(self, timeout_s: float) -> None:
        """Finish what is submitted and stop; idempotent. Raises DwdpTimeout, and can then be called again."""


class Transport(ABC):
    """How the slabs of one rank reach the others. One per worker; `close` once peers have unmapped."""

    name: str

    @abstractmethod
    def allocate_slab(self, nbytes: int) -> Slab:
        """A zeroed slab of `nbytes` > 0, refused beforehand where memory does not suffice."""

    @abstractmethod
    def export_handle(self, slab: Slab) -> Handle:
        """The handle for peers; valid until `close`."""

    @abstractmethod
    def map_peer(self, handle: Handle) -> PeerSlab:
        """Map a peer's slab read-only. Raises PeerLost where its owner is gone."""

    @abstractmethod
    def unmap_peer(self, peer: PeerSlab) -> None:
        """Let go of a mapping; idempotent."""

    @abstractmethod
    def allocate_slot(self, nbytes: int) -> Slot:
        """A zeroed prefetch buffer of `nbytes` > 0, refused beforehand where memory does not suffice."""

    @abstractmethod
    def copy_engine(self) -> CopyEngine:
        """A new copy engine; the caller closes it, before the memory it copies is let go."""

    @abstractmethod
    def close(self) -> None:
        """Withdraw all handles, let go of slabs, peers' slabs and slots; idempotent. What peers have mapped stays theirs."""
